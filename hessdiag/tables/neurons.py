"""The neurons of a layer in print: theorem 3, its bound and what the bound gives away."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from hessdiag.plain import printable
from hessdiag.tables.grid import grid, number
from hessdiag.tables.labels import shortened
from hessdiag.tables.lines import wrapped
from hessdiag.tables.marks import percent

Array = NDArray[np.float64]
NAME_WIDTH = 20
THEOREM = (
    "Neurons: none taken apart. Theorem 3 (H = H_e S H_eᵀ) is for Linear layers of moderate size "
    "whose weights each sample uses once, where samples do not interact."
)
NEURON_LEGEND = (
    "κ: of H_e S H_eᵀ, each neuron's own Hessian",
    "slack: κ(H_e)² κ(S) / κ, where S > 0 and H_e has full row rank",
    "S: curvature of the loss in the pre-activation, sample by sample",
)


def neuron_lines(neurons: Mapping[str, Mapping[str, Array]], width: int) -> list[Text]:
    """By variant, what theorem 3 says of the layer's neurons.

    Args:
        neurons: By variant, the ``neurons`` of its :class:`hessdiag.run.HiddenResult`; none where
            all are empty.
        width: Columns of the terminal.
    """
    known = {name: arrays for name, arrays in neurons.items() if arrays}
    if not known:
        return wrapped(THEOREM, width)
    return [*_neurons(known), Text(), *wrapped(_inertia(next(iter(known.values()))), width)]


def _neurons(neurons: Mapping[str, Mapping[str, Array]]) -> list[Text]:
    header = [
        ("", "neurons"),
        ("κ", "median"),
        ("κ", "worst"),
        ("κ(S)", "median"),
        ("slack", "median"),
        ("slack", "worst"),
        ("with a", "bound"),
    ]
    rows = []
    for name, arrays in neurons.items():
        slack = arrays["slack"]
        bounded = int(np.isfinite(arrays["bound"]).sum())
        rows.append(
            [
                shortened([printable(name)], NAME_WIDTH)[0],
                number(_median(arrays["kappa_hessian"])),
                number(_largest(arrays["kappa_hessian"])),
                number(_median(arrays["kappa_s"])),
                number(_median(slack)),
                number(_largest(slack)),
                f"{bounded} of {len(slack)}",
            ]
        )
    return grid(header, rows)


def _median(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else math.nan


def _largest(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else math.nan


def _inertia(arrays: Mapping[str, Array]) -> str:
    signs = [float(arrays[name].sum()) for name in ("s_positive", "s_negative", "s_zero")]
    total = sum(signs) or 1.0
    shares = [percent(sign / total, ROUND_HALF_EVEN) for sign in signs]
    mixed = int((arrays["s_negative"] > 0).sum())
    idle = int((arrays["s_positive"] + arrays["s_negative"] == 0).sum())
    text = (
        f"S over all neurons and samples: {shares[0]} positive, {shares[1]} negative, "
        f"{shares[2]} zero"
    )
    if mixed:
        text += f"; neurons with negative entries: {mixed} of {len(arrays['s_negative'])}"
    if idle:
        text += f"; inactive neurons: {idle}"
    return f"{text}."
