"""Several numbers as one: their sum, their median, and which of them is certainly the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median_high, median_low

from hessdiag.comparison import TWO_SIDED, certain_sign, difference
from hessdiag.quantity import ROUNDING, Quantity


def total(quantities: Sequence[Quantity]) -> Quantity:
    """The sum, with every sum that the certificates allow.

    Returns:
        Exact where all are, an interval where all have two ends, a bound where all have that
        end, an estimate where one is and none is a bound; else unresolved.
    """
    return _combined(quantities, math.fsum)


def median_ratio(ratios: Sequence[Quantity]) -> Quantity:
    """The median in the logarithm of positive ``ratios``, at least one, whatever is known of them.

    The median grows with each of its arguments, so that of the lower ends is a lower end and that
    of the upper ends an upper one; a ratio of which nothing is known may be anything.

    Returns:
        Exact or an interval where the median has two ends, a bound where it has one; an estimate
        where one takes part, unless the median hangs on a bound or on an unresolved one; else
        unresolved.
    """
    return _combined(ratios, _log_median)


def outstanding(numbers: Mapping[str, Quantity], *, smallest: bool) -> str | None:
    """The key whose number certainly beats every other, each at 99 %; None where none does.

    An estimate never does, nor a bound to the wrong side, nor any number beside one of which
    nothing is known.
    """
    leaders = [key for key in numbers if not level(numbers, key, smallest=smallest)]
    return leaders[0] if len(numbers) > 1 and len(leaders) == 1 else None


def level(numbers: Mapping[str, Quantity], leader: str, *, smallest: bool) -> tuple[str, ...]:
    """The other keys, in their order, whose numbers are not certainly worse than the leader's."""
    worse = 1 if smallest else -1
    return tuple(
        key
        for key, number in numbers.items()
        if key != leader and certain_sign(difference(numbers[leader], number)) != worse
    )


def _combined(
    quantities: Sequence[Quantity], function: Callable[[Sequence[float]], float]
) -> Quantity:
    """A ``function`` that grows with each of its arguments, all of them at least 0."""
    statuses = {quantity.status for quantity in quantities}
    lows = [_end(quantity.low, 0.0) for quantity in quantities]
    highs = [_end(quantity.high, math.inf) for quantity in quantities]
    low = function(lows) * (1.0 - ROUNDING)
    high = function(highs) * (1.0 + ROUNDING)
    if "estimate" in statuses:
        known = [*zip(quantities, lows, highs, strict=True)]
        least = function([_guess(quantity, low) for quantity, low, _ in known])
        most = function([_guess(quantity, high) for quantity, _, high in known])
        if least != most:
            return Quantity.unresolved()
        if low > 0 and math.isfinite(high):
            return Quantity.estimate(least, low, high, _joint(quantities))
        return Quantity.estimate(least)
    confidence = _joint(quantities)
    if math.isfinite(high) and statuses.issubset(TWO_SIDED):
        value = function([_end(quantity.value, 0.0) for quantity in quantities])
        value = min(max(value, low), high)
        if statuses == {"exact"}:
            return Quantity.exact(value, low, high)
        return Quantity.interval(value, low, high, confidence)
    if math.isfinite(high) and low > 0:
        return Quantity.interval(math.sqrt(low) * math.sqrt(high), low, high, confidence)
    if low > 0:
        return Quantity.lower_bound(low, confidence)
    if math.isfinite(high):
        return Quantity.upper_bound(high, confidence)
    return Quantity.unresolved()


def _end(number: float | None, otherwise: float) -> float:
    return otherwise if number is None else max(number, 0.0)


def _guess(quantity: Quantity, end: float) -> float:
    """The value of what has one, else an end of what it may be."""
    if quantity.status in (*TWO_SIDED, "estimate") and quantity.value is not None:
        return quantity.value
    return end


def _log_median(numbers: Sequence[float]) -> float:
    low, high = median_low(numbers), median_high(numbers)
    return low if low == high else math.sqrt(low) * math.sqrt(high)


def _joint(quantities: Sequence[Quantity]) -> float:
    """The level at which all hold, by the union bound."""
    known = [quantity for quantity in quantities if quantity.status != "unresolved"]
    return max(1.0 - math.fsum(1.0 - (q.confidence or 0.0) for q in known), 0.0)
