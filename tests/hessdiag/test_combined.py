"""Sums, medians and winners of certified numbers, against their definitions."""

import math
import random
from statistics import median

import pytest

from hessdiag.combined import level, median_ratio, outstanding, total
from hessdiag.quantity import Quantity

exact = Quantity.exact


def between(low, high, confidence=0.999):
    return Quantity.interval((low + high) / 2, low, high, confidence)


def near(end):
    return None if end is None else pytest.approx(end, rel=1e-14)


def test_a_sum_of_exact_numbers_is_exact_within_the_sum_of_their_rounding():
    found = total([exact(1.0, 0.9, 1.1), exact(2.0, 1.8, 2.2)])
    assert found.status == "exact"
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 2.7, 3.3), rel=1e-14)
    assert found.low <= 2.7
    assert found.high >= 3.3


@pytest.mark.parametrize(
    ("second", "status", "low", "high"),
    [
        (between(2.0, 4.0), "interval", 3.0, 5.0),
        (Quantity.lower_bound(2.0), "lower-bound", 3.0, None),
        (Quantity.estimate(2.0), "estimate", None, None),
        (Quantity.estimate(2.0, 1.0, 3.0, 0.95), "estimate", 2.0, 4.0),
        (Quantity.unresolved(), "lower-bound", 1.0, None),
    ],
)
def test_a_sum_claims_what_all_of_its_terms_do(second, status, low, high):
    found = total([exact(1.0), second])
    assert found.status == status
    assert found.low == near(low)
    assert found.high == near(high)


def test_a_sum_of_an_estimate_and_a_bound_is_neither():
    assert total([Quantity.estimate(1.0), Quantity.lower_bound(2.0)]).status == "unresolved"


def test_a_sum_holds_at_the_confidence_of_all_its_terms_together():
    assert total([between(1, 2, 0.99), between(1, 2, 0.98)]).confidence == pytest.approx(0.97)


def test_what_is_not_known_costs_a_median_no_confidence():
    found = median_ratio([between(1, 2, 0.99), between(1, 2, 0.99), Quantity.unresolved()])
    assert (found.status, found.confidence) == ("interval", pytest.approx(0.98))


def test_the_median_of_an_even_number_lies_between_the_middle_two_in_the_logarithm():
    assert median_ratio([exact(1.0), exact(100.0)]).value == pytest.approx(10.0)
    assert median_ratio([exact(1e-3), exact(1.0), exact(100.0)]).value == 1.0


@pytest.mark.parametrize(
    ("ratios", "status", "low", "high"),
    [
        ([exact(0.1), exact(0.2), Quantity.unresolved()], "interval", 0.1, 0.2),
        ([exact(0.1), exact(0.2), Quantity.upper_bound(0.15)], "interval", 0.1, 0.15),
        ([exact(0.1), exact(0.2), Quantity.lower_bound(5.0)], "interval", 0.2, 0.2),
        ([exact(0.1), Quantity.lower_bound(5.0), Quantity.unresolved()], "lower-bound", 0.1, None),
        ([exact(0.1), Quantity.upper_bound(5.0), Quantity.unresolved()], "upper-bound", None, 5.0),
        ([exact(0.1), Quantity.upper_bound(0.4)], "upper-bound", None, 0.2),
        ([exact(0.1), Quantity.lower_bound(0.4)], "lower-bound", 0.2, None),
        ([Quantity.lower_bound(5.0), Quantity.upper_bound(0.1)], "unresolved", None, None),
        ([exact(0.1), Quantity.estimate(0.4)], "estimate", None, None),
        ([Quantity.estimate(0.4, 0.2, 0.8, 0.95)], "estimate", 0.2, 0.8),
    ],
)
def test_a_median_is_bounded_where_its_terms_are(ratios, status, low, high):
    found = median_ratio(ratios)
    assert found.status == status
    assert found.low == near(low)
    assert found.high == near(high)


def test_an_estimate_beside_bounds_has_a_median_only_where_the_bounds_leave_it_no_choice():
    guess = Quantity.estimate(0.2)
    assert median_ratio([exact(0.1), guess, Quantity.lower_bound(5.0)]).value == 0.2
    assert median_ratio([exact(0.1), guess, Quantity.unresolved()]).status == "unresolved"


def test_the_median_holds_for_every_truth_that_its_terms_allow():
    draw = random.Random(1)
    for _ in range(200):
        terms, truths = [], []
        for _ in range(draw.randint(1, 6)):
            truth = 10 ** draw.uniform(-3, 3)
            low, high = truth * draw.uniform(0.2, 1), truth * draw.uniform(1, 5)
            kinds = [between(low, high), Quantity.lower_bound(low), Quantity.upper_bound(high)]
            terms.append(draw.choice([*kinds, exact(truth), Quantity.unresolved()]))
            truths.append(truth)
        middle = math.exp(median(map(math.log, truths)))
        found = median_ratio(terms)
        assert found.low is None or found.low <= middle * (1 + 1e-12)
        assert found.high is None or found.high >= middle * (1 - 1e-12)


@pytest.mark.parametrize(
    ("numbers", "best"),
    [
        ({"a": exact(1.0), "b": exact(2.0)}, "a"),
        ({"a": exact(1.0), "b": exact(1.0)}, None),
        ({"a": exact(1.0, 0.9, 1.1), "b": exact(1.2, 1.1, 1.3)}, None),
        ({"a": between(1, 2), "b": between(3, 4), "c": Quantity.lower_bound(2.5)}, "a"),
        ({"a": between(1, 2), "b": between(3, 4), "c": Quantity.lower_bound(1.5)}, None),
        ({"a": between(1, 2, 0.95), "b": between(3, 4, 0.95)}, None),
        ({"a": exact(1.0), "b": Quantity.lower_bound(2.0)}, "a"),
        ({"a": Quantity.lower_bound(1.0), "b": exact(2.0)}, None),
        ({"a": Quantity.upper_bound(1.0), "b": exact(2.0)}, "a"),
        ({"a": Quantity.estimate(1.0), "b": exact(2.0)}, None),
        ({"a": exact(1.0), "b": Quantity.estimate(2.0)}, None),
        ({"a": exact(1.0), "b": exact(2.0), "c": Quantity.unresolved()}, None),
        ({"a": exact(1.0)}, None),
        ({}, None),
    ],
)
def test_the_smallest_is_named_where_its_interval_separates_it_from_every_other(numbers, best):
    assert outstanding(numbers, smallest=True) == best


def test_the_largest_is_named_where_that_is_the_best():
    assert outstanding({"a": exact(1.0), "b": exact(2.0)}, smallest=False) == "b"
    assert outstanding({"a": exact(1.0), "b": Quantity.upper_bound(2.0)}, smallest=False) is None


def test_level_are_those_that_are_not_certainly_worse():
    numbers = {"a": between(1, 3), "b": between(2, 4), "c": exact(5.0), "d": Quantity.unresolved()}
    assert level(numbers, "a", smallest=True) == ("b", "d")
