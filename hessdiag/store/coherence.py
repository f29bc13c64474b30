"""What the arrays of H_e and of the cosines say about each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hessdiag.run import HiddenResult

BOUND_ROUNDING = 1e-3
RESOLVED = 1e6
ROUNDING = 1e-9
"""Of a cosine or a descending order, relative to one."""


def hidden_problems(found: HiddenResult) -> Iterator[str]:
    """Every way in which the numbers of one layer contradict each other."""
    hidden, neurons = found.hidden, found.neurons
    for name in ("row_norm", "column_norm", "singular_value"):
        if name in hidden and (hidden[name] < 0).any():
            yield f"{name} has negative entries"
    values = hidden.get("singular_value")
    if values is not None and (values[1:] > values[:-1] * (1 + ROUNDING)).any():
        yield "singular_value is not descending"
    cosine = hidden.get("bias_cosine")
    if cosine is not None and (np.abs(cosine) > 1 + ROUNDING).any():
        yield "bias_cosine has entries beyond 1"
    if "kappa" in hidden and hidden["kappa"] < 1 - ROUNDING:
        yield f"kappa is {float(hidden['kappa'])!r}, below 1"
    if values is not None and "rank" in hidden and hidden["rank"] > len(values):
        yield f"rank is {float(hidden['rank']):g} of {len(values)} singular values"
    if {"slack", "kappa_hidden"} <= neurons.keys():
        # Where κ(H_e) is large, rounding leaves no digit of bound and measure.
        told = neurons["kappa_hidden"] < RESOLVED
        if (neurons["slack"][told] < 1 - BOUND_ROUNDING).any():
            yield "slack has entries below 1, which no bound has"
    for name in ("s_positive", "s_negative", "s_zero"):
        if name in neurons and (neurons[name] < 0).any():
            yield f"{name} has negative entries"


def cosine_problems(cosines: Mapping[str, Any]) -> Iterator[str]:
    """Every way in which the cosines contradict each other; nothing where there are none."""
    if not cosines:
        return
    for stem in ("cosine", "row_norm"):
        for low, high in ((f"{stem}_low", stem), (stem, f"{stem}_high")):
            if (cosines[low] > cosines[high]).any():
                yield f"{low} exceeds {high}"
    if (np.diff(cosines["step"]) <= 0).any():
        yield "step does not ascend"
    valid = cosines["valid"]
    for name in ("cosine", "cosine_low", "cosine_high"):
        if (np.isnan(cosines[name]) == valid).any():
            yield f"{name} is not a number exactly where valid is 1"
        if (np.abs(cosines[name]) > 1).any():
            yield f"{name} has entries beyond 1"
    if valid[cosines["distance"] == 0].any():
        yield "an iterate that is p* itself has valid cosines"
    for name in ("distance", "row_norm_low", "gradient_rms", "quadratic_residual"):
        if (cosines[name] < 0).any():
            yield f"{name} has negative entries"
    share = cosines["fraction_above"]
    if ((share < 0) | (share > 1)).any():
        yield "fraction_above lies outside of 0 to 1"
