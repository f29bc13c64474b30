"""Results in, text out: the tables that the commands print."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from rich.cells import cell_len
from rich.text import Text

from hessdiag.plain import printable
from hessdiag.quantity import Quantity
from hessdiag.run import BlockResult, Run, VariantResult
from hessdiag.shard import shard_sentence
from hessdiag.tables.columns import COLUMNS, GAP, HEADLINE, TERMS, Layout, aligned, layout
from hessdiag.tables.cosines import cosine_sentences
from hessdiag.tables.labels import shortened, some_of
from hessdiag.tables.lines import TIED, brief, printed, wrapped
from hessdiag.tables.marks import MEANINGS, certified, meanings
from hessdiag.tables.reasons import hidden_sentences
from hessdiag.tables.remarks import (
    LONGEST_NAME,
    NAMES_SHOWN,
    comparison_remarks,
    remark_lines,
    variant_remarks,
)
from hessdiag.tables.variants import beside, variant_legend, variant_lines
from hessdiag.tables.verdict import verdict_sentence
from hessdiag.variants.grammar import RAW
from hessdiag.verdict import WHOLE, solved

__all__ = ["WHOLE", "run_title", "summary_table", "worst_block"]


def summary_table(
    run: Run, *, variant: str | None = None, width: int = 100, color: bool = False
) -> str:
    """The table of a run under one variant, and what a reader must know about it.

    Args:
        run: A finished analysis.
        variant: One of ``run.variants``; by default raw, and then, where there are several, all
            variants side by side with the verdict.
        width: Columns of the terminal; below about 70 the lines may run over.
        color: Use ANSI colours; without, the text is plain.

    Returns:
        Lines, each ended by a newline.
    """
    shown = RAW if variant is None else variant
    results = {b.name: b.variants[shown] for b in run.blocks if shown in b.variants}
    done = {name: result for name, result in results.items() if solved(result)}
    lines = [*wrapped(run_title(run, shown, done.values()), width, "bold"), Text()]
    legend: list[str] = []
    if run.blocks:
        fitted = layout(run, done, width)
        lines += [*_table(run, fitted, done, shown, width), Text()]
        lines += wrapped(_worst_sentence(done), width, "bold")
        legend = _legend(fitted)
        lines += wrapped(" · ".join(legend), width, "dim")
    else:
        reason = shard_sentence(run) or "There is no block: the model has no parameter."
        lines += wrapped(reason, width)
    more = [] if shown == RAW else [*variant_remarks(results)]
    if variant is None:
        if len(run.variants) > 1:
            lines += [Text(), *_comparison(run, legend, width)]
            more = [*comparison_remarks(run)]
        more = [*hidden_sentences(run), *cosine_sentences(run), *more]
    lines += remark_lines(run, results, width, more)
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
        f"shard {config['shard']}" if config.get("shard") else None,
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
    first, *rest = textwrap.wrap(f"skipped: {brief(reason)}", max(width - indent, 20))
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
        other
        for other, row in done.items()
        if other not in {worst, WHOLE} and row["kappa_quantile"][HEADLINE].status == "unresolved"
    ]
    if bounded:
        some = some_of(bounded, NAMES_SHOWN, LONGEST_NAME)
        sentence += f" {some}: known by bounds only, and may be worse."
    return sentence


def _phrase(subject: str, quantity: Quantity) -> str:
    mark = certified(quantity)
    if mark.kind == "[]":
        return f"{subject} in{TIED}{str(mark).replace(' ', TIED)}"
    if mark.kind in {"=", "≥", "≤", "~"}:
        return f"{subject}{TIED}{str(mark).replace(' ', TIED)}"
    return f"{subject} {MEANINGS[mark.kind]}"


def _comparison(run: Run, legend: Sequence[str], width: int) -> list[Text]:
    """All variants side by side, the verdict, and what the first ``legend`` has not said."""
    table = beside(run)
    if not table.rows:
        return []
    lines, marks = variant_lines(table, width)
    lines += wrapped(verdict_sentence(table.verdict), width, "bold")
    parts = [part for part in variant_legend(table, marks) if part not in legend]
    return [*lines, *wrapped(" · ".join(parts), width, "dim")]


def _legend(fitted: Layout) -> list[str]:
    marks = [mark for _, _, cells in fitted.columns for mark in cells.values()]
    parts = meanings(marks)
    if any("!" in mark.tail for mark in marks):
        parts.append(f"!{TIED}eigenvalues at the zero tolerance: κ depends on it")
    shown = {column.key for column, _, _ in fitted.columns}
    terms = [term for key, term in TERMS.items() if key in shown]
    missing = [
        " ".join(column.header).strip() for column in COLUMNS if column.key in fitted.dropped
    ]
    if missing:
        terms.append(f"left out for width: {', '.join(missing)}".replace(" ", TIED))
    return [*terms, *parts]
