"""Two runs side by side, in print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from hessdiag.comparison import certain_sign
from hessdiag.diff import Compared, Diff, Pair
from hessdiag.plain import printable
from hessdiag.quantity import Quantity
from hessdiag.run import Run
from hessdiag.tables.columns import COLUMNS, FORECAST, GAP
from hessdiag.tables.labels import shortened
from hessdiag.tables.lines import TIED, brief, printed, wrapped
from hessdiag.tables.marks import (
    Mark,
    certified,
    marked,
    meanings,
    percent,
    signed,
    signed_percent,
    signed_whole,
    times,
    whole,
)
from hessdiag.tables.summary import run_title
from hessdiag.tables.verdict import leader_name
from hessdiag.variants.grammar import RAW
from hessdiag.verdict import WHOLE, solved, verdict

SHOWN = (
    ("kappa_median", "kappa_quantile", "0.5"),
    ("kappa", "kappa", None),
    ("lambda_max", "lambda_max", None),
    ("lambda_min", "lambda_min", None),
    ("mass", "negative_mass", None),
)
"""The rows of a block: the column of the summary table whose words they take, field and key."""
COMPARED = (SHOWN[0], ("forecast", "forecast_positive", FORECAST))
"""Those of a block under another variant than raw."""
LABELS = {column.key: " ".join(column.header).strip() for column in COLUMNS}
SHARES = {"negative_count", "negative_mass", "negative_depth"}
ARROWS = {1: "↑", -1: "↓", 0: " "}
DIGITS = 3
HASH_SHOWN = 8
INDENT = "  "

CHANGE = 8
"""Of the last column, beyond its header."""


@dataclass(frozen=True, slots=True)
class Row:
    """A quantity in print; ``sign`` is that of its change where it is certain."""

    label: str
    first: Mark
    second: Mark
    change: Mark
    sign: int


Table = tuple[list[Text], list[Row], Pair]
"""A heading, the rows below it, and whose they are."""


def diff_table(
    diff: Diff,
    names: tuple[str, str],
    *,
    variant: str | None = None,
    block: str | None = None,
    width: int = 100,
    color: bool = False,
) -> str:
    """Both values of what matters in each block, and their certain change.

    Args:
        diff: Of two runs.
        names: What to call the two runs.
        variant: The view of the problem that is compared; by default raw, and below it the
            headline and the forecast of every other that both runs have.
        block: Print every quantity of this block instead.
        width: Columns of the terminal.
        color: Use ANSI colours; without, the text is plain.

    Returns:
        Lines, each ended by a newline.
    """
    shown = RAW if variant is None else variant
    chosen = [pair for pair in diff.pairs if block is None or pair.block == block]
    pairs = [pair for pair in chosen if pair.variant == shown]
    pairs.sort(key=lambda pair: pair.block == WHOLE)
    beside = [p for p in chosen if p not in pairs] if variant is None and block is None else []
    lines = _titles(diff, names, shown, width)
    for text in _settings(diff):
        lines += wrapped(f"Warning: {text}", width, "yellow", indent=INDENT)
    lines.append(Text())
    tables = [
        (_heading(pair, width), _rows(pair, SHOWN) if block is None else _every_row(pair), pair)
        for pair in pairs
    ]
    tables = [part for table in tables for part in (table, *_others(table[2], beside, width))]
    every = [row for _, rows, _ in tables for row in rows]
    widths = _widths(every)
    header = _line("", "first", "second", "  change", widths)
    lines += [Text(header, style="bold"), Text("─" * (len(header) + CHANGE), style="dim")]
    for heading, rows, _ in tables:
        lines += heading
        for row in rows:
            cells = (str(row.first), str(row.second), f"{ARROWS[row.sign]} {row.change}")
            lines.append(Text(_line(row.label, *cells, widths), style="" if row.sign else "dim"))
    lines.append(Text())
    if block is None:
        lines += wrapped(_sentence(pairs), width, "bold")
    if variant is None and block is None:
        lines += wrapped(_verdicts(diff), width, "bold")
        lines += wrapped(_alone(diff), width)
    lines += wrapped(_legend(every), width, "dim")
    return printed(lines, width, color=color)


def _others(pair: Pair, beside: Sequence[Pair], width: int) -> Iterator[Table]:
    """The other variants of a block, where either run has numbers."""
    for other in beside:
        sides = (other.first, other.second)
        if other.block == pair.block and all(sides) and any(map(solved, sides)):
            heading = Text(f"{INDENT}under {printable(other.variant)}", style="italic")
            yield [heading, *_missing(other, width)], _rows(other, COMPARED), other


def _verdicts(diff: Diff) -> str:
    """Which variant helps most in either run; empty where there is one variant only."""
    found = [verdict(run) for run in (diff.first, diff.second)]
    by = {"forecast": [v.forecast for v in found], "κ at the median λ": [v.kappa for v in found]}
    parts = [
        f"by {word} {' | '.join(leader_name(ranking) for ranking in rankings)}"
        for word, rankings in by.items()
        if any(rankings)
    ]
    return f"The variant that helps most (first | second): {'; '.join(parts)}." if parts else ""


def _alone(diff: Diff) -> str:
    """The variants that one run has alone."""
    sides = {"first": diff.first.variants, "second": diff.second.variants}
    both = set(diff.first.variants) & set(diff.second.variants)
    parts = [
        f"Only in the {word} run: {', '.join(printable(v) for v in variants if v not in both)}."
        for word, variants in sides.items()
        if set(variants) - both
    ]
    return " ".join(parts)


def _titles(diff: Diff, names: tuple[str, str], variant: str, width: int) -> list[Text]:
    labels = shortened([printable(name) for name in names], max(width // 3, 20))
    pad = max(map(len, labels))
    lines = []
    for word, label, run in zip(
        ("first ", "second"), labels, (diff.first, diff.second), strict=True
    ):
        about = _title(run, variant).replace("loss ", f"loss{TIED}")
        title = f"{word}{TIED} {label.ljust(pad)}  {about}"
        lines += wrapped(title, width, "bold", indent=" " * 8)
    return lines


def _title(run: Run, variant: str) -> str:
    results = [b.variants[variant] for b in run.blocks if variant in b.variants]
    return run_title(run, variant, [r for r in results if r["skipped"] is None])


def _settings(diff: Diff) -> list[str]:
    if not diff.settings:
        return []
    shown = [f"{name} ({_value(a)} | {_value(b)})" for name, (a, b) in diff.settings.items()]
    return [f"the two analyses differ in {', '.join(shown)}: part of the change may come from that"]


def _value(value: object) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:HASH_SHOWN]
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else printable(str(value))


def _heading(pair: Pair, width: int) -> list[Text]:
    label = shortened([printable(pair.block)], max(width - 20, 20))[0]
    sizes = [None if r is None else r["size"] for r in (pair.first, pair.second)]
    known = list(dict.fromkeys(f"{size:,}" for size in sizes if size is not None))
    heading = Text(label, style="bold")
    heading.append(f"  {' | '.join(known)} parameters", style="dim")
    return [heading, *_missing(pair, width)]


def _missing(pair: Pair, width: int) -> list[Text]:
    """Why a side has no numbers."""
    lines = []
    for word, result in (("first", pair.first), ("second", pair.second)):
        if result is None:
            lines += wrapped(f"{INDENT}not in the {word} run", width, "dim")
        elif result["skipped"] is not None:
            reason = f"skipped in the {word} run: {brief(result['skipped'])}"
            lines += wrapped(INDENT + reason, width, "dim", indent=INDENT)
    return lines


def _row(label: str, found: Compared) -> Row:
    first, second = (_shown(found, quantity) for quantity in (found.first, found.second))
    return Row(label, first, second, _change(found), certain_sign(found.difference))


def _rows(pair: Pair, shown: Sequence[tuple[str, str, str | None]]) -> list[Row]:
    if not pair.solved:
        return []
    return [_row(LABELS[column], pair.quantity(field, key)) for column, field, key in shown]


def _every_row(pair: Pair) -> list[Row]:
    if not pair.solved:
        return []
    rows = [_row(found.name, found) for found in pair.quantities()]
    return [row for row in rows if {row.first.kind, row.second.kind} != {"–"}]


def _shown(found: Compared, quantity: Quantity) -> Mark:
    if found.field.integer:
        return marked(quantity, whole)
    if found.field.name in SHARES:
        return marked(quantity, percent)
    return certified(quantity, DIGITS)


def _change(found: Compared) -> Mark:
    """The ratio, or the difference where there is none."""
    if found.field.integer:
        return marked(found.difference, signed_whole)
    if found.ratio is not None and found.ratio.value is not None:
        return certified(found.ratio, DIGITS, times)
    if found.field.name in SHARES:
        return marked(found.difference, signed_percent)
    return certified(found.difference, DIGITS, signed)


def _widths(rows: Sequence[Row]) -> tuple[int, int, int]:
    """Of the labels and of the two columns of values."""
    cells = [("", "first", "second"), *((r.label, str(r.first), str(r.second)) for r in rows)]
    label, first, second = (max(map(len, column)) for column in zip(*cells, strict=True))
    return label, first, second


def _line(label: str, first: str, second: str, change: str, widths: tuple[int, int, int]) -> str:
    cells = [label.ljust(widths[0]), first.rjust(widths[1]), second.rjust(widths[2]), change]
    return INDENT + GAP.join(cells)


def _sentence(pairs: Sequence[Pair]) -> str:
    """The largest certain change of the headline."""
    certain = []
    for pair in pairs:
        if pair.solved and pair.block != WHOLE:
            found = pair.quantity("kappa_quantile", "0.5")
            value = found.ratio.value if found.ratio is not None else None
            if certain_sign(found.difference) and value:
                certain.append((max(value, 1 / value), pair.block, found))
    if not certain:
        return "No block's κ at the median λ has certainly changed."
    _, name, found = max(certain, key=lambda item: item[0])
    label = shortened([printable(name)], 100)[0]
    first, second = (certified(q, DIGITS) for q in (found.first, found.second))
    return (
        f"κ at the median λ changed most in {label}, by {str(_change(found)).lstrip('= ')}: from "
        f"{first} to {second}."
    )


def _legend(rows: Sequence[Row]) -> str:
    marks = [mark for row in rows for mark in (row.first, row.second, row.change)]
    return " · ".join(
        [
            "change: ×, the second over the first; or + and -, their difference",
            "↑ ↓: certainly larger, smaller; without an arrow they may be equal",
            *meanings(marks),
        ]
    )
