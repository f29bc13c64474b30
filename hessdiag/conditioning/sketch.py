"""Trace, norms and rows of a block from its random probes, as the fields of its row."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hessdiag.conditioning.bounds import RitzSpectrum
from hessdiag.quantity import Quantity
from hessdiag.run import Value
from hessdiag_probes.hutchinson import Estimates, Moments

Array = NDArray[np.float64]
RELATIVE = 1e-12  # rounding of the sums over probes and over the Krylov basis


def sketch_quantities(moments: Moments, spectrum: RitzSpectrum, noise: float) -> dict[str, Value]:
    """``trace``, ``frobenius`` and ``stable_rank``, each with its interval.

    Args:
        moments: From probes that are independent of ``spectrum``.
        spectrum: What is known of ‖H‖.
        noise: Bound on the rounding error of either sum.
    Returns:
        Intervals at the confidence of the probes; that of the stable rank also needs the ends of
        the spectrum to be where they should be, and is so much less sure.
    """
    size = moments.row_norm.value.numel()
    low, high = spectrum.norm
    trace, frobenius = moments.trace, moments.frobenius
    slack = noise + RELATIVE * max(abs(trace.low), abs(trace.high))
    least = max(frobenius.low * (1 - RELATIVE) - noise, low)
    most = max(frobenius.high * (1 + RELATIVE) + noise, least)
    value = min(max(frobenius.value, least), most)
    fields: dict[str, Value] = {
        "trace": Quantity.interval(
            trace.value, trace.low - slack, trace.high + slack, moments.confidence
        ),
        "frobenius": Quantity.interval(value, least, most, moments.confidence),
    }
    if low > 0:
        rank = [min(max((f / n) ** 2, 1.0), size) for f, n in ((least, high), (most, low))]
        middle = min(max((value / math.sqrt(low * high)) ** 2, rank[0]), rank[1])
        sure = moments.confidence - 2 * spectrum.failure
        fields["stable_rank"] = Quantity.interval(middle, rank[0], rank[1], sure)
    return fields


def row_arrays(moments: Moments, slack: Array) -> dict[str, Array]:
    """Row norms and diagonal with the ends of their intervals, widened by each row's rounding."""
    norm = _widened(moments.row_norm, slack)
    norm[1] = np.maximum(norm[1], 0.0)
    arrays = dict(zip(("norm", "norm_low", "norm_high"), norm, strict=True))
    diagonal = _widened(moments.diagonal, slack)
    return arrays | dict(zip(("diagonal", "diagonal_low", "diagonal_high"), diagonal, strict=True))


def _widened(found: Estimates, slack: Array) -> list[Array]:
    value, low, high = (
        part.cpu().numpy().astype(np.float64) for part in (found.value, found.low, found.high)
    )
    slack = slack + RELATIVE * np.maximum(np.abs(low), np.abs(high))
    return [value, low - slack, high + slack]
