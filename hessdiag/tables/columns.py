"""What the summary table shows, and what of it fits on a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from hessdiag.plain import printable
from hessdiag.run import Run, VariantResult
from hessdiag.tables.labels import shortened
from hessdiag.tables.marks import Mark, Show, certified, marked, percent, scientific, whole

GAP = "  "
HEADLINE = "0.5"
FORECAST = "100"
NAME_WIDTH = 18
"""Names get this much before a column is dropped for them."""
SHORTEST_NAME = 8


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table: its two header lines and what it shows of a result.

    Attributes:
        key: Its name among the ``dropped`` of a layout.
        header: The two lines.
        cell: A result to what stands in the cell, in so many digits.
        style: Of a cell that says something a reader should not miss.
    """

    key: str
    header: tuple[str, str]
    cell: Callable[[VariantResult, int], Mark]
    style: str = ""


def kappa_mark(
    result: VariantResult, digits: int, form: Callable[[int], Show] = scientific
) -> Mark:
    """κ, with a sign where it depends on the zero tolerance."""
    mark = certified(result["kappa"], digits, form)
    return Mark(mark.kind, mark.lead, mark.text, mark.tail + "!" * bool(result["ambiguous"]))


def _gradient(result: VariantResult, digits: int) -> Mark:
    norm = result["gradient_norm"]
    return Mark("", "", "–" if norm is None else f"{norm:.{digits - 1}e}")


COLUMNS = (
    Column("size", ("", "size"), lambda r, _: Mark("", "", str(r["size"]))),
    Column("inactive", ("in-", "active"), lambda r, _: Mark("", "", str(r["inactive"]))),
    Column("kappa", ("", "κ"), kappa_mark),
    Column(
        "kappa_median",
        ("κ at the", "median λ"),
        lambda r, digits: certified(r["kappa_quantile"][HEADLINE], digits),
    ),
    Column("damped", ("", "κ_damp"), lambda r, digits: certified(r["kappa_damped"], digits)),
    Column("lambda_max", ("", "λ_max"), lambda r, digits: certified(r["lambda_max"], digits)),
    Column("lambda_min", ("", "λ_min"), lambda r, digits: certified(r["lambda_min"], digits)),
    Column("n_negative", ("λ < 0", "count"), lambda r, _: marked(r["n_negative"], whole), "yellow"),
    Column("mass", ("λ < 0", "mass"), lambda r, _: marked(r["negative_mass"], percent), "yellow"),
    Column("gradient", ("", "‖g‖"), _gradient),
    Column(
        "forecast",
        ("forecast", f"T = {FORECAST}"),
        lambda r, digits: certified(r["forecast_positive"][FORECAST], digits),
    ),
)
TERMS = {
    "kappa": "κ = λ_max / smallest λ > 0",
    "kappa_median": "at the median λ: λ_max / median λ > 0",
    "inactive": "inactive: zero rows of H",
    "mass": "mass: share of Σ|λ|",
    "gradient": "‖g‖: gradient norm",
    "forecast": "forecast: loss that 100 steps of gradient descent gain where λ > 0",
}
"""What the legend says of each column that needs a word."""
LAYOUTS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (4, ()),
    (3, ()),
    (3, ("forecast",)),
    (3, ("forecast", "gradient")),
    (3, ("forecast", "gradient", "lambda_min")),
    (3, ("forecast", "gradient", "lambda_min", "lambda_max")),
)
"""Digits and dropped columns, from wide to narrow; the first that fits is taken."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The widths of a column: in all, of its numbers, and of the tails behind them."""

    total: int
    number: int
    tail: int


def shape_of(header: Sequence[str], marks: Sequence[Mark]) -> Shape:
    """The widths that a column needs for its header lines and its cells."""
    plain = [mark for mark in marks if mark.lead != "["]
    bracketed = [mark for mark in marks if mark.lead == "["]
    tail = max((len(mark.tail) for mark in (*plain, *bracketed)), default=0)
    number = max((len(mark.text) for mark in plain), default=0)
    cells = [
        *(len(mark.lead) + bool(mark.lead) + number + tail for mark in plain),
        *(len(mark.lead) + len(mark.text) + tail for mark in bracketed),
    ]
    return Shape(max([0, *map(len, header), *cells]), number, tail)


@dataclass(frozen=True, slots=True)
class Layout:
    """What of the table fits: columns with their cells by block, and the width of the names.

    ``dropped`` names the columns that were left out for want of room.
    """

    columns: tuple[tuple[Column, Shape, dict[str, Mark]], ...]
    labels: dict[str, str]
    name_width: int
    dropped: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Of a full line."""
        return self.name_width + sum(len(GAP) + shape.total for _, shape, _ in self.columns)


def layout(run: Run, done: Mapping[str, VariantResult], width: int) -> Layout:
    """The richest layout that fits with labels that tell the blocks apart, else that fits."""
    names = [block.name for block in run.blocks]
    plain = [printable(name) for name in names]
    longest = max(map(cell_len, ("block", *plain)))
    idle = []
    if not any(result["inactive"] for result in done.values()):
        idle.append("inactive")
    if all(result["kappa_damped"].status is None for result in done.values()):
        idle.append("damped")
    fitting = []
    for digits, dropped in LAYOUTS:
        columns = []
        for column in COLUMNS:
            if column.key not in (*dropped, *idle):
                marks = {name: column.cell(result, digits) for name, result in done.items()}
                columns.append((column, shape_of(column.header, [*marks.values()]), marks))
        room = width - sum(len(GAP) + shape.total for _, shape, _ in columns)
        name_width = min(longest, max(room, SHORTEST_NAME))
        labels = shortened(plain, name_width)
        named = dict(zip(names, labels, strict=True))
        found = Layout(tuple(columns), named, name_width, dropped)
        if room >= min(longest, NAME_WIDTH):
            if len(set(labels)) == len(set(plain)):
                return found
            fitting.append(found)
    return fitting[0] if fitting else found


def aligned(mark: Mark, shape: Shape) -> str:
    """Kinds, numbers and tails one below the other; a bracket hugs its number."""
    tail = mark.tail.ljust(shape.tail)
    if mark.lead == "[":
        return f"[{mark.text}{tail}".rjust(shape.total)
    lead = f"{mark.lead} " if mark.lead else ""
    return f"{lead}{mark.text.rjust(shape.number)}{tail}".rjust(shape.total)
