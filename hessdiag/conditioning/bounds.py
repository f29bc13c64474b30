"""Spectral fields where not all eigenvalues are known: bounds, unresolved, absent, zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hessdiag.quantity import Quantity
from hessdiag.run import QUANTILES, THRESHOLDS, Value

Array = NDArray[np.float64]

SCALARS = (
    *("lambda_max", "lambda_min", "lambda_min_positive", "kappa", "kappa_abs", "kappa_damped"),
    *("n_positive", "n_negative", "n_zero", "trace", "frobenius", "stable_rank"),
    *("negative_count", "negative_mass", "negative_depth"),
)


@dataclass(frozen=True)
class RitzSpectrum:
    """Ritz values of a block with their residual bounds, from one Lanczos run.

    Attributes:
        value: Ascending, (k,).
        bound: Some eigenvalue lies within ``bound`` of each, (k,).
        rounding: Absolute error of the products and of the Ritz values.
        tolerance: τ.
    """

    value: Array
    bound: Array
    rounding: float
    tolerance: float


def ritz_quantities(spectrum: RitzSpectrum, *, damping: float | None) -> dict[str, Value]:
    """What one Lanczos run certifies: bounds of both ends and of κ, all else unresolved.

    Source:
        Courant–Fischer for the ends; maths 1.6 (ii) for κ: a Ritz value with a residual below it
        proves a positive eigenvalue there, so the true κ is at least the ratio.
    """
    value, reach = spectrum.value, spectrum.bound + spectrum.rounding
    top, bottom = float(value[-1]) - spectrum.rounding, float(value[0]) + spectrum.rounding
    fields = unresolved_quantities()
    fields["lambda_max"] = Quantity.lower_bound(top)
    fields["lambda_min"] = Quantity.upper_bound(bottom)
    proven = (value + reach)[value - reach > spectrum.tolerance]
    if proven.size and top > 0:
        fields["lambda_min_positive"] = Quantity.upper_bound(float(proven.min()))
        fields["kappa"] = Quantity.lower_bound(max(top / float(proven.min()), 1.0))
    size = np.abs(value)
    proven = (size + reach)[size - reach > spectrum.tolerance]
    largest = max(top, -bottom)
    if proven.size and largest > 0:
        fields["kappa_abs"] = Quantity.lower_bound(max(largest / float(proven.min()), 1.0))
    if damping is None:
        fields["kappa_damped"] = Quantity.absent()
    return fields


def unresolved_quantities() -> dict[str, Value]:
    """Every spectral field, unresolved."""
    return _uniform(Quantity.unresolved()) | {
        "ambiguous": None,
        "margin_above": None,
        "margin_below": None,
    }


def absent_quantities() -> dict[str, Value]:
    """Every spectral field of a block that is skipped."""
    return unresolved_quantities() | _uniform(Quantity.absent())


def zero_quantities(size: int, damping: float | None) -> dict[str, Value]:
    """Every spectral field of a block whose matrix is zero."""
    nothing, zero = Quantity.exact(0.0), Quantity.zero()
    fields = _uniform(zero) | {"ambiguous": False, "margin_above": None, "margin_below": None}
    for name in ("lambda_max", "lambda_min", "trace", "frobenius", "negative_count"):
        fields[name] = nothing
    fields |= {"n_positive": nothing, "n_negative": nothing, "n_zero": Quantity.exact(size)}
    fields["kappa_damped"] = zero if damping is not None else Quantity.absent()
    return fields


def _uniform(quantity: Quantity) -> dict[str, Value]:
    fields: dict[str, Value] = dict.fromkeys(SCALARS, quantity)
    fields["kappa_quantile"] = dict.fromkeys(QUANTILES, quantity)
    for name in ("profile_n_positive", "profile_n_negative", "profile_kappa"):
        fields[name] = dict.fromkeys(THRESHOLDS, quantity)
    return fields


def never_exact(fields: Mapping[str, Value]) -> dict[str, Value]:
    """The same bounds with no claim of exactness: for products with a hidden narrower type."""

    def weaker(value: Value) -> Value:
        if isinstance(value, Quantity):
            return value.without_exactness()
        if isinstance(value, dict):
            return {
                key: part.without_exactness() if isinstance(part, Quantity) else part
                for key, part in value.items()
            }  # type: ignore[return-value]
        return value

    return {name: weaker(value) for name, value in fields.items()}
