"""Eigenvalues or Ritz pairs in, condition numbers with their certificates out (maths 1.1–1.6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hessdiag.quantity import Quantity
from hessdiag.run import QUANTILES, THRESHOLDS, Value

Array = NDArray[np.float64]

ZERO_FACTOR = 10.0  # τ = 10 max(n, 10) ε ‖H‖
NOISE_FACTOR = 100.0  # τ ≥ 100 ν
ROUNDING_SHARE = 0.2  # computed eigenvalues are right to this share of τ
AMBIGUOUS_ABOVE = 10.0
AMBIGUOUS_BELOW = 0.1


def zero_tolerance(norm: float, size: int, eps: float, noise: float) -> float:
    """τ: below it an eigenvalue cannot be told from zero (maths 1.1)."""
    return max(ZERO_FACTOR * max(size, 10) * eps * norm, NOISE_FACTOR * noise)


@dataclass(frozen=True)
class Inertia:
    """Signs of the eigenvalues, counted on the equilibrated matrix (Sylvester's law).

    ``*_low`` and ``*_high`` are the counts at ten times and at a tenth of the tolerance; they
    differ from the count only where ``ambiguous``. ``margin_above`` and ``margin_below`` are the
    nearest magnitudes above and below the tolerance, in units of it; None where there is none.
    """

    positive: int
    negative: int
    positive_low: int
    positive_high: int
    negative_low: int
    negative_high: int
    margin_above: float | None
    margin_below: float | None

    @property
    def ambiguous(self) -> bool:
        """Whether an eigenvalue lies within a factor of ten of the tolerance."""
        above, below = self.margin_above, self.margin_below
        return (above is not None and above < AMBIGUOUS_ABOVE) or (
            below is not None and below > AMBIGUOUS_BELOW
        )


def count_inertia(equilibrated: Array, tolerance: float) -> Inertia:
    """The inertia of the equilibrated matrix's eigenvalues at ``tolerance``."""
    size = np.abs(equilibrated)
    above = size[size > tolerance]
    below = size[size <= tolerance]
    margin_above = float(above.min() / tolerance) if above.size and tolerance > 0 else None
    margin_below = float(below.max() / tolerance) if below.size and tolerance > 0 else None
    positive = int((equilibrated > tolerance).sum())
    negative = int((equilibrated < -tolerance).sum())
    found = Inertia(
        positive, negative, positive, positive, negative, negative, margin_above, margin_below
    )
    if not found.ambiguous:
        return found
    return Inertia(
        positive,
        negative,
        int((equilibrated > AMBIGUOUS_ABOVE * tolerance).sum()),
        int((equilibrated > AMBIGUOUS_BELOW * tolerance).sum()),
        int((equilibrated < -AMBIGUOUS_ABOVE * tolerance).sum()),
        int((equilibrated < -AMBIGUOUS_BELOW * tolerance).sum()),
        margin_above,
        margin_below,
    )


@dataclass(frozen=True)
class ExactSpectrum:
    """All eigenvalues of a block, and how well each is known.

    Attributes:
        value: Ascending, (n,).
        error: Bound on the error of each, (n,): a share of τ, or relative for a positive definite
            block that was certified.
        tolerance: τ; 0 for a certified positive definite block, which has no zero eigenvalue.
        inertia: From the equilibrated matrix.
        diagonal: Of the matrix, (n,).
        frobenius: Frobenius norm.
        noise: ν of the block.
    """

    value: Array
    error: Array
    tolerance: float
    inertia: Inertia
    diagonal: Array
    frobenius: float
    noise: float

    @property
    def resolved(self) -> bool:
        """Whether the eigenvalues beyond ±τ are exactly those that the inertia counts."""
        positive = int((self.value > self.tolerance).sum())
        negative = int((self.value < -self.tolerance).sum())
        counted = (self.inertia.positive, self.inertia.negative)
        return not self.inertia.ambiguous and (positive, negative) == counted

    @property
    def norm(self) -> float:
        """‖H‖ = max |l_i|."""
        return float(np.abs(self.value).max(initial=0.0))

    @property
    def norm_error(self) -> float:
        """Bound on the error of ``norm``."""
        return float(self.error[np.argmax(np.abs(self.value))]) if self.value.size else 0.0


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
    top, top_error = _positive_top(spectrum)
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
    fields |= _counts(inertia, size)
    fields |= _moments(spectrum, eps)
    fields |= _negative(spectrum)
    fields |= _profile(spectrum)
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


def _positive_top(spectrum: ExactSpectrum) -> tuple[float, float]:
    return float(spectrum.value[-1]), float(spectrum.error[-1])


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
    top, top_error = _positive_top(spectrum)
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
    top, top_error = _positive_top(spectrum)
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


def _count(value: int, low: int, high: int) -> Quantity:
    return Quantity(value, min(low, value), max(high, value), "exact", 1.0)


def _counts(inertia: Inertia, size: int) -> dict[str, Value]:
    certain = inertia.positive_low + inertia.negative_low
    possible = inertia.positive_high + inertia.negative_high
    zero = size - inertia.positive - inertia.negative
    return {
        "n_positive": _count(inertia.positive, inertia.positive_low, inertia.positive_high),
        "n_negative": _count(inertia.negative, inertia.negative_low, inertia.negative_high),
        "n_zero": _count(zero, size - possible, size - certain),
    }


def _moments(spectrum: ExactSpectrum, eps: float) -> dict[str, Value]:
    size = spectrum.value.size
    noise = 10 * spectrum.noise * math.sqrt(size)
    diagonal = spectrum.diagonal
    trace = float(diagonal.sum())
    trace_error = 2 * size * eps * float(np.abs(diagonal).sum()) + noise
    frobenius = spectrum.frobenius
    frobenius_error = 2 * size * eps * frobenius + noise
    norm, norm_error = spectrum.norm, spectrum.norm_error
    low = max(frobenius - frobenius_error, 0.0) ** 2 / (norm + norm_error) ** 2
    high = ((frobenius + frobenius_error) / max(norm - norm_error, 1e-300)) ** 2
    return {
        "trace": Quantity.exact(trace, trace - trace_error, trace + trace_error),
        "frobenius": Quantity.exact(
            frobenius, max(frobenius - frobenius_error, 0.0), frobenius + frobenius_error
        ),
        "stable_rank": Quantity.exact((frobenius / norm) ** 2, low, high),
    }


def _negative(spectrum: ExactSpectrum) -> dict[str, Value]:
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
            min((mass + mass_error + unseen) / max(total - total_error, 1e-300), 1.0),
        ),
        "negative_depth": Quantity.exact(
            depth / norm,
            max(depth - depth_error, 0.0) / (norm + norm_error),
            min((depth + depth_error) / max(norm - norm_error, 1e-300), 1.0),
        ),
    }


def _profile(spectrum: ExactSpectrum) -> dict[str, Value]:
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
    top, top_error = _positive_top(spectrum)
    surely = np.flatnonzero(value - error > threshold)
    maybe = np.flatnonzero(value + error > threshold)
    upper = float(value[surely[0]] + error[surely[0]]) if surely.size else top
    lower = max(float(value[maybe[0]] - error[maybe[0]]), threshold)
    return Quantity.exact(
        top / float(value[beyond[0]]),
        max((top - top_error) / upper, 1.0),
        max((top + top_error) / lower, 1.0),
    )
