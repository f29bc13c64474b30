import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hessdiag.quantity import Quantity
from hessdiag.tables.marks import (
    MEANINGS,
    certified,
    marked,
    percent,
    scientific,
    signed,
    signed_percent,
    signed_whole,
    times,
    whole,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


@pytest.mark.parametrize(
    ("quantity", "shown"),
    [
        (Quantity.exact(249312.0), "= 2.49e+05"),
        (Quantity.exact(-0.00012), "= -1.20e-04"),
        (Quantity.exact(0.0), "= 0"),
        (Quantity.exact(0.0, -1e-17, 1e-17), "= 0"),
        (Quantity.exact(23456.0, 23000.0, 24000.0), "= 2.3e+04"),
        (Quantity.exact(23456.0, 15000.0, 25000.0), "= 2e+04"),
        (Quantity.exact(23456.0, 23450.0, 23499.0), "= 2.35e+04"),
        (Quantity.lower_bound(1.999e5), "≥ 1.99e+05"),
        (Quantity.lower_bound(0.3), "≥ 3.00e-01"),
        (Quantity.lower_bound(-1.999), "≥ -2.00e+00"),
        (Quantity.upper_bound(1.001e5), "≤ 1.01e+05"),
        (Quantity.interval(9e4, 8.31e4, 1.29e5, 0.999), "[8.3e4, 1.3e5]"),
        (Quantity.interval(0.0, -0.013, 0.013, 0.999), "[-1.3e-2, 1.3e-2]"),
        (Quantity.interval(2.495, 2.4949999, 2.4950001, 0.999), "[2.50e+00]"),
        (Quantity.estimate(12.345), "~ 1.23e+01"),
        (Quantity.estimate(12.345, 10.0, 15.0, 0.95), "~ 1.23e+01"),
        (Quantity.unresolved(), "?"),
        (Quantity.zero(), "0"),
        (Quantity.absent(), "–"),
    ],
)
def test_every_kind_in_print(quantity, shown):
    mark = certified(quantity)
    assert str(mark) == shown
    assert mark.kind in MEANINGS


@pytest.mark.parametrize(
    ("quantity", "shown"),
    [
        (Quantity.exact(0.01455, 0.0, 0.0769), "[0, 7.7e-2]"),
        (Quantity.exact(0.0556, 0.0177, 0.0936), "[1.7e-2, 9.4e-2]"),
        (Quantity.exact(23456.0, 13000.0, 34000.0), "[1.3e4, 3.4e4]"),
        (Quantity.exact(-0.5, -0.9, 0.0), "[-9.0e-1, 0]"),
        (Quantity.exact(0.0, 0.0, 1e-3), "[0, 1.0e-3]"),
    ],
)
def test_an_exact_value_without_a_certain_digit_is_its_interval(quantity, shown):
    mark = certified(quantity)
    assert (str(mark), mark.kind) == (shown, "[]")


def test_an_exact_value_whose_sign_is_open_is_zero():
    for value, low, high in ((0.01, -0.01, 0.07), (-3e-17, -4e-17, 1e-17), (0.0, -1e-9, 1e-3)):
        assert str(certified(Quantity.exact(value, low, high))) == "= 0"


def test_the_ends_of_an_exact_interval_take_the_form_of_the_column():
    assert str(certified(Quantity.exact(0.3, 0.1, 0.6), form=times)) == "[×0.10, ×0.60]"


@given(FINITE, st.integers(1, 6))
def test_a_bound_is_never_rounded_to_the_flattering_side(number, digits):
    show = scientific(digits)
    assert float(show(number, ROUND_FLOOR)) <= number <= float(show(number, ROUND_CEILING))
    nearest = float(show(number, ROUND_HALF_EVEN))
    unit = 10.0 ** (math.floor(math.log10(abs(number))) - digits + 1) if number else 0.0
    assert abs(nearest - number) <= unit


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "0%"), (1e-9, "<0.1%"), (0.123456, "12.3%"), (0.99999, ">99.9%"), (1.0, "100.0%")],
)
def test_a_share_reads_zero_or_all_only_when_it_is(share, shown):
    assert percent(share, ROUND_HALF_EVEN) == shown


@pytest.mark.parametrize(
    ("quantity", "shown"),
    [
        (Quantity.exact(12), "12"),
        (Quantity.interval(5, 3, 9, 0.95), "[3, 9]"),
        (Quantity.interval(5.2, 4.9, 5.0, 0.95), "[4, 6]"),
        (Quantity.lower_bound(3), "≥ 3"),
    ],
)
def test_counts_are_whole(quantity, shown):
    assert str(marked(quantity, whole)) == shown


@pytest.mark.parametrize(
    ("number", "rounding", "shown"),
    [
        (1.786, ROUND_HALF_EVEN, "×1.79"),
        (281.4, ROUND_HALF_EVEN, "×281"),
        (0.0021, ROUND_HALF_EVEN, "×0.00210"),
        (0.00021, ROUND_HALF_EVEN, "×2.10e-04"),
        (1234567.0, ROUND_FLOOR, "×1.23e+06"),
        (9.996, ROUND_CEILING, "×10.0"),
        (1.001, ROUND_CEILING, "×1.01"),
        (0.0, ROUND_FLOOR, "×0"),
    ],
)
def test_a_ratio_near_one_has_no_exponent(number, rounding, shown):
    assert times(3)(number, rounding) == shown


def test_differences_carry_their_sign_and_bounds_are_rounded_outwards():
    assert [signed(2)(x, ROUND_FLOOR) for x in (1.55, -1.55, 0.0)] == ["+1.5e+00", "-1.6e+00", "0"]
    assert [signed_whole(x, ROUND_FLOOR) for x in (3.0, -3.0, 0.0)] == ["+3", "-3", "0"]
    shares = [(0.1234, ROUND_FLOOR), (-0.1234, ROUND_FLOOR), (-0.1234, ROUND_CEILING), (0, "")]
    assert [signed_percent(x, r or ROUND_FLOOR) for x, r in shares] == [
        "+12.3%",
        "-12.4%",
        "-12.3%",
        "0%",
    ]
