"""What Ritz pairs certify, and the fields of blocks that are zero, skipped or not exact."""

from __future__ import annotations

import numpy as np

from hessdiag.conditioning import exact_quantities
from hessdiag.conditioning.bounds import (
    RitzSpectrum,
    absent_quantities,
    never_exact,
    ritz_quantities,
    unresolved_quantities,
    zero_quantities,
)
from hessdiag.quantity import Quantity
from hessdiag.run import THRESHOLDS

FAILURE = 1e-3


def ritz_of(value, bound, *, low=None, high=None, rounding=0.0, tolerance=1e-12, floor=None):
    value, bound = np.asarray(value, dtype=float), np.asarray(bound, dtype=float)
    low = value[0] - 1.0 if low is None else low
    high = value[-1] + 1.0 if high is None else high
    return RitzSpectrum(value, bound, low, high, FAILURE, rounding, tolerance, floor)


def fields_of(*args, size=10, damping=None, **changes):
    return ritz_quantities(ritz_of(*args, **changes), size, damping=damping)


def interval(value, low, high, confidence=1 - FAILURE):
    return Quantity.interval(value, low, high, confidence)


def quantities(fields):
    """Every Quantity, those of an axis too."""
    for value in fields.values():
        if isinstance(value, Quantity):
            yield value
        elif isinstance(value, dict):
            yield from value.values()


def test_the_ends_reach_from_the_ritz_value_to_the_outer_bound_weakened_by_rounding():
    found = fields_of([-1.0, 3.0], [0.5, 0.5], low=-1.5, high=3.25, rounding=0.125)
    assert found["lambda_max"] == interval(3.0, 2.875, 3.375)
    assert found["lambda_min"] == interval(-1.0, -1.625, -0.875)


def test_a_floor_by_structure_cuts_the_lower_end_off():
    found = fields_of([0.5, 3.0], [0.1, 0.1], low=-1.0, floor=0.25, rounding=0.0625)
    assert found["lambda_min"] == interval(0.5, 0.25, 0.5625)
    semidefinite = fields_of([-1e-9, 3.0], [0.1, 0.1], low=-1.0, floor=0.0)["lambda_min"]
    assert (semidefinite.low, semidefinite.value, semidefinite.high) == (0.0, 0.0, 0.0)


def test_kappa_counts_only_ritz_values_whose_residual_proves_a_positive_eigenvalue():
    found = fields_of([1e-6, 0.1, 2.0, 10.0], [1e-3, 0.2, 0.5, 1e-9])
    # 1e-6 and 0.1 may be images of the null space; 2 proves one at 2.5 or below.
    assert found["kappa"] == Quantity.lower_bound(10.0 / 2.5)
    assert found["lambda_min_positive"] == Quantity.upper_bound(2.5)


def test_a_converged_ritz_value_below_the_tolerance_proves_nothing():
    found = fields_of([1e-13, 10.0], [0.0, 0.0])
    assert found["kappa"] == Quantity.lower_bound(1.0)
    assert found["lambda_min_positive"] == Quantity.upper_bound(10.0)


def test_kappa_is_unresolved_where_no_residual_is_small_enough():
    found = fields_of([0.5, 1.0], [0.6, 1.2])
    assert found["kappa"] == found["kappa_abs"] == Quantity.unresolved()


def test_kappa_abs_uses_negative_ritz_values_too():
    found = fields_of([-8.0, 0.25, 1.0], [0.0, 0.0, 0.0])
    assert found["kappa_abs"] == Quantity.lower_bound(32.0)
    assert found["kappa"] == Quantity.lower_bound(4.0)


def test_negative_ritz_values_alone_prove_no_kappa():
    found = fields_of([-8.0, -1.0], [0.0, 0.0], high=0.5)
    assert found["kappa"] == found["lambda_min_positive"] == Quantity.unresolved()


def test_a_spectrum_that_ends_below_zero_has_no_kappa():
    found = fields_of([-8.0, -1.0], [0.0, 0.0], high=-0.5)
    assert found["kappa"] == found["lambda_min_positive"] == Quantity.absent()
    assert set(found["kappa_quantile"].values()) == {Quantity.absent()}
    assert found["n_positive"] == interval(0.0, 0.0, 0.0)


def test_a_lower_bound_above_zero_makes_kappa_two_sided():
    found = fields_of([0.5, 4.0], [0.3, 0.3], low=0.25, high=5.0)
    # The bare Ritz ratio 8 bounds from below, residuals or not; 5 / 0.25 from above.
    assert found["kappa"] == interval(8.0, 8.0, 20.0, 1 - 2 * FAILURE) == found["kappa_abs"]
    assert found["lambda_min_positive"] == found["lambda_min"]
    assert found["n_positive"] == interval(10.0, 10.0, 10.0)
    assert found["n_negative"] == found["n_zero"] == interval(0.0, 0.0, 0.0)


def test_a_lower_bound_within_the_tolerance_is_no_floor():
    found = fields_of([0.5, 4.0], [0.3, 0.3], low=1e-13, high=5.0)
    assert found["kappa"].status == "lower-bound"


def test_weight_decay_on_a_semidefinite_matrix_bounds_kappa_from_above_for_certain():
    found = fields_of([0.5, 4.0], [0.3, 0.3], low=-1.0, high=5.0, floor=0.01)
    assert found["kappa"] == interval(8.0, 8.0, 500.0)
    assert found["n_positive"] == interval(10.0, 10.0, 10.0, 1.0)


def test_kappa_that_rests_on_both_bounds_from_outside_pays_for_both():
    found = fields_of([0.5, 4.0], [0.3, 0.3], low=0.4, high=5.0, floor=0.01)
    assert found["kappa"] == interval(8.0, 8.0, 5.0 / 0.4, 1 - 2 * FAILURE)


def test_a_semidefinite_matrix_without_decay_has_no_upper_bound_on_kappa():
    found = fields_of([0.5, 4.0], [0.3, 0.3], low=-1.0, high=5.0, floor=0.0)
    assert found["kappa"] == Quantity.lower_bound(4.0 / 0.8)
    zero = interval(0.0, 0.0, 0.0, 1.0)
    assert found["negative_count"] == found["negative_depth"] == found["negative_mass"] == zero


def test_the_depth_of_negative_curvature_spans_what_both_ends_allow():
    found = fields_of([-1.0, 3.0], [0.5, 0.5], low=-2.0, high=4.0)["negative_depth"]
    assert found == interval(1 / 3, 1 / 4, 2 / 3, 1 - 2 * FAILURE)
    deeper = fields_of([-4.0, 1.0], [0.5, 0.5], low=-8.0, high=2.0)["negative_depth"]
    assert (deeper.low, deeper.value, deeper.high) == (1.0, 1.0, 1.0)
    unsure = fields_of([0.5, 3.0], [0.5, 0.5], low=-0.5, high=4.0)["negative_depth"]
    assert (unsure.low, unsure.value, unsure.high) == (0.0, 0.0, 0.5 / 3)


def test_all_that_the_ends_cannot_know_is_unresolved():
    found = fields_of([-1.0, 3.0], [0.0, 0.0])
    known = {"lambda_max", "lambda_min", "lambda_min_positive", "kappa", "kappa_abs"}
    known |= {"negative_depth", "kappa_damped"}
    rest = {name: value for name, value in found.items() if name not in known}
    assert set(quantities(rest)) == {Quantity.unresolved()}
    assert found["ambiguous"] is found["margin_above"] is found["margin_below"] is None


def test_kappa_damped_has_both_ends_for_any_matrix():
    found = fields_of([-1.0, 0.5, 3.0], [0.5, 0.25, 0.5], low=-1.5, high=4.0, damping=0.5)
    # |l| comes down to 0.75 at least and may be 0; the norm lies in 3 … 4.
    least = 3.5 / 1.25
    assert found["kappa_damped"] == interval(least, least, 4.5 / 0.5, 1 - 2 * FAILURE)
    floored = fields_of([0.5, 3.0], [0.5, 0.5], low=-1.0, high=4.0, floor=0.5, damping=0.5)
    assert floored["kappa_damped"].high == 4.5


def test_kappa_damped_exists_only_where_damping_was_given():
    assert fields_of([1.0], [0.0])["kappa_damped"] == Quantity.absent()


def test_a_zero_matrix_has_exact_counts_and_no_condition_number():
    found = zero_quantities(7, None)
    assert found["n_zero"] == Quantity.exact(7.0)
    for name in ("n_positive", "n_negative", "lambda_max", "lambda_min", "trace", "frobenius"):
        assert found[name] == Quantity.exact(0.0), name
    for name in ("kappa", "kappa_abs", "lambda_min_positive", "stable_rank"):
        assert found[name] == Quantity.zero(), name
    assert set(found["kappa_quantile"].values()) == {Quantity.zero()}
    assert found["kappa_damped"] == Quantity.absent()
    assert zero_quantities(7, 1.0)["kappa_damped"] == Quantity.zero()


def test_every_way_to_fill_a_row_names_the_same_fields():
    exact = exact_quantities(_unit_spectrum(), eps=1e-16, damping=None)
    wanted = set(exact)
    for fields in (
        unresolved_quantities(),
        absent_quantities(),
        zero_quantities(3, None),
        fields_of([1.0], [0.0]),
    ):
        assert set(fields) == wanted
        assert set(fields["profile_kappa"]) == set(THRESHOLDS)


def test_no_claim_of_exactness_survives_a_hidden_narrower_type():
    before = exact_quantities(_unit_spectrum(), eps=1e-16, damping=1.0)
    after = never_exact(before)
    assert "exact" in {quantity.status for quantity in quantities(before)}
    assert "exact" not in {quantity.status for quantity in quantities(after)}
    assert [q.value for q in quantities(after)] == [q.value for q in quantities(before)]
    assert after["ambiguous"] is before["ambiguous"]


def _unit_spectrum():
    from hessdiag.conditioning import ExactSpectrum, count_inertia

    value = np.array([-1.0, 0.5, 1.0])
    return ExactSpectrum(
        value, np.full(3, 1e-15), 1e-14, count_inertia(value, 1e-14), value, 1.5, 0.0
    )
