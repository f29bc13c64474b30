from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from density_draws import BLOCKS, pick, solve, truths, wrong
from hessdiag.quantity import Quantity


@pytest.mark.parametrize("name", BLOCKS)
def test_intervals_hold_as_often_as_they_say(name):
    known = truths(BLOCKS[name])
    misses = dict.fromkeys(known, 0)
    for seed in range(4):
        for key in wrong(solve(BLOCKS[name], seed=seed, probes=3, steps=12).values, known):
            misses[key] += 1
    # Nominal 0.2 of 4; three have a probability of 0.05 %.
    assert max(misses.values()) <= 2, misses


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_intervals_hold_over_many_seeds(name):
    known = truths(BLOCKS[name])
    misses = dict.fromkeys(known, 0)
    for seed in range(250):  # 2000 over the eight spectra
        for key in wrong(solve(BLOCKS[name], seed=seed, probes=3, steps=12).values, known):
            misses[key] += 1
    allowed = 250 * 0.05 + 3.5 * math.sqrt(250 * 0.05 * 0.95)
    assert max(misses.values()) <= allowed, misses


@pytest.mark.parametrize("name", BLOCKS)
def test_every_number_is_whole_and_says_what_it_is(name):
    found = solve(BLOCKS[name]).values
    for key in truths(BLOCKS[name]):
        quantity = pick(found, key)
        if quantity is None or quantity.value is None:
            continue
        assert quantity.status in {"estimate", "interval"}
        assert quantity.low <= quantity.value <= quantity.high
        if quantity.status == "estimate":
            assert quantity.confidence == 0.95
        if "_n_" in key[0] or key[0].startswith("n_"):
            assert all(float(x).is_integer() for x in (quantity.low, quantity.value, quantity.high))
            assert 0 <= quantity.low <= quantity.high <= 120


def test_what_is_resolved_is_reported_and_close():
    found = solve(BLOCKS["low rank"], probes=10).values
    # Ten eigenvalues among 120: the runs are invariant, so only the probes err.
    assert found["n_positive"].low >= 6
    assert found["n_positive"].high <= 16
    assert found["n_zero"].low >= 104
    assert found["n_zero"].high <= 114
    assert found["profile_kappa"]["1e-06"].low == pytest.approx(10, rel=2e-3)
    assert found["profile_kappa"]["1e-06"].high == pytest.approx(10, rel=2e-3)
    assert 1 < found["kappa_quantile"]["0.5"].high < 3


def test_counts_add_up_to_the_size():
    for name in ("indefinite", "low rank"):
        found = solve(BLOCKS[name]).values
        assert sum(found[f"n_{sign}"].value for sign in ("positive", "negative", "zero")) == 120


def test_counts_are_shares_of_the_same_number():
    found = solve(BLOCKS["indefinite"]).values
    count, share = found["n_negative"], found["negative_count"]
    assert (share.value, share.low, share.high) == (
        count.value / 120,
        count.low / 120,
        count.high / 120,
    )


def test_a_quantile_below_the_resolution_is_unresolved():
    found = solve(BLOCKS["far spread"], steps=10)
    assert found.values["kappa_quantile"]["0.9"] == Quantity.unresolved()
    assert "0.9: its eigenvalue is below the resolution" in found.note


def test_a_count_that_the_runs_leave_open_by_half_is_unresolved():
    found = solve(BLOCKS["far spread"], steps=4).values
    assert found["n_positive"] == Quantity.unresolved()
    assert found["n_zero"] == Quantity.unresolved()
    assert found["profile_n_positive"]["1e-06"] == Quantity.unresolved()
    assert found["profile_kappa"]["1e-06"] == Quantity.unresolved()
    assert found["profile_n_positive"]["1e-01"].status == "estimate"


def test_a_kappa_of_the_profile_open_by_a_decade_is_unresolved():
    found = solve(torch.linspace(-1, 1, 120, dtype=torch.float64), steps=20).values
    assert found["profile_n_positive"]["1e-04"].status == "estimate"
    assert found["profile_kappa"]["1e-04"] == Quantity.unresolved()
    assert found["profile_kappa"]["1e-01"].status == "estimate"


def test_thresholds_below_the_zero_tolerance_are_unresolved():
    found = solve(BLOCKS["clustered"], tolerance=2e-3).values
    for field in ("profile_n_positive", "profile_n_negative", "profile_kappa"):
        assert found[field]["1e-03"] == Quantity.unresolved()
        assert found[field]["1e-02"] != Quantity.unresolved()


def test_a_positive_floor_settles_the_counts_and_bounds_every_quantile():
    found = solve(BLOCKS["far spread"], steps=6, floor=1e-9).values
    assert "n_positive" not in found
    ninth = found["kappa_quantile"]["0.9"]
    assert ninth.status == "estimate"
    assert ninth.high == pytest.approx(1e9, rel=1e-3)
    assert found["profile_n_negative"]["1e-01"] == Quantity.interval(0.0, 0.0, 0.0, 1.0)


def test_a_known_definite_block_takes_the_quantile_of_all():
    values = BLOCKS["spread"]
    found = solve(values, floor=0.009, steps=30).values["kappa_quantile"]["0.5"]
    assert found.low <= float(values[-1] / values[60]) <= found.high
    assert found.high / found.low < 4


def test_a_semidefinite_block_has_no_negative_count():
    found = solve(BLOCKS["singular"], floor=0.0, steps=40).values
    assert found["n_negative"] == Quantity.interval(0.0, 0.0, 0.0, 1.0)
    assert "negative_count" not in found
    assert found["n_zero"].value == 120 - found["n_positive"].value
    assert found["n_zero"].low == 120 - found["n_positive"].high
    assert found["n_zero"].high == 120 - found["n_positive"].low


def test_a_negative_block_has_no_quantile_of_its_positive_part():
    found = solve(BLOCKS["negative"]).values
    assert "kappa_quantile" not in found
    assert "n_positive" not in found
    assert found["profile_kappa"]["1e-01"] == Quantity.absent()
    assert found["n_negative"].low >= 110


def test_wider_ends_make_wider_intervals():
    narrow = solve(BLOCKS["clustered"], width=1e-6).values
    wide = solve(BLOCKS["clustered"], width=0.1).values
    for field, key in (("kappa_quantile", "0.9"), ("profile_kappa", "1e-02")):
        assert wide[field][key].high > 1.05 * narrow[field][key].high
        assert wide[field][key].low <= narrow[field][key].low
    # 0.1 ‖H‖ lies between 0.1 and 0.11, and so may pass the cluster at 0.1.
    assert narrow["profile_n_positive"]["1e-01"].low > 100
    assert wide["profile_n_positive"]["1e-01"].low < 95
    assert narrow["profile_kappa"]["1e-01"].low > 9
    assert wide["profile_kappa"]["1e-01"].low < 5.1


def test_rounding_of_the_products_widens_the_eigenvalues():
    narrow, wide = (solve(BLOCKS["clustered"], rounding=r).values for r in (1e-13, 5e-3))
    for field, key in (("profile_kappa", "1e-02"), ("kappa_quantile", "0.9")):
        assert wide[field][key].high >= 1.04 * narrow[field][key].high
        assert wide[field][key].low <= 0.98 * narrow[field][key].low


def test_an_eigenvalue_near_the_zero_tolerance_may_count_or_not():
    values = torch.tensor([0.0, 0.011, 1.0], dtype=torch.float64).repeat(40)
    found = solve(values, tolerance=0.01, rounding=0.002).values
    assert found["n_zero"].low <= 40
    assert found["n_zero"].high >= 80
    assert found["n_positive"].low <= 40
    assert found["n_positive"].high >= 80


def test_the_note_tells_the_two_errors_apart():
    note = solve(BLOCKS["spread"], probes=4, steps=12).note
    assert note.startswith("density from 4 probes of 12 steps; kappa_quantile 0.5: probe error ±")
    assert ", resolution ±" in note


def test_the_arrays_hold_a_density_and_its_errors():
    arrays = solve(BLOCKS["spread"], steps=12).arrays
    grid, density = arrays["density_grid"], arrays["density"]
    assert grid.shape == density.shape == arrays["density_stderr"].shape == (1024,)
    assert float(torch.trapezoid(torch.tensor(density), torch.tensor(grid))) == pytest.approx(
        1, abs=1e-3
    )
    span = float(BLOCKS["spread"][-1] - BLOCKS["spread"][0])
    assert float(arrays["density_resolution"]) == pytest.approx(5 * span / 144, rel=0.1)
    assert 0 < float(arrays["density_width"]) < 0.1 * span
    assert all(array.dtype == np.float64 for array in arrays.values())
