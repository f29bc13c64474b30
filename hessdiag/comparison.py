"""Two numbers side by side: their ratio and difference, each with the certificate that follows."""

from __future__ import annotations

import math

from hessdiag.quantity import Quantity

TWO_SIDED = ("exact", "interval")
ONE_SIDED = ("lower-bound", "upper-bound")
CERTAIN = 0.99  # confidence of a difference that is called certain


def ratio(first: Quantity, second: Quantity, *, nonnegative: bool = True) -> Quantity:
    """``second / first``, with every ratio that the two certificates allow.

    Args:
        first: The denominator.
        second: The numerator.
        nonnegative: Both truths are at least 0 by definition, whatever the certificates say.
            Without, a ratio exists only where both are certified to be positive.
    Returns:
        Exact or an interval where both have two ends, a one-sided bound where only that follows,
        an estimate where either is one, else unresolved. A ratio whose denominator may be zero
        has no upper end. Absent where either is, or where a sign is not known; zero where either
        operator is.
    """
    special = _special(first, second)
    if special is not None:
        return special
    floor = 0.0 if nonnegative else -math.inf
    low_a, high_a = _ends(first, floor)
    low_b, high_b = _ends(second, floor)
    if not nonnegative and (low_a <= 0 or low_b <= 0):
        return Quantity.absent()
    # Outwards by one unit, for the quotient itself is rounded; 0 and infinity are what they are.
    low = -math.inf
    if second.low is not None and math.isfinite(high_a) and high_a > 0:
        low = math.nextafter(low_b / high_a, 0.0)
    high = _quotient_up(high_b, low_a)
    return _certified(first, second, low, high, _value(first, second, divide=True), trivial=0.0)


def difference(first: Quantity, second: Quantity) -> Quantity:
    """``second - first``, with every difference that the two certificates allow.

    The status follows the rules of :func:`ratio`.
    """
    special = _special(first, second)
    if special is not None:
        return special
    low_a, high_a = _ends(first, -math.inf)
    low_b, high_b = _ends(second, -math.inf)
    low, high = low_b - high_a, high_b - low_a
    if first.status != "exact" or second.status != "exact" or not _whole(low, high):
        low, high = math.nextafter(low, -math.inf), math.nextafter(high, math.inf)
    value = _value(first, second, divide=False)
    return _certified(first, second, low, high, value, trivial=-math.inf)


def certain_sign(difference: Quantity) -> int:
    """1 where the second is certainly larger, -1 where it is smaller, 0 where neither is known.

    An estimate certifies nothing, nor does an interval of less than 99 %.
    """
    if difference.status not in (*TWO_SIDED, *ONE_SIDED) or (difference.confidence or 0) < CERTAIN:
        return 0
    if difference.low is not None and difference.low > 0:
        return 1
    if difference.high is not None and difference.high < 0:
        return -1
    return 0


def _special(first: Quantity, second: Quantity) -> Quantity | None:
    """What follows without arithmetic."""
    pair = (first, second)
    if any(quantity.status is None for quantity in pair):
        return Quantity.absent()
    if any(quantity.status == "zero" for quantity in pair):
        return Quantity.zero()
    if any(quantity.status == "unresolved" or quantity.value is None for quantity in pair):
        return Quantity.unresolved()
    estimated = any(quantity.status == "estimate" for quantity in pair)
    if estimated and any(quantity.status in ONE_SIDED for quantity in pair):
        return Quantity.unresolved()  # an estimate of a bound is neither
    return None


def _ends(quantity: Quantity, floor: float) -> tuple[float, float]:
    low = -math.inf if quantity.low is None else quantity.low
    high = math.inf if quantity.high is None else quantity.high
    return max(low, floor), max(high, floor)


def _quotient_up(high_b: float, low_a: float) -> float:
    """The upper end of a ratio: infinite where the denominator may be zero."""
    if low_a <= 0 or math.isinf(high_b):
        return math.inf
    return math.nextafter(high_b / low_a, math.inf) if high_b else 0.0


def _value(first: Quantity, second: Quantity, *, divide: bool) -> float:
    a, b = first.value, second.value
    if a is None or b is None:
        return math.nan
    if not divide:
        return b - a
    return b / a if a else math.nan


def _whole(*numbers: float) -> bool:
    """Counts, whose differences are not rounded."""
    return all(math.isfinite(n) and n.is_integer() and abs(n) < 2**53 for n in numbers)


def _certified(
    first: Quantity, second: Quantity, low: float, high: float, value: float, *, trivial: float
) -> Quantity:
    """The kind of number that two finite or infinite ends make."""
    statuses = {first.status, second.status}
    joint = _joint(first.confidence, second.confidence)
    has_low, has_high = math.isfinite(low), math.isfinite(high)
    if "estimate" in statuses:
        if has_low and has_high and math.isfinite(value):
            return Quantity.estimate(value, low, high, joint)
        return Quantity.estimate(value)
    confidence = 0.0 if joint is None else joint  # every bound states its own
    if has_low and has_high:
        middle = min(max(value, low), high) if math.isfinite(value) else (low + high) / 2
        if statuses == {"exact"}:
            return Quantity.exact(middle, low, high)
        return Quantity.interval(middle, low, high, confidence)
    if has_low and low > trivial:
        return Quantity.lower_bound(low, confidence)
    if has_high:
        return Quantity.upper_bound(high, confidence)
    return Quantity.unresolved()


def _joint(first: float | None, second: float | None) -> float | None:
    """The level at which both hold, by the union bound; None where either has none."""
    if first is None or second is None:
        return None
    return max(1.0 - (1.0 - first) - (1.0 - second), 0.0)
