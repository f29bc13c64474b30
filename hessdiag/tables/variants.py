"""Variants side by side: a row per block, a group of columns per quantity, a column per variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.text import Text

from hessdiag.combined import outstanding
from hessdiag.quantity import Quantity
from hessdiag.run import Run, VariantResult
from hessdiag.tables.columns import FORECAST, HEADLINE, NAME_WIDTH, TERMS, kappa_mark
from hessdiag.tables.groups import BEST, EMPTY, Column, Group, column, panel_lines, panels
from hessdiag.tables.labels import told_apart
from hessdiag.tables.lines import TIED
from hessdiag.tables.marks import Mark, Show, certified, compact, meanings, scientific, times
from hessdiag.variants.grammar import RAW
from hessdiag.verdict import WHOLE, Ranking, Verdict, competitors, kappa_ratio, solved, verdict

Cells = Mapping[str, VariantResult]
Form = tuple[int, Callable[[int], Show]]

NAMES = (NAME_WIDTH, 20, 23, 26, 32, 40)
"""Blocks get the first of these widths that tells them apart."""
OTHER = "‡"
SKIPPED = Mark("skipped", "", "–")
FORMS: tuple[Form, ...] = ((3, scientific), (2, compact))
"""Digits, and how numbers are printed: the second where it saves a table."""
RATIO = "ratio to raw"
MEDIAN, SUM = "median", "sum"


@dataclass(frozen=True, slots=True)
class Measure:
    """A quantity of which each row has a best.

    Attributes:
        title: Over its columns.
        quantity: Of a result.
        mark: What stands in the cell.
        smallest: The smallest is the best.
    """

    title: str
    quantity: Callable[[VariantResult], Quantity]
    mark: Callable[[VariantResult, Form], Mark]
    smallest: bool


def _median(result: VariantResult) -> Quantity:
    found = result["kappa_quantile"][HEADLINE]
    assert isinstance(found, Quantity)  # noqa: S101 - the schema says so, for the type checker
    return found


def _gain(result: VariantResult) -> Quantity:
    found = result["forecast_positive"][FORECAST]
    assert isinstance(found, Quantity)  # noqa: S101 - the schema says so, for the type checker
    return found


KAPPA = Measure("κ", lambda r: r["kappa"], lambda r, form: kappa_mark(r, *form), smallest=True)
AT_MEDIAN = Measure(
    "κ at the median λ", _median, lambda r, form: certified(_median(r), *form), smallest=True
)
GAIN = Measure(
    f"forecast, T = {FORECAST}",
    _gain,
    lambda r, form: certified(_gain(r), *form),
    smallest=False,
)


@dataclass(frozen=True, slots=True)
class Beside:
    """The rows and columns of the comparison.

    Attributes:
        rows: By block, the results by variant; only blocks of which one has numbers.
        variants: Those that have numbers on some block.
        others: Which of them compute another function: no best, no ratio.
        verdict: On the run.
    """

    rows: Mapping[str, Cells]
    variants: tuple[str, ...]
    others: tuple[str, ...]
    verdict: Verdict

    @property
    def medians(self) -> Ranking | None:
        """The ranking whose medians end the ratios, where there are several blocks."""
        found = self.verdict.kappa
        return found if found is not None and found.blocks > 1 else None

    @property
    def sums(self) -> Ranking | None:
        """The ranking whose sums end the forecasts, where there are several blocks and no whole."""
        found = self.verdict.forecast
        return found if found is not None and found.blocks > 1 else None

    @property
    def ends(self) -> list[str]:
        """Labels of the last rows."""
        return [MEDIAN] * (self.medians is not None) + [SUM] * (self.sums is not None)


def beside(run: Run) -> Beside:
    """What of a run can be compared; ``whole`` is its last row."""
    rows = {b.name: b.variants for b in run.blocks if any(map(solved, b.variants.values()))}
    ordered = sorted(rows, key=lambda name: name == WHOLE)
    rows = {name: rows[name] for name in ordered}
    shown = [v for v in run.variants if any(solved(row.get(v)) for row in rows.values())]
    same = competitors(run)
    others = tuple(v for v in shown if v not in same)
    return Beside(rows, tuple(shown), others, verdict(run))


def variant_lines(table: Beside, width: int) -> tuple[list[Text], list[Mark]]:
    """The tables, and every mark in them for the legend.

    Args:
        table: What is compared.
        width: Columns of the terminal; what does not fit beside goes below, nothing is cut.
    """
    names = [*table.rows]
    labels = [*told_apart(names, NAMES), *table.ends]
    room = width - max(map(cell_len, ("block", *labels)))
    fits = [[*panels(_groups(table, form), room)] for form in FORMS]
    chosen = min(fits, key=len)
    rules = {len(names) - 1} if len(names) > 1 and names[-1] == WHOLE else set()
    rules |= {len(names)} if table.ends else set()
    lines = []
    for panel in chosen:
        lines += [*panel_lines(panel, labels, rules), Text()]
    found = [made for panel in chosen for group in panel for made in group.columns]
    return lines, [cell for made in found for cell in made.cells if cell != EMPTY]


def variant_legend(table: Beside, marks: Sequence[Mark]) -> list[str]:
    """What the marks and the last rows say, a part each."""
    parts = [f"{RATIO}: of κ at the median λ, below 1 is better", TERMS["forecast"]]
    parts += ["median: over blocks"] * (table.medians is not None)
    parts += ["sum: over blocks"] * (table.sums is not None)
    if any(mark.tail.endswith(BEST) for mark in marks):
        parts.append(f"{BEST}{TIED}certainly the best of its row")
    if any(mark.tail.startswith("!") for mark in marks):
        parts.append(f"!{TIED}eigenvalues at the zero tolerance: κ depends on it")
    if table.others:
        losses = ", ".join(f"{key} {_loss(table, key)}" for key in table.others)
        own = f"{OTHER}{TIED}another function, never ranked, with a loss of its own: {losses}"
        parts.append(f"{own} (raw {_loss(table, RAW)})")
    parts += meanings(mark for mark in marks if mark.kind != "–")
    if any(mark.kind in {"skipped", "–"} for mark in marks):
        parts.append(f"–{TIED}skipped, or does not exist")
    return parts


def _loss(table: Beside, variant: str) -> str:
    losses = [row[variant]["loss"] for row in table.rows.values() if solved(row.get(variant))]
    return f"{losses[-1]:.4g}" if losses and losses[-1] is not None else "–"


def _groups(table: Beside, form: Form) -> list[Group]:
    found = [
        _group(table, KAPPA, form, None),
        _group(table, AT_MEDIAN, form, None),
        _ratios(table, form),
        _group(table, GAIN, form, table.sums),
    ]
    return [group for group in found if group.columns]


def _group(table: Beside, measure: Measure, form: Form, last: Ranking | None) -> Group:
    cells: dict[str, list[Mark]] = {variant: [] for variant in table.variants}
    for row in table.rows.values():
        done = {v: row[v] for v in table.variants if solved(row.get(v))}
        numbers = {v: measure.quantity(r) for v, r in done.items() if v not in table.others}
        comparable = measure is not GAIN or not table.verdict.penalised
        best = _best(numbers, smallest=measure.smallest) if comparable else None
        for variant, marks in cells.items():
            mark = measure.mark(done[variant], form) if variant in done else SKIPPED
            marks.append(_starred(mark) if variant == best else mark)
    columns = _columns(table, cells, form, last, SUM, smallest=measure.smallest)
    return Group(measure.title, columns, repeated=int(table.variants[:1] == (RAW,)))


def _ratios(table: Beside, form: Form) -> Group:
    cells = {
        variant: [_ratio(row.get(RAW), row.get(variant), form) for row in table.rows.values()]
        for variant in table.variants
        if variant != RAW and variant not in table.others
    }
    columns = _columns(table, cells, form, table.medians, MEDIAN, smallest=True)
    return Group(RATIO, columns)


def _ratio(raw: VariantResult | None, result: VariantResult | None, form: Form) -> Mark:
    if raw is None or result is None or not solved(result):
        return SKIPPED
    return certified(kappa_ratio(raw, result), form[0], times)


def _columns(
    table: Beside,
    cells: Mapping[str, Sequence[Mark]],
    form: Form,
    ranking: Ranking | None,
    label: str,
    *,
    smallest: bool,
) -> tuple[Column, ...]:
    """The columns with their last rows, of which one may be those of a ``ranking``."""
    amounts: dict[str, Quantity] = {}
    best = None
    if ranking is not None:
        amounts = {s.variant: s.amount for s in ranking.standings}
        judged = {s.variant: s.amount for s in (*ranking.ranked, *ranking.unranked)}
        best = outstanding(judged, smallest=smallest)
    found = []
    for variant, marks in cells.items():
        last = [EMPTY] * len(table.ends)
        if variant in amounts:
            mark = certified(amounts[variant], form[0], times if label == MEDIAN else form[1])
            last[table.ends.index(label)] = _starred(mark) if variant == best else mark
        network, plus, coordinates = variant.rpartition("+")
        header = (network + plus, coordinates + OTHER * (variant in table.others))
        found.append(column(header, [*marks, *last]))
    return tuple(found)


def _best(numbers: Mapping[str, Quantity], *, smallest: bool) -> str | None:
    """What does not exist takes no part."""
    known = {key: q for key, q in numbers.items() if q.status not in {None, "zero"}}
    return outstanding(known, smallest=smallest)


def _starred(mark: Mark) -> Mark:
    return replace(mark, tail=mark.tail + BEST)
