from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hessdiag.conditioning.bounds import RitzSpectrum
from hessdiag.conditioning.density import density_fields
from hessdiag.quantity import Quantity
from hessdiag.run import QUANTILES, THRESHOLDS
from hessdiag_probes import generator, stochastic_quadrature

TAU = 1e-11
BLOCKS = {
    "spread": torch.logspace(-2, 0, 120, dtype=torch.float64),
    "far spread": torch.logspace(-9, 0, 120, dtype=torch.float64),
    "clustered": torch.cat([c + 1e-6 * torch.arange(40) for c in (0.1, 0.2, 1.0)]).double(),
    "outlier": torch.cat([torch.linspace(0.001, 0.01, 118), torch.tensor([0.3, 1.0])]).double(),
    "indefinite": torch.cat([torch.linspace(-0.5, -0.1, 40), torch.linspace(0.2, 1, 80)]).double(),
    "low rank": torch.cat([torch.zeros(110), torch.linspace(0.1, 1, 10)]).double(),
    "singular": torch.cat([torch.zeros(40), torch.logspace(-2, 0, 80)]).double(),
    "negative": -torch.linspace(0.1, 1, 120, dtype=torch.float64),
}


def ends(values, *, floor=None, width=1e-4, tolerance=TAU, rounding=1e-13):
    """What a Lanczos run would know of these eigenvalues, with outer ends off by ``width``."""
    low, high = float(values.min()), float(values.max())
    return RitzSpectrum(
        value=np.array([low + width / 3, high - width / 3]),
        bound=np.array([width / 3, width / 3]),
        low=low - width,
        high=high + width,
        failure=1e-3,
        rounding=rounding,
        tolerance=tolerance,
        floor=floor,
    )


def solve(values, *, seed=0, probes=5, steps=20, **known):
    quadrature = stochastic_quadrature(
        lambda v: values * v, len(values), probes, steps, generator=generator(seed, "density")
    )
    return density_fields(quadrature, ends(values, **known))


def truths(values):
    """The fields of the contract for these eigenvalues; keys as in the values, axes as pairs."""
    values = values.sort(descending=True).values
    n, top, norm = len(values), float(values[0]), float(values.abs().max())
    positive, negative = int((values > TAU).sum()), int((values < -TAU).sum())
    found = {
        ("n_positive",): positive,
        ("n_negative",): negative,
        ("n_zero",): n - positive - negative,
        ("negative_count",): negative / n,
    }
    for q in QUANTILES:
        if positive:
            k = math.ceil(round(float(q) * positive, 9))
            found["kappa_quantile", q] = top / float(values[k - 1])
    for t in THRESHOLDS:
        beyond = values[values > float(t) * norm]
        found["profile_n_positive", t] = len(beyond)
        found["profile_n_negative", t] = int((values < -float(t) * norm).sum())
        if len(beyond):
            found["profile_kappa", t] = top / float(beyond[-1])
    return found


def pick(values, key):
    found = values.get(key[0])
    return found[key[1]] if len(key) == 2 and found is not None else found


def wrong(values, known):
    """The keys whose interval does not hold the truth."""
    found = []
    for key, truth in known.items():
        quantity = pick(values, key)
        if quantity is None or quantity.status == "unresolved":
            continue
        reach = 1e-12 * abs(truth)
        if quantity.low is None or not quantity.low - reach <= truth <= quantity.high + reach:
            found.append(key)
    return found


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
