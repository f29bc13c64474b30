"""The forecast against gradient descent that is really run, and against 50 digits."""

from __future__ import annotations

import mpmath as mp
import numpy as np
import pytest
import torch

import quadratics
from hessdiag.conditioning.forecast import gd_forecast, uniform_forecast
from hessdiag.quantity import Quantity
from hessdiag.run import HORIZONS

PARTS = ("positive", "null", "negative", "total")
SPECTRA = {
    "definite": [0.01, 0.1, 1.0, 3.0],
    "singular": [0.0, 0.0, 0.5, 2.0],
    "indefinite": [-0.3, -0.01, 0.0, 0.2, 1.0],
    "mostly negative": [-5.0, -1.0, 0.5],
    "repeated": [1.0, 1.0, 1.0],
}


def forecast(value, coefficient, *, tolerance=1e-12, loss=1e9, resolved=True, **changes):
    value = np.asarray(value, dtype=float)
    options = {
        "error": np.full(value.size, 1e-14),
        "gradient_error": 0.0,
        "tolerance": tolerance,
        "loss": loss,
        "resolved": resolved,
    } | changes
    return gd_forecast(value, np.asarray(coefficient, dtype=float), **options)


def exact_forecast(value, coefficient, steps):
    """The parts in 50 digits, with the step 1/‖H‖."""
    value = [mp.mpf(x) for x in value]
    step = 1 / max(abs(x) for x in value)
    found = dict.fromkeys(PARTS, mp.mpf(0))
    for x, c in zip(value, map(mp.mpf, coefficient), strict=True):
        gain = steps * step if x == 0 else (1 - (1 - step * x) ** (2 * steps)) / (2 * x)
        part = "null" if x == 0 else "positive" if x > 0 else "negative"
        found[part] += c * c * gain
        found["total"] += c * c * gain
    return found


def descended(matrix, position, steps):
    """The decrease of ½ pᵀAp by gradient descent that is really run."""
    at, step = position.clone(), 1 / torch.linalg.eigvalsh(matrix).abs().max()
    before = 0.5 * at @ matrix @ at
    for _ in range(steps):
        at = at - step * (matrix @ at)
    return float(before - 0.5 * at @ matrix @ at)


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_total_is_what_gradient_descent_gains(name, steps):
    matrix = quadratics.turned(torch.tensor(SPECTRA[name], dtype=torch.float64))
    at = quadratics.default_position(len(matrix))
    found = quadratics.solve(matrix, at).values
    parts = [found[f"forecast_{part}"][str(steps)].value for part in PARTS[:3]]
    gained = descended(matrix, at, steps)
    if None in parts:
        assert not np.isfinite(gained) or gained > 1e290
    else:
        assert sum(parts) == pytest.approx(gained, rel=1e-11, abs=1e-12)
    total = found["forecast_total"][str(steps)]
    if total.status == "exact":
        assert total.value == pytest.approx(gained, rel=1e-11)


@pytest.mark.parametrize("name", SPECTRA)
def test_every_part_at_every_horizon_holds_the_closed_form(name):
    value = SPECTRA[name]
    coefficient = [(-1) ** i * (1.0 + i) for i in range(len(value))]
    found = forecast(value, coefficient)
    for horizon in HORIZONS:
        truth = exact_forecast(value, coefficient, int(horizon))
        for part in PARTS:
            quantity = found[f"forecast_{part}"][horizon]
            if quantity.status == "unresolved":
                assert part in ("negative", "total")
                continue
            assert quantity.low <= truth[part] <= quantity.high, (part, horizon)
            slack = 1e-7 * float(truth["total"])
            assert quantity.high - quantity.low <= slack, (part, horizon)


def test_descent_along_a_null_direction_is_linear_in_the_steps():
    found = forecast([0.0, 2.0], [3.0, 0.0])["forecast_null"]
    for horizon in HORIZONS:
        assert found[horizon].value == pytest.approx(int(horizon) * 9.0 / 2.0, rel=1e-12)


def test_a_definite_block_is_forecast_to_its_minimum():
    matrix = quadratics.turned(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    at = quadratics.default_position(3)
    total = quadratics.solve(matrix, at).values["forecast_total"]["1000"]
    assert total.status == "exact"
    assert total.value == pytest.approx(0.5 * float(at @ matrix @ at), rel=1e-13)


@pytest.mark.parametrize("seed", range(12))
def test_reaching_the_minimum_is_no_reason_to_leave_the_total_unresolved(seed):
    # The gain equals the whole loss, and may exceed it by rounding.
    matrix = quadratics.turned(torch.tensor([1.0, 1.0 + 1e-7, 1.0 + 2e-7]).double(), seed)
    at = quadratics.default_position(3) * (1 + seed)
    found = quadratics.solve(matrix, at).values["forecast_total"]
    assert {quantity.status for quantity in found.values()} == {"exact"}


def test_a_total_above_the_loss_is_no_forecast():
    value, coefficient = [0.0, 1.0], [1.0, 0.0]  # gains T
    found = forecast(value, coefficient, loss=50.0)["forecast_total"]
    assert [found[h].status for h in HORIZONS] == ["exact", "exact", "unresolved", "unresolved"]
    free = forecast(value, coefficient, loss=-1.0)["forecast_total"]
    assert {q.status for q in free.values()} == {"exact"}


def test_a_negative_part_over_a_tenth_leaves_the_total_unresolved():
    mostly = forecast([-1.0, 1.0], [0.3, 3.0])["forecast_total"]
    assert mostly["1"].status == "exact"  # 0.135 of 4.6
    assert mostly["10"].status == "unresolved"


@pytest.mark.parametrize("loss", [0.0, -1.0, 1.0])
def test_what_overflows_is_unresolved_and_warns_of_nothing(loss):
    found = forecast([-1.0, -0.9, 0.5], [1.0, 1e-200, 1.0], loss=loss)
    assert found["forecast_negative"]["1000"] == Quantity.unresolved()
    assert found["forecast_total"]["1000"] == Quantity.unresolved()
    assert found["forecast_positive"]["1000"].status == "exact"


@pytest.mark.parametrize("scale", [1e-120, 1e-9, 1e9, 1e120])
def test_the_forecast_is_in_units_of_the_loss(scale):
    value, coefficient = np.array([-0.001, 0.0, 0.3, 1.0]), np.array([0.1, 1.0, 2.0, 3.0])
    plain = forecast(value, coefficient, loss=100.0)
    scaled = forecast(
        scale * value,
        scale * coefficient,
        loss=scale * 100.0,
        tolerance=scale * 1e-12,
        error=np.full(4, scale * 1e-14),
    )
    for part in PARTS:
        for horizon in HORIZONS:
            one, other = plain[f"forecast_{part}"][horizon], scaled[f"forecast_{part}"][horizon]
            assert one.status == other.status, (part, horizon)
            if one.value is not None:
                assert other.value == pytest.approx(scale * one.value, rel=1e-12)
                assert other.high == pytest.approx(scale * one.high, rel=1e-12)


def test_a_wrong_gradient_widens_every_part_that_it_reaches():
    exact = forecast([0.0, 1.0], [1.0, 1.0])
    vague = forecast([0.0, 1.0], [1.0, 1.0], gradient_error=1e-3)
    for part in ("positive", "null", "total"):
        found, sharp = vague[f"forecast_{part}"]["10"], exact[f"forecast_{part}"]["10"]
        moved = forecast([0.0, 1.0], [1.0005, 1.0005])[f"forecast_{part}"]["10"].value
        assert found.low <= moved <= found.high, part
        assert not sharp.low <= moved <= sharp.high, part


@pytest.mark.parametrize(("part", "value"), [("positive", 0.1), ("negative", -0.5)])
def test_wrong_eigenvalues_are_within_the_interval(part, value):
    found = forecast([value, 1.0], [1.0, 0.0], error=np.full(2, 1e-6))[f"forecast_{part}"]
    for horizon in HORIZONS[:3]:
        for shift in (-1e-6, 1e-6):
            truth = exact_forecast([value + shift, 1.0], [1.0, 0.0], int(horizon))[part]
            assert found[horizon].low <= truth <= found[horizon].high, horizon


def test_an_eigenvalue_at_the_tolerance_may_count_on_either_side():
    found = forecast([1e-9, 1.0], [1.0, 1.0], tolerance=0.99e-9, error=np.full(2, 1e-10))
    positive, null = found["forecast_positive"]["10"], found["forecast_null"]["10"]
    assert positive.low <= positive.value - 9.9
    assert null.value == 0.0
    assert null.high >= 9.9


def test_unseen_inertia_lets_the_null_part_belong_to_the_others():
    sure = forecast([0.0, 1.0], [1.0, 1.0])
    unsure = forecast([0.0, 1.0], [1.0, 1.0], resolved=False)
    for part in ("positive", "negative"):
        gap = unsure[f"forecast_{part}"]["10"].high - sure[f"forecast_{part}"]["10"].high
        assert gap == pytest.approx(10.0, rel=1e-9)
    assert unsure["forecast_null"]["10"].low == pytest.approx(0.0, abs=1e-9)
    assert unsure["forecast_total"]["10"] == sure["forecast_total"]["10"]


def test_weight_decay_may_be_gained_too():
    matrix = quadratics.turned(torch.tensor([0.5, 1.0], dtype=torch.float64))
    at = quadratics.default_position(2)
    found = quadratics.solve(matrix, at, weight_decay=0.5).values["forecast_total"]["1000"]
    assert found.value == pytest.approx(0.5 * float(at @ matrix @ at + 0.5 * at @ at), rel=1e-12)


def test_a_uniform_forecast_names_every_part_and_horizon():
    found = uniform_forecast(Quantity.zero())
    assert set(found) == {f"forecast_{part}" for part in PARTS}
    for quantities in found.values():
        assert quantities == dict.fromkeys(HORIZONS, Quantity.zero())
