"""Results in, text out: the tables that the commands print."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping

from rich.cells import cell_len
from rich.text import Text

from hessdiag.plain import printable
from hessdiag.quantity import Quantity
from hessdiag.run import BlockResult, Run, VariantResult
from hessdiag.tables.columns import COLUMNS, GAP, HEADLINE, Layout, aligned, layout
from hessdiag.tables.labels import shortened
from hessdiag.tables.lines import TIED, printed, wrapped
from hessdiag.tables.marks import MEANINGS, certified

WHOLE = "whole"
LONGEST_NAME = 100
NAMES_SHOWN = 4
NOTES_SHOWN = 6
TERMS = {
    "kappa": "κ = λ_max / smallest λ > 0",
    "kappa_median": "at the median λ: λ_max / median λ > 0",
    "inactive": "inactive: zero rows of H",
    "mass": "mass: share of Σ|λ|",
    "gradient": "‖g‖: gradient norm",
    "forecast": "forecast: loss that 100 steps of gradient descent gain where λ > 0",
}
"""What the legend says of each column that needs a word."""


def summary_table(run: Run, *, variant: str = "raw", width: int = 100, color: bool = False) -> str:
    """The table of a run under one variant, and what a reader must know about it.

    Args:
        run: A finished analysis.
        variant: One of ``run.variants``.
        width: Columns of the terminal; below about 70 the lines may run over.
        color: Use ANSI colours; without, the text is plain.

    Returns:
        Lines, each ended by a newline.
    """
    results = {
        block.name: block.variants[variant] for block in run.blocks if variant in block.variants
    }
    done = {name: result for name, result in results.items() if result["skipped"] is None}
    lines = [*wrapped(run_title(run, variant, done.values()), width, "bold"), Text()]
    if run.blocks:
        fitted = layout(run, done, width)
        lines += [*_table(run, fitted, done, variant, width), Text()]
        lines += wrapped(_worst_sentence(done), width, "bold")
        lines += wrapped(_legend(fitted), width, "dim")
    else:
        lines += wrapped("There is no block: the model has no parameter.", width)
    lines += _remarks(run, results, width)
    return printed(lines, width, color=color)


def worst_block(results: Mapping[str, VariantResult]) -> str | None:
    """The block with the largest κ at the median; its κ's lower end where that is unresolved.

    ``whole`` is never the worst, for it holds all others, unless it is alone.
    """

    def rank(result: VariantResult) -> float | None:
        median: Quantity = result["kappa_quantile"][HEADLINE]
        kappa: Quantity = result["kappa"]
        return kappa.low if median.value is None else median.value

    names = [name for name in results if name != WHOLE] or list(results)
    ranks = {name: rank(results[name]) for name in names}
    ranked = {name: value for name, value in ranks.items() if value is not None}
    return max(ranked, key=ranked.__getitem__, default=None)


def run_title(run: Run, variant: str, done: Iterable[VariantResult]) -> str:
    """What was analysed, and how, on one line; ``done`` are its results."""
    config = run.provenance.config
    decay = config.get("weight_decay")
    results = list(done)
    losses = [result["loss"] for result in results if result["loss"] is not None]
    parts = [
        config.get("task"),
        config.get("checkpoint"),
        None if variant == "raw" else f"variant {variant}",
        config.get("curvature"),
        results[0]["dtype"] if results else None,
        config.get("device"),
        f"loss {losses[-1]:.4g}" if losses else None,
        "train mode" if config.get("mode") == "train" else None,
        f"weight decay {decay:g}" if isinstance(decay, int | float) and decay else None,
        f"{config['max_examples']} examples" if config.get("max_examples") else None,
    ]
    return " · ".join(printable(str(part)) for part in parts if part)


def _table(
    run: Run, fitted: Layout, done: Mapping[str, VariantResult], variant: str, width: int
) -> list[Text]:
    worst = worst_block(done)
    lines = []
    for position, corner in enumerate(("", "block")):
        cells = [column.header[position].rjust(shape.total) for column, shape, _ in fitted.columns]
        lines.append(Text(GAP.join([corner.ljust(fitted.name_width), *cells]), style="bold"))
    rule = Text("─" * fitted.width, style="dim")
    lines.append(rule)
    for block in sorted(run.blocks, key=lambda block: block.name == WHOLE):
        if block.name == WHOLE and len(run.blocks) > 1:
            lines.append(rule)
        label = fitted.labels[block.name]
        label += " " * (fitted.name_width - cell_len(label))
        if block.name not in done:
            lines += _skipped(block, variant, label, width)
            continue
        line = Text(label, style="bold" if block.name == worst else "")
        for column, shape, marks in fitted.columns:
            mark = marks[block.name]
            seen = column.style and mark.text not in {"0", "0%", "–"}
            line.append(GAP + aligned(mark, shape), style=column.style if seen else "")
        lines.append(line)
    return lines


def _skipped(block: BlockResult, variant: str, label: str, width: int) -> list[Text]:
    result = block.variants.get(variant)
    reason = f"no result under {variant}" if result is None else result["skipped"]
    indent = cell_len(label) + len(GAP)
    first, *rest = textwrap.wrap(f"skipped: {printable(reason)}", max(width - indent, 20))
    return [
        Text(label + GAP + first, style="dim"),
        *(Text(" " * indent + line, style="dim") for line in rest),
    ]


def _worst_sentence(done: Mapping[str, VariantResult]) -> str:
    worst = worst_block(done)
    if worst is None:
        return "No block has a condition number: no positive eigenvalue was resolved."
    result = done[worst]
    median = _phrase("κ at its median positive eigenvalue", result["kappa_quantile"][HEADLINE])
    name = shortened([printable(worst)], LONGEST_NAME)[0]
    sentence = f"The worst block is {name}: {median}, {_phrase('κ', result['kappa'])}."
    bounded = [
        printable(other)
        for other, row in done.items()
        if other not in {worst, WHOLE} and row["kappa_quantile"][HEADLINE].status == "unresolved"
    ]
    if bounded:
        some = ", ".join(shortened(bounded[:NAMES_SHOWN], LONGEST_NAME))
        rest = f" and {len(bounded) - NAMES_SHOWN} more" if len(bounded) > NAMES_SHOWN else ""
        sentence += f" {some}{rest}: known by bounds only, and may be worse."
    return sentence


def _phrase(subject: str, quantity: Quantity) -> str:
    mark = certified(quantity)
    if mark.kind == "[]":
        return f"{subject} in{TIED}{str(mark).replace(' ', TIED)}"
    if mark.kind in {"=", "≥", "≤", "~"}:
        return f"{subject}{TIED}{str(mark).replace(' ', TIED)}"
    return f"{subject} {MEANINGS[mark.kind]}"


def _legend(fitted: Layout) -> str:
    marks = [mark for _, _, cells in fitted.columns for mark in cells.values()]
    kinds = {mark.kind for mark in marks}
    parts = [f"{kind}{TIED}{meaning}" for kind, meaning in MEANINGS.items() if kind in kinds]
    if any("!" in mark.tail for mark in marks):
        parts.append("! eigenvalues at the zero tolerance: κ depends on it")
    shown = {column.key for column, _, _ in fitted.columns}
    terms = [term for key, term in TERMS.items() if key in shown]
    missing = [
        " ".join(column.header).strip() for column in COLUMNS if column.key in fitted.dropped
    ]
    if missing:
        terms.append(f"left out for width: {', '.join(missing)}".replace(" ", TIED))
    return " · ".join([*terms, *parts])


def _remarks(run: Run, results: Mapping[str, VariantResult], width: int) -> list[Text]:
    """Notes with the blocks that they are about, then the warnings of the whole run."""
    owners: dict[str, list[str]] = {}
    for name, result in results.items():
        for note in result["notes"]:
            owners.setdefault(printable(note), []).append(printable(name))
    remarks = []
    for note, names in owners.items():
        shown = ", ".join(shortened(names[:NAMES_SHOWN], LONGEST_NAME))
        rest = len(names) - NAMES_SHOWN
        remarks.append(f"{shown}{f' and {rest} more' if rest > 0 else ''}: {note}")
    halves = [result["half_ratio"].value for result in results.values()]
    ratios = [max(ratio, 1 / ratio) for ratio in halves if ratio]
    if ratios:
        remarks.append(
            f"subset: between its halves λ_max differs by a factor of up to {max(ratios):.2f}"
        )
    left = len(remarks) - NOTES_SHOWN
    if left > 0:
        remarks[NOTES_SHOWN:] = [f"{left} more notes: hessdiag show RUN --json"]
    remarks += [f"Warning: {printable(warning)}" for warning in run.provenance.warnings]
    lines = [line for remark in remarks for line in wrapped(f"- {remark}", width, indent="  ")]
    return [Text(), *lines] if lines else []
