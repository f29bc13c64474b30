"""Synthetic runs of several variants, whose verdict is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hessdiag.quantity import Quantity
from hessdiag.run import HORIZONS, QUANTILES, BlockResult, Run, VariantResult
from sample_runs import run, skipped_values, values


def result(
    median: Quantity | float | None = None, gain: Quantity | float | None = None, **known: Any
) -> VariantResult:
    """An exact block with this κ at the median and this forecast; numbers are exact."""
    if median is not None:
        known["kappa_quantile"] = dict.fromkeys(QUANTILES, _quantity(median))
    if gain is not None:
        known["forecast_positive"] = dict.fromkeys(HORIZONS, _quantity(gain))
    return VariantResult(values(4, **known))


def skipped(reason: str) -> VariantResult:
    """A pair without numbers."""
    return VariantResult(skipped_values(reason, 4))


def compared(
    blocks: Mapping[str, Mapping[str, VariantResult]], variants: Sequence[str] | None = None
) -> Run:
    """A run of these results, by block and variant."""
    rows = tuple(BlockResult(name, (f"{name}.weight",), found) for name, found in blocks.items())
    every = dict.fromkeys(variant for found in blocks.values() for variant in found)
    return run(rows, tuple(variants or every))


def large_run(blocks: int, variants: Sequence[str], prefix: str = "model.layers.") -> Run:
    """Many blocks and variants with numbers of every kind, some skipped, and ``whole``."""
    rows: dict[str, dict[str, VariantResult]] = {}
    for b in range(blocks):
        name = f"{prefix}{b // 4}.{('attention.q_proj', 'attention.out', 'mlp.up', 'norm')[b % 4]}"
        rows[name] = {key: _pair(b, v, key) for v, key in enumerate(variants)}
    rows["whole"] = {
        key: result(
            Quantity.unresolved(),
            Quantity.estimate(1e-3 * (v + 1)),
            kappa=Quantity.lower_bound(10.0 ** (9 - v)),
            same_function=key not in {"ln", "gn"},
        )
        for v, key in enumerate(variants)
    }
    return compared(rows, variants)


def _pair(block: int, variant: int, key: str) -> VariantResult:
    if key == "bnp" and block % 4 == 3:
        return skipped("a LayerNorm has no inputs of its own to normalise")
    if key == "optimal" and block % 2:
        return skipped("the block is not positive definite; try jacobi or ruiz")
    height = 10.0 ** (7 - variant / 2 + math.sin(block))
    kappa = (Quantity.exact(height), Quantity.lower_bound(height))[block % 2]
    return result(
        Quantity.exact(height / 300 * (1 + block % 3)),
        Quantity.exact(1e-4 * (1 + variant) * (1 + math.cos(block + variant)) + 1e-5),
        kappa=kappa,
        ambiguous=bool(block % 2),
        same_function=key not in {"ln", "gn"},
        loss=0.01 if key in {"ln", "gn"} else 0.0017,
        source={"optimizer": "state", "bnp": "activations"}.get(key),
        optimizer_class="torch.optim.AdamW" if key == "optimizer" else None,
        zero_state=block if key == "optimizer" else 0,
        symmetries=["softmax shift"] if block == 2 and key == "raw" else [],
    )


def _quantity(number: Quantity | float) -> Quantity:
    return number if isinstance(number, Quantity) else Quantity.exact(number)
