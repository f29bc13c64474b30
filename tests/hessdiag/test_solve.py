"""One block's matrix to its row: every interval holds, whatever the spectrum."""

from __future__ import annotations

from dataclasses import replace

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quadratics
from hessdiag.conditioning.bounds import SCALARS
from hessdiag.quantity import Quantity
from hessdiag.run import HORIZONS
from hessdiag.solve import (
    measure_noise,
    skipped_fields,
    solve_exact,
)

EPS = torch.finfo(torch.float64).eps


# The truth lies inside every interval


@settings(max_examples=500, deadline=None, derandomize=True)
@given(kind=st.sampled_from(quadratics.KINDS), seed=st.integers(0, 10**6))
def test_the_truth_lies_inside_every_interval(kind, seed):
    matrix, zeros = quadratics.random_matrix(kind, seed)
    found = quadratics.solve(matrix).values
    truth = quadratics.eigenvalues(matrix, zeros)
    assert quadratics.broken_promises(found, truth) == []
    assert quadratics.complaints(found) == []
    counts = [found[name] for name in ("n_positive", "n_negative", "n_zero")]
    assert sum(count.value for count in counts) == len(matrix)
    if not found["ambiguous"]:
        wanted = quadratics.expected(truth)
        for name, count in zip(("n_positive", "n_negative", "n_zero"), counts, strict=True):
            assert count.low == count.value == count.high == wanted[(name,)], name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([k for k in quadratics.KINDS if k != "near the tolerance"]),
    seed=st.integers(0, 10**6),
    decay=st.floats(1e-6, 10.0),
    damping=st.floats(1e-6, 10.0),
)
def test_weight_decay_and_damping_keep_every_interval_right(kind, seed, decay, damping):
    matrix, zeros = quadratics.random_matrix(kind, seed)
    norm = float(matrix.abs().max())
    found = quadratics.solve(matrix, weight_decay=decay * norm, damping=damping * norm).values
    truth = [x + mp.mpf(decay * norm) for x in quadratics.eigenvalues(matrix, zeros)]
    assert quadratics.broken_promises(found, truth) == []
    sizes = [abs(x) + mp.mpf(damping * norm) for x in truth]
    assert quadratics.contains(found["kappa_damped"], max(sizes) / min(sizes))


# Matrices with a name


@pytest.mark.parametrize("decades", [12, 20])
def test_a_huge_positive_range_is_right_to_ten_digits_and_says_so(decades):
    matrix = quadratics.graded(torch.linspace(0.5, 2.0, 12), decades / 2)
    truth = quadratics.eigenvalues(matrix)
    found = quadratics.solve(matrix).values
    kappa = found["kappa"]
    assert kappa.status == "exact"
    assert abs(kappa.value / (truth[-1] / truth[0]) - 1) < 1e-10
    assert kappa.high / kappa.low - 1 < 1e-10
    assert quadratics.broken_promises(found, truth) == []


def test_an_indefinite_graded_matrix_is_counted_right_and_bounded_from_below():
    spectrum = torch.tensor([-1.0, 0.7, -0.8, 1.1, -1.2, 0.9, 1.0, -1.1])
    matrix = quadratics.graded(spectrum, 9.0)
    truth = quadratics.eigenvalues(matrix)
    found = quadratics.solve(matrix).values
    assert (found["n_positive"].value, found["n_negative"].value) == (4, 4)
    assert found["ambiguous"] is False
    kappa = found["kappa"]
    positive = [x for x in truth if x > 0]
    assert kappa.status == "lower-bound"
    assert 1e10 < kappa.low <= truth[-1] / positive[0]
    assert any("lower bound" in note for note in found["notes"])


def test_a_zero_matrix_has_a_row_without_condition_numbers():
    solved = quadratics.solve(torch.zeros(3, 3, dtype=torch.float64))
    assert solved.values["kappa"] == solved.values["gd_rate"] == Quantity.zero()
    assert solved.values["forecast_total"]["10"] == Quantity.zero()
    assert (solved.values["inactive"], solved.values["n_zero"].value) == (3, 3)
    assert solved.values["gd_rate_applies"] is False
    assert solved.spectrum["eigenvalue"].tolist() == [0.0, 0.0, 0.0]


def test_weight_decay_alone_conditions_a_zero_matrix_perfectly():
    found = quadratics.solve(torch.zeros(3, 3, dtype=torch.float64), weight_decay=0.1).values
    assert (found["kappa"].value, found["n_positive"].value, found["inactive"]) == (1.0, 3, 3)


# Invariances


@pytest.mark.parametrize("kind", [k for k in quadratics.KINDS if k != "near the tolerance"])
def test_every_relative_field_is_the_same_in_other_units(kind):
    matrix, _ = quadratics.random_matrix(kind, 5)
    matrix = matrix / matrix.abs().max()
    plain = quadratics.solve(matrix).values
    for scale in (2.0**-60, 2.0**60):
        scaled = quadratics.solve(scale * matrix).values
        for name in SCALARS:
            one, other = plain[name], scaled[name]
            unit = scale if name in _IN_LOSS_UNITS else 1.0
            assert one.status == other.status, name
            if one.value is not None:
                assert other.value == pytest.approx(unit * one.value, rel=1e-12, abs=1e-300), name
        for name in ("profile_kappa", "profile_n_positive", "kappa_quantile"):
            assert plain[name] == scaled[name], name
        assert plain["ambiguous"] == scaled["ambiguous"]
        assert plain["margin_above"] == pytest.approx(scaled["margin_above"])


_IN_LOSS_UNITS = {"lambda_max", "lambda_min", "lambda_min_positive", "trace", "frobenius"}


@pytest.mark.parametrize("turn", ["rotation", "permutation"])
def test_an_orthogonal_change_of_parameters_changes_nothing(turn):
    spectrum = torch.tensor([-2.0, -0.5, 0.0, 0.01, 1.0, 3.0], dtype=torch.float64)
    matrix = quadratics.turned(spectrum)
    seeded = torch.Generator().manual_seed(3)
    if turn == "rotation":
        change, _ = torch.linalg.qr(torch.randn(6, 6, generator=seeded, dtype=torch.float64))
    else:
        change = torch.eye(6, dtype=torch.float64)[torch.randperm(6, generator=seeded)]
    at = quadratics.default_position(6)
    other_matrix = change @ matrix @ change.T
    one = quadratics.solve(matrix, at).values
    other = quadratics.solve((other_matrix + other_matrix.T) / 2, change @ at).values
    for name in SCALARS:
        assert one[name].status == other[name].status, name
        if one[name].value is not None:
            assert other[name].value == pytest.approx(one[name].value, rel=1e-9, abs=1e-13), name
    for horizon in HORIZONS[:3]:
        for part in ("positive", "null", "negative"):
            name = f"forecast_{part}"
            wanted = pytest.approx(one[name][horizon].value, rel=1e-9, abs=1e-12)
            assert other[name][horizon].value == wanted, (part, horizon)


# Noise


def test_noise_rows_are_zeroed_before_any_scaling():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 1e-17], dtype=torch.float64))
    rows = torch.tensor([0.0, 0.0, 1e-18], dtype=torch.float64)
    found = solve_exact(matrix, quadratics.noiseless(matrix, rows=rows)).values
    assert (found["inactive"], found["n_positive"].value, found["n_zero"].value) == (1, 2, 1)
    assert (found["kappa"].value, found["kappa"].status) == (2.0, "exact")
    kept = solve_exact(matrix, quadratics.noiseless(matrix)).values
    assert (kept["inactive"], kept["n_positive"].value) == (0, 3)


def test_a_matrix_of_nothing_but_noise_is_zero():
    matrix = 1e-17 * quadratics.turned(torch.tensor([-1.0, 0.5, 1.0]))
    found = solve_exact(matrix, quadratics.noiseless(matrix, block=1e-18)).values
    assert (found["inactive"], found["kappa"]) == (3, Quantity.zero())


def test_noise_widens_the_intervals_by_all_that_it_can_do():
    matrix = torch.diag(torch.tensor([1e-6, 1.0], dtype=torch.float64))
    quiet = solve_exact(matrix, quadratics.noiseless(matrix)).values["kappa"]
    nu = 1e-10
    noisy = quadratics.noiseless(matrix, rows=torch.full((2,), nu, dtype=torch.float64), block=nu)
    noisy = replace(noisy, noise=replace(noisy.noise, error=lambda v: nu * v))
    loud = solve_exact(matrix, noisy).values["kappa"]
    assert quiet.high / quiet.low - 1 < 1e-7
    assert loud.low <= 1 / (1e-6 + nu)
    assert loud.high is None or loud.high >= 1 / (1e-6 - nu)


def test_live_rows_whose_entries_cancel_are_not_taken_for_dead():
    # A Laplacian: with plain sign vectors, (1, -1) rows sum to exactly zero half the time.
    n = 64
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for i in range(0, n, 2):
        matrix[i : i + 2, i : i + 2] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    noise = measure_noise(
        torch.zeros_like,
        lambda v: matrix @ v,
        torch.zeros(n, dtype=torch.float64),
        seed=0,
        name="whole",
        gradient=0.0,
    )
    assert bool((noise.seen > 1e-3).all())


def test_noise_is_measured_per_row_and_for_a_unit_vector():
    rows = torch.tensor([1e-9, 0.0, 1e-12, 1e-3], dtype=torch.float64)
    noise = measure_noise(
        lambda v: rows * v, lambda v: v, torch.zeros(4).double(), seed=0, name="b", gradient=7.0
    )
    assert bool((noise.rows >= rows / 2).all())
    assert bool((noise.rows <= 1.5 * rows).all())
    assert 1e-4 < noise.block < 1e-3
    assert noise.gradient == 7.0


def test_noise_of_narrow_products_neither_overflows_nor_vanishes():
    for scale in (1e-30, 1e30):
        noise = measure_noise(
            lambda v, scale=scale: scale * v,
            lambda v, scale=scale: scale * v,
            torch.zeros(4, dtype=torch.float32),
            seed=0,
            name="b",
            gradient=0.0,
        )
        assert noise.block == pytest.approx(scale, rel=1e-5)


# What goes into the file


def test_stored_vectors_are_eigenvectors_and_zero_on_dead_rows():
    inner = quadratics.turned(torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0, 7.0], dtype=torch.float64))
    matrix = torch.zeros(9, 9, dtype=torch.float64)
    live = torch.tensor([0, 2, 3, 5, 6, 8])
    matrix[live[:, None], live] = inner
    solved = quadratics.solve(matrix)
    vector, value = solved.spectrum["vector"], solved.spectrum["vector_value"]
    np.testing.assert_allclose(value, [-2.0, 0.0, 3.0, 7.0], atol=1e-13)
    np.testing.assert_allclose(matrix.numpy() @ vector.T, vector.T * value, atol=1e-12)
    np.testing.assert_allclose(vector @ vector.T, np.eye(4), atol=1e-12)
    assert not vector[:, [1, 4, 7]].any()


def test_the_stored_spectrum_is_ascending_and_has_a_zero_per_dead_row():
    matrix = torch.diag(torch.tensor([0.0, -1.0, 0.0, 2.0], dtype=torch.float64))
    solved = quadratics.solve(matrix)
    np.testing.assert_allclose(solved.spectrum["eigenvalue"], [-1.0, 0.0, 0.0, 2.0])
    assert solved.values["inactive"] == 2


def test_rows_hold_norms_and_diagonal_with_weight_decay_inside_their_bounds():
    matrix = quadratics.turned(torch.tensor([-1.0, 0.5, 4.0], dtype=torch.float64))
    rows = quadratics.solve(matrix, weight_decay=0.25).rows
    shifted = matrix + 0.25 * torch.eye(3)
    np.testing.assert_allclose(rows["norm"], shifted.norm(dim=1), rtol=1e-14)
    np.testing.assert_allclose(rows["diagonal"], shifted.diagonal(), rtol=1e-14)
    for name in ("norm", "diagonal"):
        assert (rows[f"{name}_low"] <= rows[name]).all()
        assert (rows[name] <= rows[f"{name}_high"]).all()


def test_a_live_row_may_have_had_what_zeroed_columns_took_from_it():
    # Row 2 is within a thousand times its noise, and real.
    matrix = torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0], [4.0, 0.0, 0.0]], dtype=torch.float64)
    rows = torch.tensor([0.0, 0.0, 0.01], dtype=torch.float64)
    found = solve_exact(matrix, quadratics.noiseless(matrix, rows=rows, block=1e-9))
    assert found.values["inactive"] == 1
    low, high = found.rows["norm_low"], found.rows["norm_high"]
    assert (low <= np.array([5.0, 2.0, 4.0])).all()
    assert (high >= np.array([5.0, 2.0, 4.0])).all()
    assert high[1] < 2 + 1e-6
    assert found.rows["diagonal_high"][0] < 3 + 1e-6  # of which nothing was zeroed


@pytest.mark.parametrize(
    ("spectrum", "distance", "applies"),
    [
        ([0.5, 1.0], 1e-3, True),
        ([0.5, 1.0], 1.0, False),  # far from a stationary point
        ([-0.5, 1.0], 1e-3, False),
        ([-1.0, -0.5], 1e-3, False),
    ],
)
def test_the_rate_applies_to_a_definite_block_near_a_stationary_point(spectrum, distance, applies):
    matrix = quadratics.turned(torch.tensor(spectrum, dtype=torch.float64))
    at = torch.ones(2, dtype=torch.float64)
    problem = replace(quadratics.noiseless(matrix), gradient=distance * matrix @ at, position=at)
    assert solve_exact(matrix, problem).values["gd_rate_applies"] is applies


def test_a_skipped_row_has_every_field_and_no_number():
    solved = quadratics.solve(torch.eye(2, dtype=torch.float64)).values
    skipped = skipped_fields()
    assert set(skipped) == set(solved)
    assert skipped["loss"] is skipped["gradient_norm"] is None
    for value in skipped.values():
        for quantity in value.values() if isinstance(value, dict) else [value]:
            if isinstance(quantity, Quantity):
                assert quantity == Quantity.absent()
