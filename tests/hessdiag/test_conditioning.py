"""Condition numbers and counts of spectra that are known beforehand (maths 1.1 to 1.5, 2.1)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import quadratics
from hessdiag.conditioning import (
    ExactSpectrum,
    Inertia,
    count_inertia,
    exact_quantities,
    rates,
    zero_tolerance,
)
from hessdiag.quantity import Quantity

EPS = np.finfo(float).eps


def spectrum_of(values, *, inertia=None, share=0.2):
    """An exactly solved diagonal matrix with these eigenvalues."""
    value = np.sort(np.asarray(values, dtype=float))
    tolerance = zero_tolerance(np.abs(value).max(), len(value), EPS, 0.0)
    return ExactSpectrum(
        value=value,
        error=np.full(len(value), share * tolerance),
        tolerance=tolerance,
        inertia=inertia or count_inertia(value, tolerance),
        diagonal=value,
        frobenius=float(np.linalg.norm(value)),
        noise=0.0,
    )


def fields_of(values, *, damping=None, **changes):
    return exact_quantities(spectrum_of(values, **changes), eps=EPS, damping=damping)


# The zero tolerance and the counts


def test_the_zero_tolerance_is_relative_to_the_norm_and_knows_the_noise():
    assert zero_tolerance(3.0, 50, EPS, 0.0) == pytest.approx(10 * 50 * EPS * 3.0)
    assert zero_tolerance(3.0, 2, EPS, 0.0) == pytest.approx(10 * 10 * EPS * 3.0)
    assert zero_tolerance(3.0, 2, EPS, 1e-6) == pytest.approx(1e-4)


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_counts_and_margins_do_not_depend_on_the_units(scale):
    values = scale * np.array([-2.0, 0.0, 1e-3, 1.0])
    found = count_inertia(values, zero_tolerance(2 * scale, 4, EPS, 0.0))
    assert (found.positive, found.negative, found.ambiguous) == (2, 1, False)
    assert found.margin_above == pytest.approx(1e-3 / zero_tolerance(2.0, 4, EPS, 0.0))


@pytest.mark.parametrize(
    ("value", "ambiguous", "positive", "low", "high"),
    [
        (11.0, False, 2, 2, 2),
        (9.0, True, 2, 1, 2),
        (1.1, True, 2, 1, 2),
        (0.9, True, 1, 1, 2),
        (0.11, True, 1, 1, 2),
        (0.09, False, 1, 1, 1),
    ],
)
def test_a_count_is_ambiguous_within_a_factor_of_ten_of_the_tolerance(
    value, ambiguous, positive, low, high
):
    found = count_inertia(np.array([value * 1e-9, 1.0]), 1e-9)
    assert found.ambiguous is ambiguous
    assert (found.positive, found.positive_low, found.positive_high) == (positive, low, high)
    mirrored = count_inertia(np.array([-value * 1e-9, -1.0]), 1e-9)
    assert (mirrored.negative, mirrored.negative_low, mirrored.negative_high) == (
        *(positive, low, high),
    )


def test_margins_are_absent_where_no_eigenvalue_stands_on_that_side():
    assert count_inertia(np.array([1.0, 2.0]), 1e-9).margin_below is None
    assert count_inertia(np.array([1e-12, 0.0]), 1e-9).margin_above is None


def test_in_a_narrower_type_whatever_lies_below_the_tolerance_may_have_any_sign():
    value = np.array([1e-9, 0.5, 1.0])
    assert not count_inertia(value, 1e-6).ambiguous
    found = count_inertia(value, 1e-6, narrow=True)
    assert found.ambiguous
    assert (found.positive, found.positive_low, found.positive_high) == (2, 2, 3)
    assert (found.negative, found.negative_low, found.negative_high) == (0, 0, 1)


@pytest.mark.parametrize("name", ["n_positive", "n_negative", "n_zero"])
def test_ambiguous_counts_carry_the_range_that_they_may_have(name):
    tolerance = zero_tolerance(1.0, 10, EPS, 0.0)
    found = fields_of([-1.0, -0.5 * tolerance, 0.0, 0.5 * tolerance, 2 * tolerance, 1.0])
    count = found[name]
    wanted = {"n_positive": (2, 1, 3), "n_negative": (1, 1, 2), "n_zero": (3, 1, 4)}[name]
    assert (count.value, count.low, count.high) == wanted


# The condition numbers


def test_every_field_of_a_small_indefinite_spectrum_is_what_its_definition_says():
    found = fields_of([-4.0, -1.0, 0.0, 0.5, 1.0, 2.0, 8.0], damping=1.0)
    wanted = {
        "lambda_max": 8.0,
        "lambda_min": -4.0,
        "lambda_min_positive": 0.5,
        "kappa": 16.0,
        "kappa_abs": 16.0,
        "kappa_damped": 9.0,  # (8 + 1) / (0 + 1)
        "n_positive": 4,
        "n_negative": 2,
        "n_zero": 1,
        "trace": 6.5,
        "frobenius": math.sqrt(86.25),
        "stable_rank": 86.25 / 64,
        "negative_count": 2 / 7,
        "negative_mass": 5 / 16.5,
        "negative_depth": 0.5,
    }
    for name, value in wanted.items():
        assert found[name].status == "exact", name
        assert found[name].value == pytest.approx(value, rel=1e-13), name
        assert found[name].low <= found[name].value <= found[name].high, name
    assert found["kappa_quantile"]["0.5"].value == 4.0  # k = 2
    assert found["kappa_quantile"]["0.9"].value == 16.0  # k = 4
    assert found["profile_n_positive"]["1e-01"].value == 3  # beyond 0.8
    assert found["profile_n_negative"]["1e-01"].value == 2
    assert found["profile_kappa"]["1e-01"].value == 8.0


def test_negative_curvature_alone_has_no_kappa_but_has_kappa_abs():
    found = fields_of([-8.0, -2.0, -1.0])
    for name in ("kappa", "lambda_min_positive"):
        assert found[name] == Quantity.absent()
    assert set(found["kappa_quantile"].values()) == {Quantity.absent()}
    assert found["profile_kappa"]["1e-12"] == Quantity.absent()
    assert found["kappa_abs"].value == 8.0
    assert found["kappa_abs"].status == "exact"
    assert (found["negative_mass"].value, found["negative_depth"].value) == (1.0, 1.0)


@pytest.mark.parametrize("value", [3.0, 1e-150, 1e150])
def test_one_positive_number_has_kappa_one(value):
    found = fields_of([value])
    for name in ("kappa", "kappa_abs"):
        assert (found[name].value, found[name].status, found[name].low) == (1.0, "exact", 1.0)
    assert found["kappa_quantile"]["0.9"].value == 1.0


@pytest.mark.parametrize("count", [1, 2, 3, 10, 20, 70, 110, 999, 1000])
@pytest.mark.parametrize("quantile", ["0.5", "0.9"])
def test_the_quantile_takes_the_ceiling_of_its_share_of_the_positive_count(count, quantile):
    positive = np.arange(1.0, count + 1)
    found = fields_of([-1.0, *positive])["kappa_quantile"][quantile]
    k = -(-int(10 * float(quantile)) * count // 10)
    assert found.value == pytest.approx(count / (count + 1 - k), rel=1e-13)


def test_an_eigenvalue_near_the_tolerance_makes_kappa_a_lower_bound_that_holds():
    tolerance = zero_tolerance(1.0, 3, EPS, 0.0)
    for size in (0.5, 2.0, 9.0):
        found = fields_of([size * tolerance, 0.5, 1.0])
        assert found["ambiguous"] is True
        for name in ("kappa", "kappa_abs"):
            assert found[name].status == "lower-bound", name
            assert 1.0 <= found[name].low <= 1 / (size * tolerance), name
        assert found["lambda_min_positive"].status == "upper-bound"
        assert found["lambda_min_positive"].high >= size * tolerance
    sure = fields_of([20 * tolerance, 0.5, 1.0])
    assert (sure["ambiguous"], sure["kappa"].status) == (False, "exact")


def test_a_count_of_zero_that_may_be_one_leaves_kappa_unresolved_not_absent():
    tolerance = zero_tolerance(1.0, 2, EPS, 0.0)
    found = fields_of([-1.0, 0.5 * tolerance])
    assert (found["n_positive"].value, found["n_positive"].high) == (0, 1)
    for quantity in (found["kappa"], found["lambda_min_positive"], found["kappa_quantile"]["0.5"]):
        assert quantity == Quantity.unresolved()


def test_positive_eigenvalues_that_only_the_equilibrated_matrix_shows_bound_kappa_from_below():
    # 1e-20 is real (the inertia counts it), but drowns in the rounding of the raw solve.
    inertia = Inertia(3, 0, 3, 3, 0, 0, 1e10, None, ambiguous=False)
    found = fields_of([1e-18, 0.5, 1.0], inertia=inertia)
    assert found["kappa"].status == "lower-bound"
    tolerance = zero_tolerance(1.0, 3, EPS, 0.0)
    assert 0.5 / tolerance < found["kappa"].low <= 1 / tolerance
    assert found["kappa_quantile"]["0.9"].status == "lower-bound"
    assert found["kappa_quantile"]["0.5"].value == 2.0
    assert found["lambda_min_positive"].high >= tolerance
    assert found["n_positive"].value == 3


def test_negative_mass_that_the_raw_solve_cannot_see_is_within_its_interval():
    inertia = Inertia(2, 1, 2, 2, 1, 1, 1e10, None, ambiguous=False)
    mass = fields_of([-1e-16, 0.5, 1.0], inertia=inertia)["negative_mass"]
    assert mass.low == 0.0
    assert mass.high >= 1e-16 / 1.5


@pytest.mark.parametrize("damping", [1e-6, 1.0, 1e6])
def test_damping_lifts_both_ends_in_magnitude(damping):
    found = fields_of([-3.0, 0.0, 2.0], damping=damping)["kappa_damped"]
    assert found.value == pytest.approx((3 + damping) / damping, rel=1e-12)
    assert found.low <= (3 + damping) / damping <= found.high
    assert fields_of([-3.0, 0.0, 2.0])["kappa_damped"] == Quantity.absent()


def test_damping_of_zero_says_nothing_of_a_singular_matrix_but_bounds_it_from_below():
    found = fields_of([0.0, 1.0], damping=0.0)["kappa_damped"]
    assert (found.status, found.high) == ("lower-bound", None)
    assert fields_of([0.5, 1.0], damping=0.0)["kappa_damped"].value == 2.0


def test_thresholds_below_the_tolerance_are_unresolved_in_the_profile():
    found = exact_quantities(spectrum_of(np.linspace(1e-3, 1.0, 800)), eps=EPS, damping=None)
    tolerance = zero_tolerance(1.0, 800, EPS, 0.0)
    for name, quantity in found["profile_n_positive"].items():
        resolved = bool(float(name) >= tolerance)
        assert (quantity.status == "exact") is resolved, name
        assert (found["profile_kappa"][name].status == "exact") is resolved, name


def test_a_profile_count_says_when_an_eigenvalue_may_lie_on_either_side_of_its_threshold():
    found = fields_of([1e-3, 1.0])["profile_n_positive"]["1e-03"]
    assert (found.low, found.high) == (1, 2)


# Rates


@pytest.mark.parametrize("kappa", [1.0 + 1e-9, 1.5, 100.0, 1e8, 1e15])
def test_rates_have_their_closed_forms(kappa):
    found = rates(Quantity.exact(kappa))
    rate = (kappa - 1) / (kappa + 1)
    decade = (
        math.log(10) / math.log((kappa + 1) / (kappa - 1))
        if kappa < 1e6
        else (math.log(10) / 2 * kappa)
    )
    assert found["gd_rate"].value == pytest.approx(rate, rel=1e-14)
    tolerance = 1e-6 if kappa < 1.1 else 1e-11
    assert found["gd_iterations_per_decade"].value == pytest.approx(decade, rel=tolerance)


def test_gradient_descent_needs_no_iteration_where_kappa_is_one():
    found = rates(Quantity.exact(1.0))
    assert found["gd_rate"] == Quantity.exact(0.0)
    assert found["gd_iterations_per_decade"] == Quantity.exact(0.0)


def test_rates_inherit_the_status_of_kappa():
    found = rates(Quantity.lower_bound(3.0))
    assert (found["gd_rate"].status, found["gd_rate"].high) == ("lower-bound", None)
    assert found["gd_rate"].value == 0.5
    for nothing in (Quantity.absent(), Quantity.unresolved(), Quantity.zero()):
        assert set(rates(nothing).values()) == {nothing}


def test_no_rate_reaches_past_one():
    high = rates(Quantity.exact(1e17, 1e16, 1e18))["gd_rate"]
    assert high.high <= 1.0
    assert high.low < 1 - 1e-16


# Through the solver


@pytest.mark.parametrize("decades", [6.0, 10.0, 15.0])
@pytest.mark.parametrize("n", [2, 8])
def test_a_positive_definite_block_of_any_range_has_an_exact_kappa(decades, n):
    matrix = quadratics.graded(torch.linspace(0.5, 2.0, n), decades)
    truth = quadratics.eigenvalues(matrix)
    assert truth[-1] / truth[0] > 10.0 ** (2 * decades - 1)
    found = quadratics.solve(matrix).values
    kappa = found["kappa"]
    assert kappa.status == "exact"
    assert abs(kappa.value / (truth[-1] / truth[0]) - 1) < 1e-12
    assert kappa.high / kappa.low - 1 < 1e-10
    assert quadratics.broken_promises(found, truth) == []
    assert found["n_positive"].value == n
    assert found["ambiguous"] is False
