"""PyHessian's numbers and ours in print: value, certificate, deviation, products, seconds."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN

from rich.cells import cell_len
from rich.text import Text

from hessdiag.agreement import Crosscheck, Deviation, Entry
from hessdiag.plain import printable
from hessdiag.tables.columns import GAP
from hessdiag.tables.estimate import duration
from hessdiag.tables.lines import brief, printed, wrapped
from hessdiag.tables.marks import Mark, compact, marked, near_one, scientific

HEADER = ("", "method", "value", "certificate", "off by", "products", "time")
LEFT = (0, 1)
"""Columns of words."""
SPARE = (3, 5)
"""Columns that a narrow terminal goes without, the first one first."""
NAMES = {"lambda_max": "λ_max", "trace": "trace"}
BARE = ("estimate", None)  # a value whose error nothing is said of
DIGITS, END_DIGITS, ERROR_DIGITS = 5, 4, 2
CERTAIN = 1e-12  # a deviation below is the rounding of two ways to the same number


def crosscheck_table(found: Crosscheck, *, width: int = 100, color: bool = False) -> str:
    """A line for each method, the certified ones below the others, and what to know of them.

    Args:
        found: Of one network.
        width: Columns of the terminal.
        color: Use ANSI colours; without, the text is plain.

    Returns:
        Lines, each ended by a newline.
    """
    rows = []
    for index, entry in enumerate(found.entries):
        first = index == 0 or found.entries[index - 1].quantity != entry.quantity
        rows.append((NAMES[entry.quantity] if first else "", *_cells(entry)))
    kept = _kept([HEADER, *rows], width)
    header, *rows = [tuple(row[i] for i in kept) for row in (HEADER, *rows)]
    widths = [max(cell_len(row[i]) for row in (header, *rows)) for i in range(len(kept))]
    rule = Text("─" * (sum(widths) + len(GAP) * (len(widths) - 1)), style="dim")
    lines = [Text(_line(header, widths), style="bold"), rule]
    for entry, row in zip(found.entries, rows, strict=True):
        if row[0] and entry is not found.entries[0]:
            lines.append(Text())
        lines.append(Text(_line(row, widths), style="red" if entry.failure else ""))
    lines += [rule, *wrapped(_legend(found), width, "dim")]
    failures = {e.method: e.failure for e in found.entries if e.failure is not None}
    for method, why in failures.items():
        lines += wrapped(f"{method}: {brief(why.split(chr(10))[0])}", width, indent="  ")
    for note in found.notes:
        lines += wrapped(f"note: {brief(note)}", width, indent="  ")
    return printed(lines, width, color=color)


def _kept(rows: list[tuple[str, ...]], width: int) -> list[int]:
    """The columns that fit."""
    kept = list(range(len(HEADER)))
    for spare in SPARE:
        widths = [max(cell_len(row[i]) for row in rows) for i in kept]
        if sum(widths) + len(GAP) * (len(kept) - 1) > width:
            kept.remove(spare)
    return kept


def _cells(entry: Entry) -> tuple[str, ...]:
    if entry.failure is not None:
        return (entry.method, "–", "failed: see below", "–", "–", "–")
    found = entry.found
    value = "?" if found.value is None else scientific(DIGITS)(found.value, ROUND_HALF_EVEN)
    bounds = marked(found, compact(END_DIGITS), compact(END_DIGITS))
    if found.status == "exact" and found.low is not None and found.high is not None:
        bounds = Mark("=", "", "exact")
    elif found.status in BARE:
        bounds = Mark("", "", "none")
    return (
        entry.method,
        value,
        str(bounds),
        _off(entry.deviation),
        f"{entry.products:,}",
        _time(entry.seconds),
    )


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 0.95 else duration(seconds)


def _off(deviation: Deviation | None) -> str:
    """How far off, and as much of that as is certain."""
    if deviation is None:
        return "–"
    least, relative = deviation.at_least, deviation.relative
    if least is not None and least > CERTAIN:
        return f"≥ {_percent(least, ROUND_FLOOR)}"
    if least is None and relative is not None:
        return f"~ {_percent(relative, ROUND_HALF_EVEN)}"
    if least is None:
        return "–"
    if relative is not None and relative > CERTAIN:
        return f"inside, {_percent(relative, ROUND_CEILING)}"
    return "inside"


def _percent(share: float, rounding: str) -> str:
    return f"{near_one(ERROR_DIGITS)(100 * share, rounding)} %"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = []
    for index, (cell, room) in enumerate(zip(row, widths, strict=True)):
        space = " " * (room - cell_len(cell))
        cells.append(cell + space if index in LEFT else space + cell)
    return GAP.join(cells)


def _legend(found: Crosscheck) -> str:
    parts = [
        f"{printable(found.task)}, {found.size:,} parameters, {found.device}, "
        f"{found.options.dtype}, engine {found.engine or 'none'}",
        "off by: relative to the last certified value; ≥ as far as is certain, inside its interval",
        f"not in the times: {duration(found.setup_seconds)} for our self-checks, engine and "
        "rounding",
    ]
    return " · ".join(parts)
