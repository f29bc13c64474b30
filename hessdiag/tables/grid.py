"""Small tables: two header lines, a rule, and rows of cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN

from rich.cells import cell_len
from rich.text import Text

from hessdiag.tables.columns import GAP
from hessdiag.tables.marks import near_one

NONE = "–"


def grid(header: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> list[Text]:
    """Two header lines, a rule, and the rows; the first column to the left, all others right."""
    widths = [
        max(*map(cell_len, head), *(cell_len(row[i]) for row in rows))
        for i, head in enumerate(header)
    ]
    tops = [head[0] for head in header]
    bottoms = [head[1] for head in header]
    lines = [Text(_line(cells, widths), style="bold") for cells in (tops, bottoms) if any(cells)]
    rule = Text("─" * (sum(widths) + len(GAP) * (len(widths) - 1)), style="dim")
    return [*lines, rule, *(Text(_line(row, widths)) for row in rows)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        " " * (room - cell_len(cell)) + cell if index else cell + " " * (room - cell_len(cell))
        for index, (cell, room) in enumerate(zip(cells, widths, strict=True))
    )
    return GAP.join([first, *rest])


def number(value: float, digits: int = 3) -> str:
    """``value`` with so many digits, or a dash where it does not exist."""
    if math.isnan(value):
        return NONE
    return near_one(digits)(value, ROUND_HALF_EVEN)
