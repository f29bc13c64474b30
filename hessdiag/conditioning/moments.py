"""Counts, moments, negative curvature and the profile of a block's eigenvalues (maths 1.3–1.5)."""

from __future__ import annotations

import math

import numpy as np

from hessdiag.conditioning.spectrum import Array, ExactSpectrum, Inertia
from hessdiag.quantity import Quantity
from hessdiag.run import THRESHOLDS, Value


def _count(value: int, low: int, high: int) -> Quantity:
    return Quantity(value, min(low, value), max(high, value), "exact", 1.0)


def counts(inertia: Inertia, size: int) -> dict[str, Value]:
    """``n_positive``, ``n_negative`` and ``n_zero``, which sum to ``size``."""
    certain = inertia.positive_low + inertia.negative_low
    possible = inertia.positive_high + inertia.negative_high
    zero = size - inertia.positive - inertia.negative
    return {
        "n_positive": _count(inertia.positive, inertia.positive_low, inertia.positive_high),
        "n_negative": _count(inertia.negative, inertia.negative_low, inertia.negative_high),
        "n_zero": _count(zero, max(size - possible, 0), size - certain),
    }


def _over(top: float, bottom: float) -> float:
    """An upper end: infinite where errors leave nothing of the denominator."""
    return top / bottom if bottom > 0 else math.inf


def moments(spectrum: ExactSpectrum, eps: float) -> dict[str, Value]:
    """Trace, Frobenius norm and stable rank, by sums over the matrix rather than eigenvalues."""
    size = spectrum.value.size
    noise = 10 * spectrum.noise * math.sqrt(size)
    diagonal = spectrum.diagonal
    trace = float(diagonal.sum())
    trace_error = 2 * size * eps * float(np.abs(diagonal).sum()) + noise
    frobenius = spectrum.frobenius
    frobenius_error = 2 * size * eps * frobenius + noise
    norm, norm_error = spectrum.norm, spectrum.norm_error
    low = _over(max(frobenius - frobenius_error, 0.0), norm + norm_error)
    high = min(_over(frobenius + frobenius_error, norm - norm_error), math.sqrt(size))
    return {
        "trace": Quantity.exact(trace, trace - trace_error, trace + trace_error),
        "frobenius": Quantity.exact(
            frobenius, max(frobenius - frobenius_error, 0.0), frobenius + frobenius_error
        ),
        "stable_rank": Quantity.exact((frobenius / norm) ** 2, low**2, high**2),
    }


def negative(spectrum: ExactSpectrum) -> dict[str, Value]:
    """Share of the count, of the mass, and depth of the negative eigenvalues (maths 1.4)."""
    value, inertia, size = spectrum.value, spectrum.inertia, spectrum.value.size
    certain = value < -spectrum.tolerance
    total, total_error = float(np.abs(value).sum()), float(spectrum.error.sum())
    mass = float(np.abs(value[certain]).sum())
    mass_error = float(spectrum.error[certain].sum())
    null = np.abs(value) <= spectrum.tolerance
    unseen = 0.0 if spectrum.resolved else float((np.abs(value) + spectrum.error)[null].sum())
    depth = max(-float(value[0]), 0.0) if certain.any() else 0.0
    depth_error = float(spectrum.error[0]) if certain.any() else spectrum.tolerance
    norm, norm_error = spectrum.norm, spectrum.norm_error
    share = Quantity.exact(
        inertia.negative / size, inertia.negative_low / size, inertia.negative_high / size
    )
    return {
        "negative_count": share,
        "negative_mass": Quantity.exact(
            mass / total,
            max(mass - mass_error, 0.0) / (total + total_error),
            min(_over(mass + mass_error + unseen, total - total_error), 1.0),
        ),
        "negative_depth": Quantity.exact(
            depth / norm,
            max(depth - depth_error, 0.0) / (norm + norm_error),
            min(_over(depth + depth_error, norm - norm_error), 1.0),
        ),
    }


def profile(spectrum: ExactSpectrum) -> dict[str, Value]:
    """Counts and κ beyond t‖H‖ for each threshold t; unresolved where t‖H‖ is below τ."""
    positive: dict[str, Quantity] = {}
    negative: dict[str, Quantity] = {}
    kappa: dict[str, Quantity] = {}
    for name in THRESHOLDS:
        threshold = float(name) * spectrum.norm
        if threshold < spectrum.tolerance:
            positive[name] = negative[name] = kappa[name] = Quantity.unresolved()
            continue
        positive[name] = _count_beyond(spectrum.value, spectrum.error, threshold)
        negative[name] = _count_beyond(-spectrum.value, spectrum.error, threshold)
        kappa[name] = _kappa_at(spectrum, threshold)
    return {"profile_n_positive": positive, "profile_n_negative": negative, "profile_kappa": kappa}


def _count_beyond(value: Array, error: Array, threshold: float) -> Quantity:
    return _count(
        int((value > threshold).sum()),
        int((value - error > threshold).sum()),
        int((value + error > threshold).sum()),
    )


def _kappa_at(spectrum: ExactSpectrum, threshold: float) -> Quantity:
    value, error = spectrum.value, spectrum.error
    beyond = np.flatnonzero(value > threshold)
    if beyond.size == 0:
        return Quantity.absent()
    top, top_error = spectrum.top
    surely = np.flatnonzero(value - error > threshold)
    maybe = np.flatnonzero(value + error > threshold)
    upper = float(value[surely[0]] + error[surely[0]]) if surely.size else top
    lower = max(float(value[maybe[0]] - error[maybe[0]]), threshold)
    return Quantity.exact(
        top / float(value[beyond[0]]),
        max((top - top_error) / upper, 1.0),
        max((top + top_error) / lower, 1.0),
    )
