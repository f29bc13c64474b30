"""Why the worst layers are ill-conditioned: a sentence for each, from the run's own numbers."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hessdiag.comparison import CERTAIN, certain_sign, difference
from hessdiag.plain import printable
from hessdiag.quantity import Quantity
from hessdiag.run import Run, VariantResult
from hessdiag.tables.columns import HEADLINE
from hessdiag.tables.grid import number
from hessdiag.tables.labels import shortened
from hessdiag.tables.lines import TIED
from hessdiag.tables.marks import certified, near_one
from hessdiag.variants.grammar import RAW
from hessdiag.verdict import WHOLE

Array = NDArray[np.float64]
FOLDED = ("bnp", "standardize")
"""Variants that standardise the inputs of a layer; the first that the run has is told."""
NAME_WIDTH = 40


def hidden_sentences(run: Run, limit: int = 3) -> list[str]:
    """Why the worst layers are ill-conditioned: one sentence each, worst first.

    Layers rank by κ of their raw block at its median positive eigenvalue, by κ where that is
    unresolved. What another variant would do is told from the run's own numbers, as certified.
    """
    raw = {result.layer for result in run.hidden.get(RAW, ())}
    ranks = {}
    for block in run.blocks:
        result = block.variants.get(RAW)
        if block.name in raw and block.name != WHOLE and result is not None:
            rank = _rank(result)
            if rank is not None:
                ranks[block.name] = rank
    worst = sorted(ranks, key=ranks.__getitem__, reverse=True)[:limit]
    sentences = ((name, layer_sentence(run, name)) for name in worst)
    return [
        f"{shortened([printable(name)], NAME_WIDTH)[0]}: {sentence}"
        for name, sentence in sentences
        if sentence
    ]


def _rank(result: VariantResult) -> float | None:
    median: Quantity = result["kappa_quantile"][HEADLINE]
    kappa: Quantity = result["kappa"]
    return kappa.low if median.value is None else median.value


def layer_sentence(run: Run, layer: str) -> str | None:
    """What spreads the rows of H_e, and what standardising does to the block's κ, if known."""
    raw = next((r for r in run.hidden.get(RAW, ()) if r.layer == layer), None)
    if raw is None:
        return None
    told = f"row norms of H_e span {number(span(raw.hidden['row_norm']), 2)}"
    block = next((block for block in run.blocks if block.name == layer), None)
    if block is None or RAW not in block.variants or block.variants[RAW]["skipped"] is not None:
        return told
    for variant in FOLDED:
        result = block.variants.get(variant)
        if result is not None and result["skipped"] is None:
            return f"{told}; {_effect(block.variants[RAW], result, variant)}"
    return told


def _effect(raw: VariantResult, folded: VariantResult, variant: str) -> str:
    pairs = {
        "κ": (raw["kappa"], folded["kappa"]),
        "κ at the median λ": (raw["kappa_quantile"][HEADLINE], folded["kappa_quantile"][HEADLINE]),
    }
    known = [
        name
        for name, pair in pairs.items()
        if all(q.status in ("exact", "interval") and (q.confidence or 0) >= CERTAIN for q in pair)
    ]
    name = known[0] if known else "κ at the median λ"
    before, after = pairs[name]
    how = f"standardising the inputs ({variant})"
    if before.value is None or after.value is None:
        return f"what {how} would do to κ is unresolved"
    numbers = f"{name} from{TIED}{_tied(before)} to{TIED}{_tied(after)}"
    match certain_sign(difference(before, after)):
        case -1:
            return f"{how} would lower {numbers}"
        case 1:
            return f"{how} would not help: it would raise {numbers}"
    return f"{how} would take {numbers}, which is not certain to be lower"


def _tied(quantity: Quantity) -> str:
    mark = certified(quantity, form=near_one)
    return mark.text if mark.kind == "=" else str(mark).replace(" ", TIED)


def span(norms: Array) -> float:
    """The largest over the smallest norm that is not zero."""
    live = norms[norms > 0]
    return float(live.max() / live.min()) if live.size else math.nan
