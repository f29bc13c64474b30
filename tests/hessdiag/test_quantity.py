"""The one type that carries numbers: what each status promises, and no NaN anywhere."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from hessdiag.quantity import STATUSES, Quantity

BROKEN = (math.nan, math.inf, -math.inf)


def test_exact_without_a_bound_is_its_own_interval():
    assert Quantity.exact(2.0) == Quantity(2.0, 2.0, 2.0, "exact", 1.0)


@pytest.mark.parametrize("make", [Quantity.exact, lambda *a: Quantity.interval(*a, 0.9)])
def test_the_value_lies_in_its_interval_even_when_the_bounds_were_rounded_past_it(make):
    found = make(1.0, 1.0 + 1e-16, 1.0 - 1e-15)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize(
    "make",
    [
        lambda x: Quantity.exact(x),
        lambda x: Quantity.exact(1.0, low=x),
        lambda x: Quantity.exact(1.0, high=x),
        lambda x: Quantity.interval(x, 0.0, 1.0, 0.9),
        lambda x: Quantity.interval(0.5, x, 1.0, 0.9),
        lambda x: Quantity.interval(0.5, 0.0, x, 0.9),
        lambda x: Quantity.lower_bound(x),
        lambda x: Quantity.upper_bound(x),
        lambda x: Quantity.estimate(x),
    ],
)
def test_what_is_not_finite_is_unresolved(make, broken):
    assert make(broken) == Quantity.unresolved()


@pytest.mark.parametrize("broken", BROKEN)
def test_an_estimate_loses_an_interval_that_is_not_finite_and_keeps_its_value(broken):
    found = Quantity.estimate(1.0, 0.5, broken, 0.95)
    assert found == Quantity(1.0, None, None, "estimate", None)


def test_a_bound_leaves_its_other_side_open():
    assert Quantity.lower_bound(3.0) == Quantity(3.0, 3.0, None, "lower-bound", 1.0)
    assert Quantity.upper_bound(3.0) == Quantity(3.0, None, 3.0, "upper-bound", 1.0)


@pytest.mark.parametrize("make", [Quantity.unresolved, Quantity.zero, Quantity.absent])
def test_what_has_no_value_has_no_number_at_all(make):
    found = make()
    assert (found.value, found.low, found.high, found.confidence) == (None, None, None, None)


def test_the_statuses_are_those_of_the_contract():
    assert set(STATUSES) == {
        *("exact", "interval", "lower-bound", "upper-bound", "estimate", "unresolved", "zero")
    }


def test_json_has_the_five_fields_in_the_order_of_the_contract():
    found = Quantity.interval(1.0, 0.5, 2.0, 0.95).to_json()
    assert list(found.items()) == [
        ("value", 1.0),
        ("low", 0.5),
        ("high", 2.0),
        ("status", "interval"),
        ("confidence", 0.95),
    ]


def test_an_increasing_function_carries_the_certificate_over():
    found = Quantity.interval(2.0, 1.0, 3.0, 0.9).increasing(lambda x: x * x)
    assert (found.value, found.status, found.confidence) == (4.0, "interval", 0.9)
    assert 1.0 - 1e-14 <= found.low <= 1.0
    assert 9.0 <= found.high <= 9.0 + 1e-13
    bound = Quantity.lower_bound(2.0).increasing(lambda x: x + 1)
    assert bound.high is None
    assert bound.low <= bound.value == 3.0


def test_the_image_is_widened_by_the_rounding_of_the_function_and_stays_below_its_limit():
    kappa = 3.0
    found = Quantity.exact(kappa).increasing(lambda k: (k - 1) / (k + 1), most=1.0)
    assert found.low < 0.5 < found.high
    far = Quantity.exact(1e20).increasing(lambda k: (k - 1) / (k + 1), most=1.0)
    assert far.low < 1.0 - 2e-20
    assert far.high == 1.0


def test_weakening_touches_exactness_alone():
    assert Quantity.exact(1.0, 0.5, 2.0).without_exactness() == Quantity(
        1.0, 0.5, 2.0, "interval", 1.0
    )
    for other in (Quantity.lower_bound(1.0), Quantity.zero(), Quantity.absent()):
        assert other.without_exactness() is other


def test_the_type_needs_no_torch():
    code = "import hessdiag.quantity, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
