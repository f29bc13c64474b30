"""A block known by its products only: every certificate against spectra known beforehand."""

from __future__ import annotations

import time
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quadratics
from hessdiag.quantity import Quantity
from hessdiag.run import HORIZONS
from hessdiag.solve import Budget, fitted, solve_matrix_free
from hessdiag_probes import Share, Storage

DOUBLE = torch.float64
SHARE = Share(0, 500, lambda part: part, lambda part: part)
INSIDE = {"interval", "lower-bound", "upper-bound", "estimate", "unresolved", None}
SPECTRA = {
    "spread": torch.linspace(1, 300, 300, dtype=DOUBLE),
    "clustered": torch.tensor([1.0, 2.0, 10.0], dtype=DOUBLE).repeat_interleave(100)
    + 1e-3 * torch.arange(300).double() / 300,
    "outlier": torch.cat([torch.logspace(-3, 0, 297), torch.tensor([50.0, 80.0, 100.0])]).double(),
    "indefinite": torch.linspace(-30, 70, 300, dtype=DOUBLE),
    "low rank": torch.cat([torch.zeros(290), torch.linspace(1, 5, 10)]).double(),
    "singular": torch.cat([torch.zeros(100), torch.logspace(-4, 1, 200)]).double(),
}


def dense_forecast(matrix, gradient, step, steps):
    """``dL_T`` by gradient descent itself on the quadratic model."""
    at = torch.zeros_like(gradient)
    for _ in range(steps):
        at = at - step * (gradient + matrix @ at)
    return -float(gradient @ at + 0.5 * at @ matrix @ at)


def solve(matrix, power=False, **changes):
    budget = {key: changes.pop(key) for key in list(changes) if key in Budget.__dataclass_fields__}
    return quadratics.solve_by_products(matrix, Budget(power=power, **budget), **changes)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(quadratics.KINDS),
    seed=st.integers(0, 10**6),
    steps=st.sampled_from([1, 2, 3, 40]),
    decay=st.sampled_from([0.0, 0.0, 0.1]),
    power=st.booleans(),
)
def test_the_ends_and_kappa_hold_whatever_the_spectrum(kind, seed, steps, decay, power):
    matrix, zeros = quadratics.random_matrix(kind, seed)
    shift = decay * float(matrix.abs().max())
    solved, products = solve(
        matrix, power, steps=steps, probes=0, weight_decay=shift, damping=shift or None
    )
    truth = [x + mp.mpf(shift) for x in quadratics.eigenvalues(matrix, zeros)]
    wanted = quadratics.expected(truth)
    for name in ("lambda_max", "lambda_min", "lambda_min_positive", "kappa", "kappa_abs"):
        quantity = solved.values[name]
        assert quantity.status in INSIDE, name
        if quantity.value is not None:
            assert quadratics.contains(quantity, wanted[(name,)]), (name, quantity)
    if shift:
        sizes = [abs(x) + mp.mpf(shift) for x in truth]
        assert quadratics.contains(solved.values["kappa_damped"], max(sizes) / min(sizes))
    assert quadratics.complaints(solved.values) == []
    assert products <= steps + 20


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_every_field_that_is_claimed_holds(name, power):
    spectrum = SPECTRA[name]
    matrix = quadratics.turned(spectrum)
    solved, products = solve(matrix, power)
    values = solved.values
    norm, square = float(spectrum.abs().max()), float(spectrum.square().sum())
    truth = {
        "lambda_max": float(spectrum.max()),
        "lambda_min": float(spectrum.min()),
        "trace": float(spectrum.sum()),
        "frobenius": square**0.5,
        "stable_rank": square / norm**2,
        "negative_depth": max(-float(spectrum.min()), 0.0) / norm,
    }
    for field, right in truth.items():
        quantity = values[field]
        assert quantity.status == "interval", field
        # One draw in twenty may miss by a little; test_coverage.py counts how often.
        slack = 0.0 if quantity.confidence > 0.99 else 0.5 * (quantity.high - quantity.low)
        assert quantity.low - slack <= right * (1 + 1e-12) + 1e-12, field
        assert quantity.high + slack >= right * (1 - 1e-12) - 1e-12, field
    assert values["method"] == ("power" if power else "lanczos")
    assert products <= 80
    assert quadratics.complaints(values) == []
    for end in ("norm", "diagonal"):
        right = matrix.norm(dim=1) if end == "norm" else matrix.diagonal()
        inside = (solved.rows[f"{end}_low"] <= right.numpy()) & (
            right.numpy() <= solved.rows[f"{end}_high"]
        )
        assert inside.mean() >= 0.7, end  # each holds with 0.95, many fail together


@pytest.mark.parametrize("name", SPECTRA)
def test_the_forecast_brackets_gradient_descent_on_the_model(name):
    spectrum = SPECTRA[name]
    matrix = quadratics.turned(spectrum)
    problem = quadratics.noiseless(matrix, loss=0.0)
    solved, _ = solve(matrix, steps=80, loss=0.0)
    step = 1 / max(solved.values["lambda_max"].high, -solved.values["lambda_min"].low)
    for horizon in HORIZONS:
        right = dense_forecast(matrix, problem.gradient, step, int(horizon))
        total = solved.values["forecast_total"][horizon]
        if total.status == "unresolved":
            assert float(spectrum.min()) < 0, horizon
            continue
        assert total.low <= right * (1 + 1e-9), horizon
        assert total.high is None or total.high >= right * (1 - 1e-9), horizon
        parts = [solved.values[f"forecast_{part}"][horizon] for part in ("positive", "null")]
        assert {part.status for part in parts} == {"estimate"}
        assert [part.low for part in parts] == [None, None]
    if float(spectrum.min()) >= 0:
        assert solved.values["forecast_total"]["1"].status == "interval"


def test_the_search_ends_when_the_tolerance_is_certified_and_not_before():
    matrix = quadratics.turned(torch.linspace(40, 41, 300, dtype=DOUBLE))
    spent = []
    for tolerance in (1e-1, 1e-2, 1e-3, 0.0):
        solved, products = solve(matrix, tolerance=tolerance, probes=0)
        top, bottom = solved.values["lambda_max"], solved.values["lambda_min"]
        if tolerance:
            assert max(top.high - top.value, bottom.value - bottom.low) <= tolerance * top.value
        spent.append(products - 20)
    assert spent[:3] == sorted(set(spent[:3]))
    assert spent[3] == 40


def test_a_definite_spectrum_that_is_bounded_away_from_zero_has_kappa_from_both_sides():
    matrix = quadratics.turned(torch.linspace(1, 2, 300, dtype=DOUBLE))
    values = solve(matrix)[0].values
    kappa = values["kappa"]
    assert kappa.status == "interval"
    assert 1.99 < kappa.low <= 2.0 <= kappa.high < 2.05
    assert kappa.confidence == pytest.approx(0.998)
    assert values["n_positive"].value == 300
    assert values["gd_rate"].status == "interval"


def test_weight_decay_on_a_semidefinite_matrix_closes_kappa_from_above():
    spectrum = SPECTRA["singular"]
    matrix = quadratics.turned(spectrum)
    values = solve(matrix, weight_decay=1e-3, semidefinite=True)[0].values
    right = (10 + 1e-3) / 1e-3
    assert values["kappa"].status == "interval"
    assert values["kappa"].low <= right <= values["kappa"].high * (1 + 1e-12)
    assert values["lambda_min"].low == 1e-3
    open_above = solve(matrix, weight_decay=1e-3)[0].values["kappa"]
    assert open_above.status == "lower-bound"


def bus():
    path = Path(__file__).parents[3] / "shared" / "data" / "1138_bus.mtx"
    if not path.exists():
        pytest.skip("needs ../shared/data/1138_bus.mtx")
    from scipy.io import mmread

    return torch.from_numpy(mmread(path).toarray())


@pytest.mark.parametrize(("scaled", "kappa"), [(False, 8.572646e6), (True, 4.903e5)])
def test_the_bus_network_has_its_largest_eigenvalue_certified_and_never_a_kappa(scaled, kappa):
    matrix = bus()
    if scaled:
        scale = matrix.diagonal().rsqrt()
        matrix = scale[:, None] * matrix * scale
    truth = torch.linalg.eigvalsh(matrix)
    found = quadratics.analyse(matrix, exact_limit=0, steps=60, tolerance=1e-8)
    top, bottom = found["lambda_max"], found["lambda_min"]
    assert top.low <= truth[-1] <= top.high
    assert bottom.low <= truth[0] <= bottom.high
    if not scaled:  # scaled, its upper end is a cluster that 60 products tell apart to 2e-4
        assert top.high - top.low <= 1e-8 * top.value
        assert abs(top.value - truth[-1]) <= 1e-8 * truth[-1]
    assert found["kappa"].status == "lower-bound"
    assert found["kappa"].high is None
    assert found["kappa"].low <= kappa
    assert len(found.spectrum["ritz_value"]) <= 60


def test_dead_rows_are_ignored_and_counted():
    matrix = torch.diag(torch.tensor([1e-17, 1.0, 2.0, 5.0], dtype=DOUBLE))
    rows = torch.tensor([1e-18, 0.0, 0.0, 0.0], dtype=DOUBLE)
    values = solve(matrix, rows=rows)[0].values
    assert values["inactive"] == 1
    assert values["kappa"].low == pytest.approx(5.0)


def test_rows_that_may_be_real_widen_the_ends():
    matrix = torch.diag(torch.tensor([1e-2, 1.0, 2.0, 5.0], dtype=DOUBLE))
    rows = torch.tensor([1e-4, 0.0, 0.0, 0.0], dtype=DOUBLE)
    bottom = solve(matrix, rows=rows)[0].values["lambda_min"]
    assert bottom.low <= 0.0 < 1e-2 <= bottom.high


def test_nothing_is_spent_on_a_zero_matrix():
    solved, products = solve(torch.zeros(5, 5, dtype=DOUBLE))
    assert products == 0
    assert solved.values["kappa"] == Quantity.zero()
    assert (solved.values["inactive"], solved.values["n_zero"].value) == (5, 5)


def test_weight_decay_shifts_all_that_is_seen():
    matrix = quadratics.turned(torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=DOUBLE))
    values = solve(matrix, weight_decay=0.5)[0].values
    assert values["lambda_max"].low == pytest.approx(4.5, rel=1e-12)
    assert values["lambda_min"].high == pytest.approx(0.5, rel=1e-12)
    assert values["kappa"].low == pytest.approx(9.0, rel=1e-10)
    assert values["trace"].low <= 9.0 <= values["trace"].high


def test_negative_curvature_that_was_seen_forbids_a_rate():
    indefinite = solve(quadratics.turned(torch.tensor([-1.0, 1.0, 2.0])))[0]
    assert indefinite.values["gd_rate_applies"] is False
    near = 1e-4 * torch.ones(300, dtype=DOUBLE)
    matrix = quadratics.turned(torch.linspace(1, 2, 300, dtype=DOUBLE))
    definite = solve(matrix, gradient=matrix @ near)[0]
    assert definite.values["gd_rate_applies"] is True
    unknown = quadratics.turned(SPECTRA["singular"])
    assert solve(unknown, gradient=1e-9 * near)[0].values["gd_rate_applies"] is None


@pytest.mark.parametrize("power", [False, True])
def test_without_time_the_ends_are_kept_as_they_are_by_then(power):
    matrix = quadratics.turned(SPECTRA["spread"])
    solved, products = solve(matrix, power, deadline=time.monotonic() - 1)
    assert products <= 3
    top = solved.values["lambda_max"]
    assert top.low <= 300.0 <= top.high
    assert solved.values["trace"] == Quantity.unresolved()
    assert solved.rows == {}
    assert any("--max-seconds" in note for note in solved.values["notes"])


def test_without_probes_their_fields_are_unresolved_and_cost_nothing():
    matrix = quadratics.turned(SPECTRA["indefinite"])
    with_probes, more = solve(matrix)
    without, less = solve(matrix, probes=0)
    assert more - less == 20
    assert without.values["trace"] == without.values["frobenius"] == Quantity.unresolved()
    assert without.values["lambda_max"] == with_probes.values["lambda_max"]


def test_the_density_fills_the_quantiles_of_kappa_with_estimates():
    spectrum = SPECTRA["spread"]
    solved, products = solve(quadratics.turned(spectrum), density=60)
    assert products <= 80 + 600
    found = solved.values["kappa_quantile"]["0.5"]
    assert found.status == "estimate"
    assert found.low <= 300 / 151 <= found.high
    assert len(solved.spectrum["density_grid"]) == len(solved.spectrum["density"]) > 50
    area = np.trapezoid(solved.spectrum["density"], solved.spectrum["density_grid"])
    assert area == pytest.approx(1.0, abs=0.02)


def test_a_stage_that_runs_out_of_memory_costs_no_certificate_of_the_others():
    spectrum, calls = SPECTRA["spread"], []
    matrix = quadratics.turned(spectrum)

    def product(vector):
        calls.append(1)
        if len(calls) == 50:
            raise MemoryError
        return matrix @ vector

    solved, _ = solve_matrix_free(product, quadratics.noiseless(matrix), Budget())
    assert solved.values["lambda_max"].low <= 300 <= solved.values["lambda_max"].high
    assert solved.values["forecast_total"]["1"] == Quantity.unresolved()
    assert solved.values["trace"].status == "interval"
    assert any("out of memory" in note for note in solved.values["notes"])


@pytest.mark.parametrize(
    ("vectors", "power", "forecast", "density"),
    [
        (1000, False, 20, 60),
        (100, False, 20, 60),
        (99, False, 20, 59),
        (60, False, 20, 20),
        (45, False, 5, 5),
        (44, False, 20, 24),
        (25, False, 5, 5),
        (24, True, 14, 14),
        (12, True, 0, 0),
    ],
)
def test_a_budget_is_cut_to_what_fits_and_says_so(vectors, power, forecast, density):
    budget = fitted(Budget(density=60), 5000, number=8, free=vectors * 5000 * 8)
    assert (budget.power, budget.forecast, budget.density) == (power, forecast, density)
    assert bool(budget.reasons) == (vectors < 100)
    assert budget.storage == Storage(dtype=torch.float32 if 25 <= vectors < 45 else None)


@pytest.mark.parametrize(
    ("memory", "storage", "changes"),
    [
        ({"host": 100 * 5000 * 8}, Storage(device="cpu"), 0),
        ({"host": 99 * 5000 * 8}, Storage(device="cpu", dtype=torch.float32), 1),
        ({"host": 24 * 5000 * 8}, Storage(), 1),
        ({"share": SHARE, "ranks": 10}, Storage(share=SHARE), 1),
        ({"share": SHARE, "ranks": 9}, Storage(), 1),
    ],
)
def test_a_basis_moves_to_the_host_then_into_float32_then_over_the_ranks(memory, storage, changes):
    budget = fitted(Budget(density=60), 5000, number=8, free=9 * 5000 * 8, **memory)
    assert budget.storage == storage
    assert budget.power == (storage == Storage())
    assert (len(budget.reasons) > 0, len(budget.told) > 0) == (changes > 0, changes == 0)
    assert budget.elsewhere.dtype is None


def test_a_basis_of_float32_numbers_is_never_called_one():
    budget = fitted(Budget(), 5000, number=4, free=30 * 5000 * 4)
    assert budget.power
    assert budget.storage == Storage()


@pytest.mark.parametrize("name", SPECTRA)
def test_every_field_holds_with_a_basis_in_float32(name):
    spectrum = SPECTRA[name]
    matrix = quadratics.turned(spectrum)
    solved, _ = solve(matrix, storage=Storage(dtype=torch.float32))
    values = solved.values
    for field, right in (("lambda_max", spectrum.max()), ("lambda_min", spectrum.min())):
        quantity = values[field]
        assert quantity.low <= float(right) <= quantity.high, field
    assert values["lambda_max"].high - values["lambda_max"].low <= 0.2 * float(spectrum.abs().max())
    size = float(spectrum.square().sum()) ** 0.5
    assert 0.8 * size <= values["frobenius"].value <= 1.2 * size
    assert quadratics.complaints(values) == []


def test_rounding_that_no_more_steps_can_narrow_is_named_as_the_cause():
    matrix = quadratics.turned(SPECTRA["spread"])
    values = solve(matrix, eps=1e-4, probes=0)[0].values
    assert values["lambda_max"].low <= 300.0 <= values["lambda_max"].high
    assert any("rounding of the products alone" in note for note in values["notes"])
    assert not any("more --steps" in note for note in values["notes"])


def test_a_gradient_of_zero_forecasts_nothing_for_certain():
    matrix = quadratics.turned(SPECTRA["spread"])
    solved, _ = solve(matrix, gradient=torch.zeros(300, dtype=DOUBLE), probes=0)
    assert set(solved.values["forecast_total"].values()) == {Quantity.exact(0.0)}
