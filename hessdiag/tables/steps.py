"""Several runs of one training over its steps, in print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from hessdiag.plain import printable
from hessdiag.quantity import Quantity
from hessdiag.run import Run, VariantResult
from hessdiag.series import step_of
from hessdiag.tables.columns import GAP, HEADLINE
from hessdiag.tables.labels import shortened, told_apart
from hessdiag.tables.lines import TIED, printed, wrapped
from hessdiag.tables.marks import MEANINGS, Mark, certified, meanings
from hessdiag.tables.verdict import NEAR, leader_name
from hessdiag.variants.grammar import RAW
from hessdiag.verdict import WHOLE, verdict

DIGITS = 3
OVER = (12, 16, 24, 40)
BEFORE = (24, 40)
"""Names over or before their numbers get the first of these widths that tells them apart."""
FALLBACK = "*"
TOP = "λ_max of whole"
BY_FORECAST = "best by forecast"
BY_KAPPA = "best by κ"


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells by row and column, with what stands before and above them."""

    corner: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]


def steps_table(
    runs: Sequence[Run], *, variant: str = "raw", width: int = 100, color: bool = False
) -> str:
    """The headline condition number of every block in each of several runs, in their order.

    Where raw is shown and there are other variants, also which of them helps most at each.

    Args:
        runs: At least one; blocks are matched by name.
        variant: The view of the problem that is shown.
        width: Columns of the terminal; what does not fit beside goes below, nothing is cut.
        color: Use ANSI colours; without, the text is plain.

    Returns:
        Lines, each ended by a newline.
    """
    corner, labels = _labels(runs)
    names = list(dict.fromkeys(block.name for run in runs for block in run.blocks))
    names.sort(key=lambda name: name == WHOLE)
    results = [
        {b.name: b.variants[variant] for b in run.blocks if variant in b.variants} for run in runs
    ]
    losses = [_loss(found) for found in results]
    marks = {name: [headline(found.get(name)) for found in results] for name in names}
    lines = {"loss": losses}
    if WHOLE in names:
        lines[TOP] = [_top(found.get(WHOLE)) for found in results]
    leaders = _leaders(runs) if variant == RAW else {}
    lines |= leaders
    cells = [*lines.values(), *([str(mark) for mark in marks[name]] for name in names)]
    across = Grid("block", (*lines, *told_apart(names, BEFORE)), tuple(labels), cells)
    down = Grid(
        corner, tuple(labels), (*lines, *told_apart(names, OVER)), [*zip(*cells, strict=True)]
    )
    best = min((down, across), key=lambda grid: _price(grid, width))
    text = [*wrapped(_title(runs, variant), width, "bold"), Text()]
    for panel in _panels(best, width):
        text += [*panel, Text()]
    legend = _legend([mark for row in marks.values() for mark in row], leaders)
    text += wrapped(legend, width, "dim")
    return printed(text, width, color=color)


def headline(result: VariantResult | None) -> Mark:
    """κ at the median λ where it is resolved, else κ, which is marked."""
    if result is None:
        return Mark("–", "", "–")
    if result["skipped"] is not None:
        return Mark("failed" if result["skipped"].startswith("failed") else "skipped", "", "–")
    median: Quantity = result["kappa_quantile"][HEADLINE]
    if median.status != "unresolved":
        return certified(median, DIGITS)
    mark = certified(result["kappa"], DIGITS)
    return Mark(mark.kind, mark.lead, mark.text, mark.tail + FALLBACK * (mark.kind != "?"))


def _labels(runs: Sequence[Run]) -> tuple[str, list[str]]:
    """Training steps where every run has its own, else the checkpoints' names."""
    steps = [step_of(run) for run in runs]
    if None not in steps and len(set(steps)) == len(steps):
        return "step", [f"{step:,}" for step in steps]
    names = [str(run.provenance.config.get("checkpoint") or "model") for run in runs]
    return "checkpoint", shortened([printable(name) for name in names], BEFORE[0])


def _loss(results: dict[str, VariantResult]) -> str:
    losses = [result["loss"] for result in results.values() if result["loss"] is not None]
    return f"{losses[0]:.4g}" if losses else "–"


def _top(result: VariantResult | None) -> str:
    return "–" if result is None else str(certified(result["lambda_max"], DIGITS))


def _leaders(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Which variant helps most at each run, by either measure; empty where there are no others."""
    verdicts = [verdict(run) for run in runs]
    if not any(found.forecast or found.kappa for found in verdicts):
        return {}
    return {
        BY_FORECAST: [leader_name(found.forecast) for found in verdicts],
        BY_KAPPA: [leader_name(found.kappa) for found in verdicts],
    }


def _title(runs: Sequence[Run], variant: str) -> str:
    config = runs[0].provenance.config
    tasks = list(dict.fromkeys(str(run.provenance.config.get("task")) for run in runs))
    parts = [
        ", ".join(tasks),
        f"{len(runs)} checkpoint{'s' * (len(runs) != 1)}",
        None if variant == "raw" else f"variant {variant}",
        config.get("curvature"),
        "κ at the median λ of each block",
    ]
    return " · ".join(printable(str(part)) for part in parts if part)


def _split(grid: Grid, width: int) -> Iterator[tuple[int, range, list[int]]]:
    """The width of the row labels, and which columns go side by side, with their widths."""
    label = max(map(cell_len, (grid.corner, *grid.rows)))
    widths = [
        max(cell_len(head), *(cell_len(row[i]) for row in grid.cells))
        for i, head in enumerate(grid.columns)
    ]
    start, used = 0, label
    for index, own in enumerate(widths):
        if index > start and used + len(GAP) + own > width:
            yield label, range(start, index), widths
            start, used = index, label
        used += len(GAP) + own
    yield label, range(start, len(widths)), widths


def _price(grid: Grid, width: int) -> tuple[int, int]:
    """What a reader pays: tables to leaf through, then lines."""
    panels = sum(1 for _ in _split(grid, width))
    return panels, panels * (len(grid.rows) + 3)


def _panels(grid: Grid, width: int) -> Iterator[list[Text]]:
    for label, chosen, widths in _split(grid, width):
        lines = []
        for head, row in zip((grid.corner, *grid.rows), (grid.columns, *grid.cells), strict=True):
            # Steps are numbers, names are not.
            front = _padded(head, label, right=grid.corner == "step")
            cells = [_padded(row[i], widths[i], right=True) for i in chosen]
            lines.append(Text(GAP.join([front, *cells])))
        lines[0].stylize("bold")
        total = label + sum(len(GAP) + widths[i] for i in chosen)
        yield [lines[0], Text("─" * total, style="dim"), *lines[1:]]


def _padded(text: str, room: int, *, right: bool) -> str:
    space = " " * (room - cell_len(text))
    return space + text if right else text + space


def _legend(marks: Sequence[Mark], leaders: Mapping[str, Sequence[str]]) -> str:
    kinds = {mark.kind for mark in marks}
    parts = meanings(marks)
    if any(mark.tail.endswith(FALLBACK) for mark in marks):
        parts.append(f"{FALLBACK} κ = λ_max / smallest λ > 0, for the median λ is unresolved")
    if leaders:
        parts.append(f"{BY_FORECAST}, {BY_KAPPA}: the variant that helps most, as the verdict says")
        told = [name for row in leaders.values() for name in row]
        if any(name.startswith(NEAR) for name in told):
            parts.append(f"{NEAR}{TIED}not separated from another")
        if "~" not in kinds and any(name.startswith("~") for name in told):
            parts.append(f"~{TIED}{MEANINGS['~']}")
    missing = [kind for kind in ("failed", "skipped") if kind in kinds]
    parts += [f"some blocks {kind}: hessdiag show RUN says why" for kind in missing]
    return " · ".join(["at the median λ: λ_max / median λ > 0", *parts])
