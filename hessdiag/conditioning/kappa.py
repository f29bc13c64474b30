"""Condition numbers of a block whose eigenvalues are all known, with their certificates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hessdiag.conditioning.moments import counts, moments, negative, profile
from hessdiag.conditioning.spectrum import ExactSpectrum, Inertia
from hessdiag.quantity import Quantity
from hessdiag.run import QUANTILES, Value


def exact_quantities(
    spectrum: ExactSpectrum, *, eps: float, damping: float | None
) -> dict[str, Value]:
    """Every spectral field of the contract for a block whose eigenvalues are all known.

    Args:
        spectrum: Of the block, weight decay included; not zero.
        eps: Unit roundoff of the products.
        damping: μ of ``kappa_damped``, or None.
    Source:
        maths 1.1 to 1.5; intervals are first-order images of the eigenvalues' error bounds.
    """
    inertia, size = spectrum.inertia, spectrum.value.size
    top, top_error = spectrum.top
    least, least_error = float(spectrum.value[0]), float(spectrum.error[0])
    fields: dict[str, Value] = {
        "lambda_max": Quantity.exact(top, top - top_error, top + top_error),
        "lambda_min": Quantity.exact(least, least - least_error, least + least_error),
        "lambda_min_positive": _smallest_positive(spectrum),
        "kappa": _kappa(spectrum),
        "kappa_abs": _kappa_abs(spectrum),
        "kappa_quantile": {q: _kappa_quantile(spectrum, float(q)) for q in QUANTILES},
        "kappa_damped": _kappa_damped(spectrum, damping),
        "ambiguous": inertia.ambiguous,
        "margin_above": inertia.margin_above,
        "margin_below": inertia.margin_below,
    }
    fields |= counts(inertia, size)
    fields |= moments(spectrum, eps)
    fields |= negative(spectrum)
    fields |= profile(spectrum)
    return fields


def rates(kappa: Quantity) -> dict[str, Value]:
    """Gradient descent's asymptotic rate and iterations per decade, from κ (maths 2.1)."""
    return {
        "gd_rate": kappa.increasing(lambda k: (k - 1) / (k + 1), most=1.0),
        "gd_iterations_per_decade": kappa.increasing(_iterations_per_decade),
    }


def _iterations_per_decade(kappa: float) -> float:
    return 0.0 if kappa <= 1 else math.log(10) / (2 * math.atanh(1 / kappa))


def _ratio(top: float, top_error: float, low: float, low_error: float) -> Quantity:
    """``top / low`` with both errors, both known to be positive."""
    if low - low_error <= 0 or top - top_error <= 0:
        return Quantity.unresolved()
    least = max((top - top_error) / (low + low_error), 1.0)
    return Quantity.exact(top / low, min(least, top / low), (top + top_error) / (low - low_error))


def _resolved(spectrum: ExactSpectrum) -> bool:
    """Whether the raw eigenvalues show exactly the positive ones that the inertia counts."""
    seen = int((spectrum.value > spectrum.tolerance).sum())
    return not spectrum.inertia.ambiguous and seen == spectrum.inertia.positive


def _nothing_positive(inertia: Inertia) -> Quantity:
    """For a count of zero: there is no such quantity, unless the count is in doubt."""
    return Quantity.absent() if inertia.positive_high == 0 else Quantity.unresolved()


def _kappa(spectrum: ExactSpectrum) -> Quantity:
    if spectrum.inertia.positive == 0:
        return _nothing_positive(spectrum.inertia)
    top, top_error = spectrum.top
    positive = np.flatnonzero(spectrum.value > spectrum.tolerance)
    if positive.size == 0:
        return Quantity.unresolved()
    least = positive[0]
    if _resolved(spectrum):
        return _ratio(top, top_error, float(spectrum.value[least]), float(spectrum.error[least]))
    # Fewer than counted: one more lies at τ or below. As many or more: the least that was seen
    # is positive beyond rounding, and the true least is no larger.
    if positive.size < spectrum.inertia.positive_low:
        floor, slack = spectrum.tolerance, float(spectrum.error[least])
    else:
        floor, slack = float(spectrum.value[least]), float(spectrum.error[least])
    return Quantity.lower_bound(max((top - top_error) / (floor + slack), 1.0))


def _smallest_positive(spectrum: ExactSpectrum) -> Quantity:
    if spectrum.inertia.positive == 0:
        return _nothing_positive(spectrum.inertia)
    positive = np.flatnonzero(spectrum.value > spectrum.tolerance)
    if positive.size == 0:
        return Quantity.unresolved()
    value, error = float(spectrum.value[positive[0]]), float(spectrum.error[positive[0]])
    if _resolved(spectrum):
        return Quantity.exact(value, value - error, value + error)
    if positive.size < spectrum.inertia.positive_low:
        return Quantity.upper_bound(spectrum.tolerance + error)
    return Quantity.upper_bound(value + error)


def _kappa_abs(spectrum: ExactSpectrum) -> Quantity:
    order = np.argsort(np.abs(spectrum.value))
    size, error = np.abs(spectrum.value)[order], spectrum.error[order]
    nonzero = np.flatnonzero(size > spectrum.tolerance)
    if nonzero.size == 0:
        return Quantity.unresolved()
    inertia = spectrum.inertia
    least = nonzero[0]
    counted = inertia.positive + inertia.negative
    if not inertia.ambiguous and nonzero.size == counted:
        return _ratio(float(size[-1]), float(error[-1]), float(size[least]), float(error[least]))
    certain = inertia.positive_low + inertia.negative_low
    floor = spectrum.tolerance if nonzero.size < certain else float(size[least])
    bound = (float(size[-1]) - float(error[-1])) / (floor + float(error[least]))
    return Quantity.lower_bound(max(bound, 1.0))


def _kappa_quantile(spectrum: ExactSpectrum, quantile: float) -> Quantity:
    """``l_1 / l_(k)``, k = ⌈q n₊⌉; where the count is ambiguous the interval spans its range."""
    inertia = spectrum.inertia
    if inertia.positive == 0:
        return _nothing_positive(inertia)
    top, top_error = spectrum.top
    descending, errors = spectrum.value[::-1], spectrum.error[::-1]

    def at(count: int) -> Quantity:
        k = min(max(math.ceil(quantile * count), 1), descending.size) - 1
        if descending[k] <= spectrum.tolerance:
            bound = (top - top_error) / (spectrum.tolerance + float(errors[k]))
            return (
                Quantity.lower_bound(max(bound, 1.0)) if top > top_error else Quantity.unresolved()
            )
        return _ratio(top, top_error, float(descending[k]), float(errors[k]))

    middle = at(inertia.positive)
    if middle.status != "exact" or not inertia.ambiguous:
        return middle
    least, most = at(inertia.positive_low), at(inertia.positive_high)
    if middle.value is None or least.low is None:
        return Quantity.unresolved()
    if most.high is None:
        return Quantity.lower_bound(least.low)
    return Quantity.exact(middle.value, least.low, most.high)


def _kappa_damped(spectrum: ExactSpectrum, damping: float | None) -> Quantity:
    if damping is None:
        return Quantity.absent()
    size = np.abs(spectrum.value)
    large, small = int(np.argmax(size)), int(np.argmin(size))
    low, error = float(size[small]), float(spectrum.error[small])
    top, top_error = float(size[large]), float(spectrum.error[large])
    below = max(low - error, 0.0) + damping
    if below <= 0:
        return Quantity.lower_bound((top - top_error) / (low + error + damping))
    return Quantity.exact(
        (top + damping) / (low + damping) if low + damping > 0 else math.inf,
        (top - top_error + damping) / (low + error + damping),
        (top + top_error + damping) / below,
    )


def stored_inertia(row: Mapping[str, Any]) -> Inertia | None:
    """The signs that the row of raw counted, or None where it counted none for certain."""
    positive, negative = row["n_positive"], row["n_negative"]
    ends = (
        *(positive.value, negative.value, positive.low, positive.high),
        *(negative.low, negative.high),
    )
    if any(end is None for end in ends):
        return None
    return Inertia(
        positive=round(positive.value),
        negative=round(negative.value),
        positive_low=round(positive.low),
        positive_high=round(positive.high),
        negative_low=round(negative.low),
        negative_high=round(negative.high),
        margin_above=row["margin_above"],
        margin_below=row["margin_below"],
        ambiguous=bool(row["ambiguous"]),
    )
