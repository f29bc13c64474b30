"""Spectral fields where not all eigenvalues are known: bounds, unresolved, absent, zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hessdiag.quantity import Quantity
from hessdiag.run import QUANTILES, THRESHOLDS, Value

Array = NDArray[np.float64]
TINY = float(np.finfo(np.float64).tiny)

SCALARS = (
    *("lambda_max", "lambda_min", "lambda_min_positive", "kappa", "kappa_abs", "kappa_damped"),
    *("n_positive", "n_negative", "n_zero", "trace", "frobenius", "stable_rank"),
    *("negative_count", "negative_mass", "negative_depth"),
)


@dataclass(frozen=True)
class RitzSpectrum:
    """Ritz values of a block with their residual bounds, and how far the spectrum may reach.

    Attributes:
        value: Ascending, (k,): Rayleigh quotients, so the spectrum reaches at least so far.
        bound: Some eigenvalue lies within ``bound`` of each, (k,).
        low: No eigenvalue lies below, with a probability of ``1 - failure``.
        high: No eigenvalue lies above, with the same.
        failure: Of each of the two; both hold with ``1 - 2 failure``.
        rounding: Absolute error of the products and of the Ritz values.
        tolerance: τ.
        floor: No eigenvalue lies below, by structure (Gauss–Newton of a convex loss, plus weight
            decay); None where nothing is known.
    """

    value: Array
    bound: Array
    low: float
    high: float
    failure: float
    rounding: float
    tolerance: float
    floor: float | None = None

    @property
    def top(self) -> Quantity:
        """λ_max."""
        value = float(self.value[-1])
        return self._interval(value, value - self.rounding, self.high + self.rounding)

    @property
    def bottom(self) -> Quantity:
        """λ_min."""
        value = float(self.value[0])
        low, high = self.low - self.rounding, value + self.rounding
        if self.floor is None:
            return self._interval(value, low, high)
        return self._interval(max(value, self.floor), max(low, self.floor), max(high, self.floor))

    @property
    def norm(self) -> tuple[float, float]:
        """‖H‖ from inside and from outside; the latter with ``1 - 2 failure``."""
        low = max(float(self.value[-1]), -float(self.value[0]), 0.0) - self.rounding
        return max(low, 0.0), max(self.high, -end_of(self.bottom.low)) + self.rounding

    @property
    def positive_floor(self) -> tuple[float, float] | None:
        """What λ_min certainly reaches, and the confidence; None unless that is positive."""
        if self.floor is not None and self.floor > 0:
            return self.floor, 1.0
        low = self.low - self.rounding
        return (low, 1.0 - self.failure) if low > self.tolerance else None

    def _interval(self, value: float, low: float, high: float) -> Quantity:
        return Quantity.interval(value, low, high, 1.0 - self.failure)


def ritz_quantities(
    spectrum: RitzSpectrum, size: int, *, damping: float | None
) -> dict[str, Value]:
    """What the ends of a spectrum and its Ritz pairs certify; all else unresolved.

    Source:
        maths 1.6: Courant–Fischer from inside, the polynomial bound from outside. κ by (ii): a
        Ritz value with a residual below it proves a positive eigenvalue there, so κ is at least
        the ratio; of a positive definite matrix the ratio of the ends themselves bounds κ, and a
        floor under λ_min from above.
    """
    top, bottom = spectrum.top, spectrum.bottom
    fields = unresolved_quantities()
    fields |= {"lambda_max": top, "lambda_min": bottom}
    fields |= _negative(spectrum)
    if damping is None:
        fields["kappa_damped"] = Quantity.absent()
    elif damping > 0:
        fields["kappa_damped"] = _damped(spectrum, damping)
    if spectrum.positive_floor is not None:
        return fields | _definite(spectrum, size)
    if end_of(top.high) < 0:
        nothing = Quantity.interval(0.0, 0.0, 0.0, 1.0 - spectrum.failure)
        fields["kappa"] = fields["lambda_min_positive"] = Quantity.absent()
        fields["n_positive"] = nothing
        fields["kappa_quantile"] = dict.fromkeys(QUANTILES, Quantity.absent())
    reach = spectrum.bound + spectrum.rounding
    proven = _least_proven(spectrum.value, reach, spectrum.tolerance)
    if proven is not None and end_of(top.low) > 0:
        fields["lambda_min_positive"] = Quantity.upper_bound(proven)
        fields["kappa"] = Quantity.lower_bound(max(end_of(top.low) / proven, 1.0))
    proven = _least_proven(np.abs(spectrum.value), reach, spectrum.tolerance)
    if proven is not None:
        fields["kappa_abs"] = Quantity.lower_bound(max(spectrum.norm[0] / proven, 1.0))
    return fields


def end_of(number: float | None) -> float:
    """An end of a certificate that has one, without its None."""
    return 0.0 if number is None else number


def _least_proven(value: Array, reach: Array, tolerance: float) -> float | None:
    """The least bound under which a Ritz pair proves an eigenvalue beyond τ."""
    proven = (value + reach)[value - reach > tolerance]
    return float(proven.min()) if proven.size else None


def _definite(spectrum: RitzSpectrum, size: int) -> dict[str, Value]:
    """κ and the counts of a matrix with a positive floor under its spectrum."""
    floor, sure = spectrum.positive_floor or (0.0, 0.0)
    top, bottom = spectrum.top, spectrum.bottom
    # The bound from outside may lie above a floor by structure; then both may fail.
    nearer = end_of(bottom.low) > floor
    both = 1.0 - spectrum.failure * (1 + nearer) - (1.0 - sure)
    least = max(end_of(top.low) / end_of(bottom.high), 1.0)
    most = max(end_of(top.high) / max(floor, end_of(bottom.low)), least)
    middle = min(max(float(spectrum.value[-1]) / end_of(bottom.value), least), most)
    kappa = Quantity.interval(middle, least, most, both)
    every, none = Quantity.interval(size, size, size, sure), Quantity.interval(0.0, 0.0, 0.0, sure)
    return {
        "lambda_min_positive": bottom,
        "kappa": kappa,
        "kappa_abs": kappa,
        "n_positive": every,
        "n_negative": none,
        "n_zero": none,
    }


def _damped(spectrum: RitzSpectrum, damping: float) -> Quantity:
    """``(‖H‖ + μ) / (min |l| + μ)``: the denominator is at least μ for any matrix."""
    low, high = spectrum.norm
    near = np.abs(spectrum.value) + spectrum.bound + spectrum.rounding
    floor = spectrum.positive_floor[0] if spectrum.positive_floor is not None else 0.0
    least = max((low + damping) / (float(near.min()) + damping), 1.0)
    most = max((high + damping) / (floor + damping), least)
    return Quantity.interval(least, least, most, 1.0 - 2 * spectrum.failure)


def _negative(spectrum: RitzSpectrum) -> dict[str, Value]:
    """The depth of the negative curvature; all shares are 0 where there certainly is none."""
    top, bottom = spectrum.top, spectrum.bottom
    if spectrum.floor is not None or end_of(bottom.low) >= 0:
        sure = 1.0 if spectrum.floor is not None else 1.0 - spectrum.failure
        nothing = Quantity.interval(0.0, 0.0, 0.0, sure)
        return dict.fromkeys(("negative_count", "negative_mass", "negative_depth"), nothing)
    if spectrum.norm[0] <= 0:
        return {}
    ends = [max(-end_of(end), 0.0) for end in (bottom.high, bottom.value, bottom.low)]
    # The share of the other end in ‖H‖ only shrinks while this end grows: x / max(x, t).
    least = ends[0] / max(ends[0], end_of(top.high), TINY)
    most = min(ends[2] / max(ends[2], end_of(top.low), TINY), 1.0)
    value = min(max(ends[1] / max(ends[1], float(spectrum.value[-1]), TINY), least), most)
    return {"negative_depth": Quantity.interval(value, least, most, 1.0 - 2 * spectrum.failure)}


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
