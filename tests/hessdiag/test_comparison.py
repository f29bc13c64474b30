"""Ratios and differences of certified numbers: whatever the two truths are, they are inside."""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hessdiag.comparison import certain_sign, difference, ratio
from hessdiag.quantity import Quantity

NUMBER = st.floats(min_value=-1e12, max_value=1e12, allow_nan=False)
POSITIVE = st.floats(min_value=2.0**-40, max_value=2.0**40, width=32)
SHARE = st.floats(min_value=0.0, max_value=1.0)
STATUSES = ("exact", "interval", "lower-bound", "upper-bound")


def certified(low, high, status, value=None):
    """A certificate that holds for every number of ``[low, high]``."""
    middle = (low + high) / 2 if value is None else value
    match status:
        case "exact":
            return Quantity.exact(middle, low, high)
        case "interval":
            return Quantity.interval(middle, low, high, 0.99)
        case "lower-bound":
            return Quantity.lower_bound(low)
        case _:
            return Quantity.upper_bound(high)


def holds(found, truth):
    """Whether a fraction lies in a certificate, without any rounding."""
    return (found.low is None or Fraction(found.low) <= truth) and (
        found.high is None or truth <= Fraction(found.high)
    )


@st.composite
def known(draw, numbers):
    """A true number and a certificate that holds for it."""
    low, high = sorted((draw(numbers), draw(numbers)))
    truth = min(max(low + (high - low) * draw(SHARE), low), high)
    return Fraction(truth), certified(low, high, draw(st.sampled_from(STATUSES)))


@given(known(POSITIVE | st.just(0.0)), known(POSITIVE | st.just(0.0)))
def test_the_true_ratio_of_any_two_numbers_in_their_certificates_is_inside(first, second):
    (a, one), (b, other) = first, second
    assume(a > 0)
    assert holds(ratio(one, other), b / a)


@given(known(NUMBER), known(NUMBER))
def test_the_true_difference_is_inside_and_a_ratio_exists_only_where_both_signs_are_known(
    first, second
):
    (a, one), (b, other) = first, second
    found = difference(one, other)
    assert holds(found, b - a)
    sign = certain_sign(found)
    assert sign == 0 or sign * (b - a) > 0
    quotient = ratio(one, other, nonnegative=False)
    if quotient.status is None:
        lows = (one.low, other.low)
        assert any(low is None or low <= 0 for low in lows)
    else:
        assert holds(quotient, b / a)


@given(POSITIVE, POSITIVE)
def test_the_ratio_of_two_single_numbers_is_rounded_outwards(a, b):
    found = ratio(Quantity.exact(a), Quantity.exact(b))
    assert holds(found, Fraction(b) / Fraction(a))
    assert found.high / found.low - 1 < 1e-15


@pytest.mark.parametrize(
    ("first", "second", "low", "high", "status"),
    [
        (("exact", 2, 2), ("exact", 6, 6), 3, 3, "exact"),
        (("exact", 2, 4), ("exact", 6, 8), 1.5, 4, "exact"),
        (("interval", 2, 4), ("exact", 6, 8), 1.5, 4, "interval"),
        (("exact", 2, 2), ("lower-bound", 6, 6), 3, None, "lower-bound"),
        (("lower-bound", 2, 2), ("exact", 6, 6), None, 3, "upper-bound"),
        (("upper-bound", 2, 2), ("exact", 6, 6), 3, None, "lower-bound"),
        (("exact", 2, 2), ("upper-bound", 6, 6), None, 3, "upper-bound"),
        (("upper-bound", 2, 2), ("lower-bound", 6, 6), 3, None, "lower-bound"),
        (("lower-bound", 2, 2), ("lower-bound", 6, 6), None, None, "unresolved"),
        (("exact", 0, 2), ("exact", 6, 6), 3, None, "lower-bound"),
        (("exact", 0, 0), ("exact", 6, 6), None, None, "unresolved"),
        (("exact", 2, 2), ("exact", 0, 0), 0, 0, "exact"),
        (("exact", -1e-9, 2), ("exact", 6, 6), 3, None, "lower-bound"),
    ],
)
def test_a_ratio_has_the_ends_that_follow_and_the_weaker_kind(first, second, low, high, status):
    found = ratio(*(certified(*map(float, ends), kind) for kind, *ends in (first, second)))
    assert found.status == status
    assert found.low == (None if low is None else pytest.approx(low, rel=1e-15))
    assert found.high == (None if high is None else pytest.approx(high, rel=1e-15))


def test_the_level_of_both_together_is_the_union_bound():
    found = ratio(Quantity.interval(2, 1, 3, 0.95), Quantity.interval(2, 1, 3, 0.99))
    assert found.confidence == pytest.approx(0.94)
    assert difference(Quantity.exact(1.0), Quantity.exact(2.0)).confidence == 1.0
    doubtful = Quantity.interval(2, 1, 3, 0.4)
    assert ratio(doubtful, doubtful).confidence == 0.0


def test_an_estimate_stays_one_and_certifies_no_sign():
    wide, bare = Quantity.estimate(8.0, 6.0, 10.0, 0.95), Quantity.estimate(8.0)
    found = ratio(Quantity.exact(2.0), wide)
    assert (found.status, found.value, found.confidence) == ("estimate", 4.0, 0.95)
    assert (found.low, found.high) == (pytest.approx(3.0), pytest.approx(5.0))
    assert ratio(Quantity.exact(2.0), bare) == Quantity.estimate(4.0)
    assert certain_sign(difference(Quantity.exact(2.0), wide)) == 0
    assert ratio(Quantity.lower_bound(2.0), wide).status == "unresolved"
    assert difference(wide, Quantity.upper_bound(2.0)).status == "unresolved"


@pytest.mark.parametrize("function", [ratio, difference])
def test_what_has_no_number_gives_none(function):
    number = Quantity.exact(2.0)
    for nothing in (Quantity.absent(), Quantity.zero(), Quantity.unresolved()):
        assert function(number, nothing) == nothing
        assert function(nothing, number) == nothing


@given(st.integers(0, 2**50), st.integers(0, 2**50))
def test_a_difference_of_counts_is_exact(a, b):
    found = difference(Quantity.exact(float(a)), Quantity.exact(float(b)))
    assert (found.low, found.value, found.high) == (b - a,) * 3
    assert certain_sign(found) == (b > a) - (b < a)


def test_numbers_at_the_end_of_the_range_give_no_false_bound():
    huge, tiny = Quantity.exact(1.7e308), Quantity.exact(5e-324)
    over = ratio(tiny, huge)
    assert (over.status, over.low) == ("lower-bound", pytest.approx(1.79e308, rel=0.01)) or (
        over.status == "unresolved"
    )
    under = ratio(huge, tiny)
    assert under.low == 0.0
    assert under.high == 5e-324
    assert math.isfinite(difference(huge, Quantity.exact(-1.0)).low)
