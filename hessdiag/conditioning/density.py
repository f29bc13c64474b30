"""Counts, profile and κ at a quantile of a large block, from its spectral density."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hessdiag.conditioning.bounds import RitzSpectrum, end_of
from hessdiag.quantity import Quantity
from hessdiag.run import QUANTILES, THRESHOLDS, Value
from hessdiag_probes.quadrature import Mass, Quadrature
from hessdiag_probes.quantiles import Quantile, Span, next_above, quantile

Array = NDArray[np.float64]

CONFIDENCE = 0.95
UNRESOLVED = 0.5
"""A share that the runs leave open by more than this is not reported."""
DECADE = 10.0
"""A κ of the profile that is open by more than the step of its thresholds is not reported."""
POPULATION = 0.2
"""Part of the failure probability of κ_q that goes to the number of positive eigenvalues."""


@dataclass(frozen=True)
class DensityFields:
    """What ``--density`` adds to a row: its fields, arrays of its spectrum, and a note."""

    values: dict[str, Value]
    arrays: dict[str, Array]
    note: str


def density_fields(
    quadrature: Quadrature, spectrum: RitzSpectrum, *, positive: Quantity | None = None
) -> DensityFields:
    """Every field that the spectral density resolves; what is missing is known better without.

    Args:
        quadrature: Of the block, from probes that are independent of ``spectrum``.
        spectrum: The ends of the block's spectrum, and its zero tolerance τ.
        positive: How many eigenvalues a congruent matrix has above its τ; κ_q then counts those,
            so that it compares with that matrix's. None counts the block's own.
    Returns:
        Estimates at a confidence of 0.95 that holds both errors: of the probes, by the law of
        their shares, and of the Lanczos runs, by the Chebyshev–Markov–Stieltjes inequalities. The
        note gives them apart. The failure probability is shared: what the ends of the spectrum use
        is taken off first; each side of a count has half of the rest; κ_q leaves a fifth of it to
        the number of positive eigenvalues.
    Cost:
        Seconds at ten probes of 60 steps, no product.
    """
    values = _profile(quadrature, spectrum)
    if spectrum.positive_floor is None:
        values |= _counts(quadrature, spectrum)
    note = f"density from {len(quadrature.runs)} probes of {quadrature.steps} steps"
    if end_of(spectrum.top.high) > 0:
        if positive is None or positive.value is None or spectrum.positive_floor is not None:
            quantiles, errors = _kappa_quantiles(quadrature, spectrum)
        else:
            quantiles, errors = _shared_quantiles(quadrature, spectrum, positive)
        values["kappa_quantile"] = quantiles
        note = f"{note}; {errors}"
    grid = quadrature.grid()
    density = quadrature.density(grid)
    arrays = {
        "density_grid": grid.numpy(),
        "density": density.value.numpy(),
        "density_stderr": density.stderr.numpy(),
        "density_width": np.array(quadrature.smoothing),
        "density_resolution": np.array(quadrature.resolution),
    }
    return DensityFields(values, arrays, note)


def _no_negative(spectrum: RitzSpectrum) -> Quantity | None:
    """The count of negative eigenvalues where structure or the ends say that there is none."""
    if spectrum.floor is not None:
        return Quantity.interval(0.0, 0.0, 0.0, 1.0)
    if end_of(spectrum.bottom.low) >= 0:
        return Quantity.interval(0.0, 0.0, 0.0, 1.0 - spectrum.failure)
    return None


def _counts(quadrature: Quadrature, spectrum: RitzSpectrum) -> dict[str, Value]:
    """Signs at τ. An eigenvalue as close to ±τ as rounding reaches may count or not."""
    near = max(spectrum.tolerance - spectrum.rounding, 0.0)
    far = spectrum.tolerance + spectrum.rounding
    size = quadrature.n
    fields: dict[str, Value] = {}
    none = _no_negative(spectrum)
    if none is not None:
        sure = CONFIDENCE + 1.0 - end_of(none.confidence)
        positive = quadrature.above(near, upto=far, confidence=sure)
        rest = size - positive.least, size - positive.most
        open_share = positive.resolution_high - positive.resolution_low
        negative_count = 0
        fields["n_negative"] = none
    else:
        positive = quadrature.above(near, upto=far, confidence=CONFIDENCE)
        negative = quadrature.below(-near, downto=-far, confidence=CONFIDENCE)
        inner, outer = (quadrature.between(-x, x, confidence=CONFIDENCE) for x in (near, far))
        rest = outer.most, inner.least
        open_share = outer.resolution_high - inner.resolution_low
        negative_count = _middle(negative, size)
        fields["n_negative"] = found = _count(negative, size)
        fields["negative_count"] = found if found.value is None else _over(found, size)
    fields["n_positive"] = _count(positive, size)
    if open_share > UNRESOLVED:
        fields["n_zero"] = Quantity.unresolved()
    else:
        zero = max(size - _middle(positive, size) - negative_count, 0)
        low, high = min(rest[1], zero), max(rest[0], zero)
        fields["n_zero"] = Quantity.estimate(zero, low, high, CONFIDENCE)
    if end_of(spectrum.top.high) < 0:
        del fields["n_positive"]
    return fields


def _middle(mass: Mass, size: int) -> int:
    return min(max(round(mass.value * size), mass.least), mass.most)


def _count(mass: Mass, size: int) -> Quantity:
    if mass.resolution_high - mass.resolution_low > UNRESOLVED:
        return Quantity.unresolved()
    return Quantity.estimate(_middle(mass, size), mass.least, mass.most, CONFIDENCE)


def _over(count: Quantity, size: int) -> Quantity:
    value, low, high = (end_of(x) / size for x in (count.value, count.low, count.high))
    return Quantity.estimate(value, low, high, count.confidence)


def _profile(quadrature: Quadrature, spectrum: RitzSpectrum) -> dict[str, Value]:
    """Counts and κ beyond t‖H‖, where ‖H‖ may lie anywhere between its two ends."""
    none = _no_negative(spectrum)
    sure = CONFIDENCE + 2 * spectrum.failure
    size = quadrature.n
    positive: dict[str, Quantity] = {}
    negative: dict[str, Quantity] = {}
    kappa: dict[str, Quantity] = {}
    for name in THRESHOLDS:
        least, most = (float(name) * norm for norm in spectrum.norm)
        if least < spectrum.tolerance or least <= spectrum.rounding:
            positive[name] = negative[name] = kappa[name] = Quantity.unresolved()
            continue
        near, far = least - spectrum.rounding, most + spectrum.rounding
        above = quadrature.above(near, upto=far, confidence=sure)
        positive[name] = _count(above, size)
        if none is not None:
            negative[name] = none
        else:
            negative[name] = _count(quadrature.below(-near, downto=-far, confidence=sure), size)
        kappa[name] = _kappa_at(quadrature, spectrum, (least, most), positive[name])
    return {"profile_n_positive": positive, "profile_n_negative": negative, "profile_kappa": kappa}


def _kappa_at(
    quadrature: Quadrature, spectrum: RitzSpectrum, threshold: tuple[float, float], count: Quantity
) -> Quantity:
    """``l_1`` over the smallest eigenvalue above a threshold that lies between two ends."""
    top = spectrum.top
    if end_of(top.high) <= threshold[0]:
        return Quantity.absent()
    if count.value is None:
        return Quantity.unresolved()
    found = next_above(
        quadrature,
        threshold[0],
        upto=threshold[1],
        slack=spectrum.rounding,
        confidence=CONFIDENCE + 2 * spectrum.failure,
    )
    if math.isinf(found.high) and end_of(top.low) <= threshold[1]:
        return Quantity.unresolved()
    most = min(found.high, end_of(top.high))
    if most > DECADE * found.low:
        return Quantity.unresolved()
    return _kappa(spectrum, found, math.sqrt(found.low * most))


def _kappa_quantiles(
    quadrature: Quadrature, spectrum: RitzSpectrum
) -> tuple[dict[str, Quantity], str]:
    """κ_q for each q, and a sentence that gives its two errors apart."""
    size, tolerance, rounding = quadrature.n, spectrum.tolerance, spectrum.rounding
    floor, sure = spectrum.positive_floor or (tolerance, 1.0)
    open_risk = 1.0 - CONFIDENCE - spectrum.failure - (1.0 - sure)
    if spectrum.positive_floor is not None:
        base, least, confidence = -math.inf, size, 1.0 - open_risk
    else:
        base = tolerance
        one_sided = 1.0 - 2 * POPULATION * open_risk
        positive = quadrature.above(tolerance, upto=tolerance + rounding, confidence=one_sided)
        least = max(positive.least, int(end_of(spectrum.top.low) > tolerance))
        confidence = 1.0 - (1.0 - POPULATION) * open_risk
    fields: dict[str, Quantity] = {}
    errors: list[str] = []
    for name in QUANTILES:
        if least == 0:
            fields[name] = Quantity.unresolved()
            errors.append(f"{name}: no eigenvalue is proven to be positive")
            continue
        found = quantile(
            quadrature, float(name), base=base, least=least, slack=rounding, confidence=confidence
        )
        low = found.span.low if found.span.low > tolerance else floor
        if low <= tolerance and spectrum.positive_floor is None:
            fields[name] = Quantity.unresolved()
            errors.append(f"{name}: its eigenvalue is below the resolution")
            continue
        fields[name] = _kappa(spectrum, Span(low, found.span.high), found.value)
        errors.append(f"{name}: {_errors(found, low)}")
    return fields, "kappa_quantile " + ", ".join(errors)


def _shared_quantiles(
    quadrature: Quadrature, spectrum: RitzSpectrum, positive: Quantity
) -> tuple[dict[str, Quantity], str]:
    """κ_q at the ranks ⌈q n₊⌉, the number n₊ being that of a congruent matrix.

    Its interval and the quadrature's may both fail, so that the level is lower by its.
    """
    size, rounding = quadrature.n, spectrum.rounding
    failed = 1.0 - end_of(positive.confidence)
    own = CONFIDENCE + spectrum.failure
    fields: dict[str, Quantity] = {}
    errors: list[str] = []
    for name in QUANTILES:
        least, middle, most = (
            quantile(
                quadrature,
                (min(max(math.ceil(float(name) * end_of(count)), 1), size) - 0.5) / size,
                base=-math.inf,
                least=size,
                slack=rounding,
                confidence=own,
            )
            for count in (positive.low, positive.value, positive.high)
        )
        span = Span(most.span.low, least.span.high)
        if span.low <= spectrum.tolerance:
            fields[name] = Quantity.unresolved()
            errors.append(f"{name}: its eigenvalue is below the resolution")
            continue
        fields[name] = _kappa(
            spectrum, span, middle.value, confidence=round(CONFIDENCE - failed, 9)
        )
        errors.append(f"{name}: {_errors(middle, span.low)}")
    return fields, "kappa_quantile at the ranks of raw " + ", ".join(errors)


def _kappa(
    spectrum: RitzSpectrum, least: Span, value: float, *, confidence: float = CONFIDENCE
) -> Quantity:
    """``l_1`` over an eigenvalue in a span of positive ends."""
    top = spectrum.top
    low = max(end_of(top.low) / min(least.high, max(end_of(top.high), least.low)), 1.0)
    high = max(end_of(top.high) / least.low, low)
    middle = end_of(top.value) / value if value > 0 else high
    return Quantity.estimate(min(max(middle, low), high), low, high, confidence)


def _errors(found: Quantile, floor: float) -> str:
    probe, resolution = (_spread(span, floor) for span in (found.probe, found.resolution))
    return f"probe error {probe}, resolution {resolution}"


def _spread(span: Span, floor: float) -> str:
    """Half the width of a span of positive ends, as a factor or in per cent."""
    if math.isinf(span.high):
        return "unbounded"
    factor = math.sqrt(span.high / min(max(span.low, floor), span.high))
    return f"±{100 * (factor - 1):.2g} %" if factor < 2 else f"a factor of {factor:.2g}"
