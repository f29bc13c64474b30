"""What an analysis will cost, in print."""

from __future__ import annotations

from rich.cells import cell_len
from rich.text import Text

from hessdiag.estimated import BlockEstimate, Estimate
from hessdiag.plain import printable
from hessdiag.tables.columns import GAP
from hessdiag.tables.labels import shortened
from hessdiag.tables.lines import TIED, printed, wrapped
from hessdiag.tables.summary import WHOLE

HEADER = ("block", "size", "method", "products", "time", "memory")
LEFT = (0, 2)
"""Columns of words."""
TEXT_WIDTH = 60
"""The other columns take no more than this."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def estimate_table(estimate: Estimate, *, width: int = 100, color: bool = False) -> str:
    """Products, time and memory per block, and in all.

    Args:
        estimate: Of one analysis.
        width: Columns of the terminal.
        color: Use ANSI colours; without, the text is plain.

    Returns:
        Lines, each ended by a newline.
    """
    blocks = sorted(estimate.blocks, key=lambda block: block.name == WHOLE)
    labels = shortened([printable(b.name) for b in blocks], max(width - TEXT_WIDTH, 12))
    rows = [_row(label, block) for label, block in zip(labels, blocks, strict=True)]
    total = (
        "in all",
        "",
        "",
        f"{estimate.products:,}",
        duration(estimate.seconds),
        size(estimate.memory),
    )
    table = [HEADER, *rows, total]
    widths = [max(cell_len(row[i]) for row in table) for i in range(len(HEADER))]
    rule = Text("─" * (sum(widths) + len(GAP) * (len(widths) - 1)), style="dim")
    lines = [Text(_line(row, widths)) for row in table]
    lines[0].stylize("bold")
    lines[-1].stylize("bold")
    text = [lines[0], rule, *lines[1:-1], rule, lines[-1], Text()]
    text += wrapped(_remark(estimate), width, "dim")
    return printed(text, width, color=color)


def duration(seconds: float) -> str:
    """Two digits that a reader needs, in the unit that fits."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"


def size(count: int) -> str:
    """Bytes, in powers of 1024."""
    number, unit = float(count), 0
    while number >= 1000 and unit < len(UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return (
        f"{number:.1f} {UNITS[unit]}" if number < 9.95 and unit else f"{number:.0f} {UNITS[unit]}"
    )


def _row(label: str, block: BlockEstimate) -> tuple[str, ...]:
    if block.skipped is not None:
        return (label, f"{block.size:,}", f"skipped: {printable(block.skipped)}", "", "", "")
    products = f"{block.products:,}" if block.products else "–"
    cells = (block.method, products, duration(block.seconds), size(block.memory))
    return (label, f"{block.size:,}", *cells)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = []
    for index, (cell, room) in enumerate(zip(row, widths, strict=True)):
        space = " " * (room - cell_len(cell))
        cells.append(cell + space if index in LEFT else space + cell)
    return GAP.join(cells)


def _remark(estimate: Estimate) -> str:
    engines = sorted({block.engine for block in estimate.blocks if block.engine})
    noise = sum(block.noise_products for block in estimate.blocks)
    parts = [
        f"{estimate.device}, {estimate.dtype}, engine {', '.join(engines)}",
        f"in all: with {duration(estimate.selfcheck_seconds)} of self-checks and "
        f"{duration(estimate.setup_seconds)} for the data",
        f"apart from the products: about {estimate.selfcheck_products} for the self-checks and "
        f"{noise} that measure rounding",
        "memory: the peak, above the process with its model",
    ]
    if any(block.method in ("lanczos", "power") for block in estimate.blocks):
        parts.append("lanczos, power: at the most that they may take")
    return " · ".join(part.replace(" ", TIED) if len(part) < 30 else part for part in parts)
