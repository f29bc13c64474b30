"""What Ritz pairs certify, and the fields of blocks that are zero, skipped or not exact."""

from __future__ import annotations

import numpy as np
import pytest

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


def ritz_of(value, bound, *, rounding=0.0, tolerance=1e-12):
    value, bound = np.asarray(value, dtype=float), np.asarray(bound, dtype=float)
    return RitzSpectrum(value, bound, rounding, tolerance)


def quantities(fields):
    """Every Quantity, those of an axis too."""
    for value in fields.values():
        if isinstance(value, Quantity):
            yield value
        elif isinstance(value, dict):
            yield from value.values()


def test_the_ends_are_bounds_weakened_by_rounding():
    found = ritz_quantities(ritz_of([-1.0, 3.0], [0.5, 0.5], rounding=1e-3), damping=None)
    assert found["lambda_max"] == Quantity.lower_bound(3.0 - 1e-3)
    assert found["lambda_min"] == Quantity.upper_bound(-1.0 + 1e-3)


def test_kappa_counts_only_ritz_values_whose_residual_proves_a_positive_eigenvalue():
    spectrum = ritz_of([1e-6, 0.1, 2.0, 10.0], [1e-3, 0.2, 0.5, 1e-9])
    found = ritz_quantities(spectrum, damping=None)
    # 1e-6 and 0.1 may be images of the null space; 2 proves one at 2.5 or below.
    assert found["kappa"] == Quantity.lower_bound(10.0 / 2.5)
    assert found["lambda_min_positive"] == Quantity.upper_bound(2.5)


def test_a_converged_ritz_value_below_the_tolerance_proves_nothing():
    found = ritz_quantities(ritz_of([1e-13, 10.0], [0.0, 0.0]), damping=None)
    assert found["kappa"] == Quantity.lower_bound(1.0)
    assert found["lambda_min_positive"] == Quantity.upper_bound(10.0)


def test_kappa_is_unresolved_where_no_residual_is_small_enough():
    found = ritz_quantities(ritz_of([0.5, 1.0], [0.6, 1.2]), damping=None)
    assert found["kappa"] == found["kappa_abs"] == Quantity.unresolved()


def test_kappa_abs_uses_negative_ritz_values_too():
    found = ritz_quantities(ritz_of([-8.0, 0.25, 1.0], [0.0, 0.0, 0.0]), damping=None)
    assert found["kappa_abs"] == Quantity.lower_bound(32.0)
    assert found["kappa"] == Quantity.lower_bound(4.0)


def test_negative_curvature_alone_proves_no_kappa():
    found = ritz_quantities(ritz_of([-8.0, -1.0], [0.0, 0.0]), damping=None)
    assert found["kappa"] == found["lambda_min_positive"] == Quantity.unresolved()


def test_all_that_one_lanczos_run_cannot_know_is_unresolved():
    found = ritz_quantities(ritz_of([-1.0, 3.0], [0.0, 0.0]), damping=1.0)
    known = {"lambda_max", "lambda_min", "lambda_min_positive", "kappa", "kappa_abs"}
    rest = {name: value for name, value in found.items() if name not in known}
    assert set(quantities(rest)) == {Quantity.unresolved()}
    assert found["ambiguous"] is found["margin_above"] is found["margin_below"] is None


@pytest.mark.parametrize("damping", [None, 0.5])
def test_kappa_damped_exists_only_where_damping_was_given(damping):
    wanted = Quantity.absent() if damping is None else Quantity.unresolved()
    found = ritz_quantities(ritz_of([1.0], [0.0]), damping=damping)["kappa_damped"]
    assert found == wanted


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
        ritz_quantities(ritz_of([1.0], [0.0]), damping=None),
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
