"""What a reader must know beside the numbers: notes, origins, symmetries, reasons, warnings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rich.text import Text

from hessdiag.plain import printable
from hessdiag.quantity import Quantity
from hessdiag.run import Run, VariantResult
from hessdiag.shard import shard_sentence
from hessdiag.tables.labels import some_of
from hessdiag.tables.lines import brief, wrapped
from hessdiag.tables.marks import certified, times
from hessdiag.variants.grammar import RAW
from hessdiag.verdict import WHOLE, solved

LONGEST_NAME = 100
BRIEF_NAME = 24
NAMES_SHOWN = 4
NOTES_SHOWN = 6
REASONS_SHOWN = 8
MISSING = "no result"
SOURCES = {
    "state": "the stored state",
    "iterates": "gradients at the iterates",
    "minibatches": "gradients of mini-batches",
    "hessian": "the Hessian",
    "activations": "the activations",
}
"""What a preconditioner was made from, in words."""
Results = Mapping[str, VariantResult]


def remark_lines(run: Run, results: Results, width: int, more: Iterable[str] = ()) -> list[Text]:
    """Notes with the blocks that they are about, ``more``, then the warnings of the whole run."""
    remarks = _limited([f"{some}: {note}" for note, some in _owners(results, "notes")])
    # What is symmetric in a layer is so in the network: whole is named where it is alone.
    layers = {name: result for name, result in results.items() if name != WHOLE}
    found = dict([*_owners(results, "symmetries"), *_owners(layers, "symmetries")])
    symmetries = _limited([f"{name} ({some})" for name, some in found.items()], "symmetries")
    if symmetries:
        remarks.append(f"symmetries: {'; '.join(symmetries)}")
    remarks += more
    halves = [result["half_ratio"].value for result in results.values()]
    ratios = [max(ratio, 1 / ratio) for ratio in halves if ratio]
    if ratios:
        remarks.append(
            f"subset: between its halves λ_max differs by a factor of up to {max(ratios):.2f}"
        )
    told = shard_sentence(run)
    remarks += [told] if told and run.blocks else []
    remarks += [f"Warning: {printable(warning)}" for warning in run.provenance.warnings]
    lines = [line for remark in remarks for line in wrapped(f"- {remark}", width, indent="  ")]
    return [Text(), *lines] if lines else []


def variant_remarks(results: Results) -> Iterator[str]:
    """Of one variant: what its coordinates were made from, and what they do."""
    origin = _origin(results)
    if origin:
        yield f"coordinates from {origin}"
    turned = {n: r["off_diagonality"] for n, r in results.items() if r["off_diagonality"]}
    if turned:
        shown = {n: f"{share['before']:.3g} → {share['after']:.3g}" for n, share in turned.items()}
        yield f"off-diagonal share of ‖H‖_F, before and after the rotation: {_by_block(shown)}"
    gaps: dict[str, Quantity] = {n: r["diagonal_gap"] for n, r in results.items()}
    known = {n: str(certified(gap, 3, times)) for n, gap in gaps.items() if gap.value is not None}
    if known:
        yield f"another diagonal could lower κ further, at most by: {_by_block(known)}"
    losses = [r["loss"] for r in results.values() if solved(r) and not r["same_function"]]
    if losses:
        yield f"another function than the original's, with a loss of its own: {losses[-1]:.4g}"


def comparison_remarks(run: Run) -> Iterator[str]:
    """Of all variants but raw: where their coordinates come from, and why some are missing."""
    origins: dict[str, list[str]] = {}
    for variant in run.variants:
        origin = "" if variant == RAW else _origin(_of(run, variant))
        if origin:
            origins.setdefault(origin, []).append(printable(variant))
    for origin, variants in origins.items():
        yield f"{', '.join(variants)}: from {origin}"
    yield from _limited([*_skipped(run)], "reasons", REASONS_SHOWN)


def _of(run: Run, variant: str) -> dict[str, VariantResult]:
    return {b.name: b.variants[variant] for b in run.blocks if variant in b.variants}


def _origin(results: Results) -> str:
    """Whose M it is, what it was made from, and how much of its state is zero."""
    done = [result for result in results.values() if solved(result)]
    sources = dict.fromkeys(result["source"] for result in done if result["source"])
    if not sources:
        return ""
    classes = dict.fromkeys(r["optimizer_class"] for r in done if r["optimizer_class"])
    origin = " and ".join(SOURCES.get(source, printable(source)) for source in sources)
    if classes:
        origin += f" ({' and '.join(printable(name) for name in classes)})"
    whole = results.get(WHOLE)
    counted = [whole] if solved(whole) else done
    zero = sum(result["zero_state"] or 0 for result in counted)
    return f"{origin}; v = 0 for {zero:,} parameters" if zero else origin


def _skipped(run: Run) -> Iterator[str]:
    """Each reason once, with the variants and blocks that it is about; raw's table says its own."""
    owners: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    compared = [b for b in run.blocks if any(map(solved, b.variants.values()))]
    everywhere = tuple(block.name for block in compared)
    for variant in run.variants:
        reasons: dict[str, list[str]] = {}
        for block in compared:
            result = block.variants.get(variant)
            if variant != RAW and not solved(result):
                reason = MISSING if result is None else brief(result["skipped"])
                reasons.setdefault(reason, []).append(block.name)
        for reason, names in reasons.items():
            owners.setdefault((reason, tuple(names)), []).append(printable(variant))
    for (reason, blocks), variants in owners.items():
        where = "all blocks" if blocks == everywhere else some_of(blocks, NAMES_SHOWN, BRIEF_NAME)
        if reason == MISSING:
            yield f"{', '.join(variants)}: {MISSING} on {where}"
        else:
            yield f"{', '.join(variants)} skipped on {where}: {reason}"


def _owners(results: Results, field: str) -> Iterator[tuple[str, str]]:
    """Each text of a field with the blocks that it is about."""
    owners: dict[str, list[str]] = {}
    for name, result in results.items():
        for text in result[field]:
            owners.setdefault(brief(text), []).append(name)
    for text, names in owners.items():
        yield text, some_of(names, NAMES_SHOWN, LONGEST_NAME)


def _by_block(shown: Mapping[str, str]) -> str:
    parts = [f"{printable(name)} {text}" for name, text in [*shown.items()][:NOTES_SHOWN]]
    left = len(shown) - NOTES_SHOWN
    return ", ".join(parts) + (f" and {left} more" if left > 0 else "")


def _limited(remarks: list[str], of: str = "notes", most: int = NOTES_SHOWN) -> list[str]:
    if len(remarks) <= most:
        return remarks
    return [*remarks[:most], f"{len(remarks) - most} more {of}: hessdiag show RUN --json"]
