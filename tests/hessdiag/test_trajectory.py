"""Cosines against numpy on quadratics, and against dense derivatives on networks."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from hessdiag import trajectory
from hessdiag.curvature.engines import make_engine
from hessdiag.errors import CheckpointError, InputError, OutOfResources
from hessdiag.iterates import find_iterates
from hessdiag.store.schema import COSINES
from hessdiag.trajectory import cosines, placed
from quadratics import quadratic_task

EPS = np.finfo(float).eps
SIZE = 9
RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((SIZE, SIZE))
MATRIX = MATRIX @ np.diag(10.0 ** np.arange(SIZE) / 1e4) @ MATRIX.T
MATRIX[4] = MATRIX[:, 4] = 0.0
STAR = RNG.standard_normal(SIZE)
POINTS = STAR + RNG.standard_normal((4, SIZE))
LIVE = np.arange(SIZE) != 4


def write(folder, points, key="p"):
    for step, point in enumerate(points, 1):
        state = {"matrix": torch.tensor(MATRIX), key: torch.tensor(point)}
        torch.save({"model": state, "step": 10 * step}, folder / f"{step}.pt")
    return find_iterates(f"{folder}/*.pt")


def exact_rows(matrix, factor=1.0):
    norm = np.linalg.norm(matrix, axis=1)
    return {"norm": norm, "norm_low": norm / factor, "norm_high": norm * factor}


def quadratic_cosines(networks, iterates, rows=None, at=STAR, **options):
    """Of ½ pᵀAp at ``at``, and the number of products they took."""
    task = quadratic_task(torch.tensor(MATRIX), torch.tensor(at))
    products = 0
    with networks.lent(task) as (objective, named):
        engine = make_engine(objective, list(named.values()), curvature="hessian")

        def product(vector):
            nonlocal products
            products += 1
            return engine(vector)

        rows = exact_rows(MATRIX) if rows is None else rows
        found = cosines(objective, named, iterates, product=product, rows=rows, **options)
        assert torch.equal(named["p"].data, torch.tensor(at))
    return found, products


def truth(points, star, matrix=MATRIX):
    way = points - star
    with np.errstate(invalid="ignore"):
        row = np.linalg.norm(matrix, axis=1)
        return way @ matrix / row / np.linalg.norm(way, axis=1)[:, None]


def test_cosines_of_a_quadratic_are_those_of_its_rows(networks, tmp_path):
    found, products = quadratic_cosines(networks, write(tmp_path, POINTS))
    expected = truth(POINTS, STAR)
    assert found["valid"].tolist() == [LIVE.tolist()] * 4
    np.testing.assert_allclose(found["cosine"][:, LIVE], expected[:, LIVE], atol=1e-12)
    assert np.isnan(found["cosine"][:, 4]).all()
    assert np.isnan(found["cosine_low"][:, 4]).all()
    assert found["step"].tolist() == [10, 20, 30, 40]
    np.testing.assert_allclose(found["distance"], np.linalg.norm(POINTS - STAR, axis=1))
    np.testing.assert_allclose(
        found["fraction_above"], (np.abs(expected[:, LIVE]) > 0.1).mean(axis=1)
    )
    assert products == 4
    assert set(found) == {dataset.name for dataset in COSINES}


def test_the_ends_of_exact_rows_hold_the_truth_and_no_more_than_rounding(networks, tmp_path):
    found, _ = quadratic_cosines(networks, write(tmp_path, POINTS))
    expected = truth(POINTS, STAR)[:, LIVE]
    low, high = found["cosine_low"][:, LIVE], found["cosine_high"][:, LIVE]
    assert ((low <= expected) & (expected <= high)).all()
    assert (high - low).max() < 1e3 * EPS
    assert (high > low).all()


def test_the_quadratic_model_misses_nothing_of_a_quadratic(networks, tmp_path):
    found, _ = quadratic_cosines(networks, write(tmp_path, POINTS))
    assert found["quadratic_residual"].max() < 1e-11
    rms = np.sqrt(((POINTS @ MATRIX) ** 2).mean(axis=0))
    np.testing.assert_allclose(found["gradient_rms"], rms, rtol=1e-12)


def test_an_interval_of_the_row_norm_becomes_one_of_the_cosine(networks, tmp_path):
    norm = np.linalg.norm(MATRIX, axis=1)
    rows = {"norm": norm, "norm_low": norm * 0.8, "norm_high": norm * 1.5}
    found, _ = quadratic_cosines(networks, write(tmp_path, POINTS), rows)
    expected = truth(POINTS, STAR)[:, LIVE]
    nearer, farther = np.abs(expected) / 1.5, np.minimum(np.abs(expected) / 0.8, 1)
    down, up = found["cosine_low"][:, LIVE], found["cosine_high"][:, LIVE]
    assert (expected > 0).any()
    assert (expected < 0).any()
    np.testing.assert_allclose(down, np.where(expected > 0, nearer, -farther), atol=1e-12)
    np.testing.assert_allclose(up, np.where(expected > 0, farther, -nearer), atol=1e-12)


def test_a_row_that_may_be_zero_leaves_only_the_sign(networks, tmp_path):
    rows = exact_rows(MATRIX) | {"norm_low": np.zeros(SIZE)}
    found, _ = quadratic_cosines(networks, write(tmp_path, POINTS), rows)
    positive = found["cosine"][:, LIVE] > 0
    assert (found["cosine_high"][:, LIVE][positive] == 1).all()
    assert (found["cosine_low"][:, LIVE][positive] > 0).all()
    assert (found["cosine_low"][:, LIVE][~positive] == -1).all()


def test_no_cosine_leaves_its_range_when_the_norms_are_rough(networks, tmp_path):
    norm = np.linalg.norm(MATRIX, axis=1) / 30
    rows = {"norm": norm, "norm_low": norm / 2, "norm_high": norm * 2}
    found, _ = quadratic_cosines(networks, write(tmp_path, POINTS), rows)
    for name in ("cosine", "cosine_low", "cosine_high"):
        assert np.nanmax(np.abs(found[name])) == 1
    assert not (found["cosine_low"] > found["cosine"]).any()


def test_the_noise_of_the_products_widens_each_row_by_its_own(networks, tmp_path):
    noise = torch.zeros(SIZE, dtype=torch.float64)
    noise[2] = 0.01 * float(np.linalg.norm(MATRIX[2]))
    found, _ = quadratic_cosines(networks, write(tmp_path, POINTS), noise=noise)
    width = found["cosine_high"] - found["cosine_low"]
    way = POINTS - STAR
    reach = np.abs(way).max(axis=1) / np.linalg.norm(way, axis=1)
    inside = np.abs(found["cosine"][:, 2]) < 1 - 0.1 * reach
    np.testing.assert_allclose(width[inside, 2], 0.2 * reach[inside], rtol=1e-9)
    assert inside.any()
    assert np.nanmax(np.delete(width, 2, axis=1)) < 1e3 * EPS


def test_what_rounding_leaves_in_a_zero_row_is_in_no_number(networks, tmp_path):
    iterates = write(tmp_path, POINTS)
    task = quadratic_task(torch.tensor(MATRIX), torch.tensor(STAR))
    with networks.lent(task) as (objective, named):
        noise = torch.zeros(SIZE, dtype=torch.float64)
        noise[4] = 1e6
        found = cosines(
            objective,
            named,
            iterates,
            product=lambda v: torch.tensor(MATRIX) @ v + noise,
            rows=exact_rows(MATRIX),
        )
    assert found["quadratic_residual"].max() < 1e-11
    assert not found["valid"][:, 4].any()


def test_an_iterate_that_is_the_reference_has_no_cosine(networks, tmp_path):
    found, products = quadratic_cosines(networks, write(tmp_path, [POINTS[0], STAR]))
    assert found["distance"][1] == 0
    assert not found["valid"][1].any()
    assert np.isnan(found["cosine"][1]).all()
    assert np.isnan([found["quadratic_residual"][1], found["fraction_above"][1]]).all()
    assert products == 1


def test_weight_decay_stands_on_the_diagonal_and_in_the_gradient(networks, tmp_path):
    decayed = MATRIX + 0.7 * np.eye(SIZE)
    found, _ = quadratic_cosines(
        networks, write(tmp_path, POINTS), exact_rows(decayed), weight_decay=0.7
    )
    np.testing.assert_allclose(found["cosine"], truth(POINTS, STAR, decayed), atol=1e-12)
    assert found["quadratic_residual"].max() < 1e-11
    rms = np.sqrt(((POINTS @ decayed) ** 2).mean(axis=0))
    np.testing.assert_allclose(found["gradient_rms"], rms, rtol=1e-12)


def test_a_diverged_iterate_leaves_the_root_mean_square_to_the_others(networks, tmp_path):
    def loss(model, _batch):
        return model() * (1.0 if float(model.p.detach().abs().max()) < 1e3 else torch.nan)

    far = STAR.copy()
    far[0] = 1e4
    iterates = write(tmp_path, [POINTS[0], far])
    task = replace(quadratic_task(torch.tensor(MATRIX), torch.tensor(STAR)), loss=loss)
    with networks.lent(task) as (objective, named):
        engine = make_engine(objective, list(named.values()), curvature="hessian")
        found = cosines(objective, named, iterates, product=engine, rows=exact_rows(MATRIX))
    assert np.isnan(found["quadratic_residual"][1])
    assert found["valid"][1].sum() == LIVE.sum()
    np.testing.assert_allclose(found["gradient_rms"], np.abs(POINTS[0] @ MATRIX), rtol=1e-12)


def test_what_cannot_be_measured_is_refused(networks, tmp_path, monkeypatch):
    far = STAR.copy()
    far[:2] = 1.7e308
    with pytest.raises(InputError, match=r"1\.pt is too far from p\*"):
        quadratic_cosines(networks, write(tmp_path, [far]))
    with pytest.raises(InputError, match="no iterates"):
        quadratic_cosines(networks, [])
    iterates = write(tmp_path, POINTS, key="q")
    with pytest.raises(CheckpointError, match=r"(?s)1\.pt does not fit.*: p\n"):
        quadratic_cosines(networks, iterates)
    monkeypatch.setattr(trajectory, "free_memory", lambda _: 3 * 25 * 4 * SIZE - 1)
    with pytest.raises(OutOfResources, match=r"4 iterates and 9 parameters.*fewer --iterates"):
        quadratic_cosines(networks, write(tmp_path, POINTS))


def around(case, tmp_path, distance):
    """Three iterates of a network at a distance, whatever is trainable moved."""
    source = torch.Generator().manual_seed(4)
    for step in (1, 2, 3):
        model = copy.deepcopy(case.model).double()
        for parameter in model.parameters():
            if parameter.requires_grad:
                kick = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
                parameter.data += distance * kick
        torch.save(model.state_dict(), tmp_path / f"{step}.pt")
    return find_iterates(f"{tmp_path}/*.pt")


@pytest.mark.parametrize("name", ["tanh", "batchnorm eval", "partial"])
def test_cosines_of_a_network_are_those_of_its_dense_rows(name, networks, tmp_path):
    case = networks.make(name)
    iterates = around(case, tmp_path, 1e-4)
    exact = networks.dense_hessian(case).numpy()
    with networks.lent(case.task) as (objective, named):
        kept = {n: p for n, p in named.items() if n in case.trainable}
        parameters = list(kept.values())
        here = torch.cat([p.data.reshape(-1) for p in parameters]).numpy()
        engine = make_engine(objective, parameters, curvature="hessian")
        rows = exact_rows(exact)
        rows["norm"][rows["norm"] < 1e-12] = 0.0
        found = cosines(objective, kept, iterates, product=engine, rows=rows)
        points = np.array(
            [
                torch.cat([i.load(objective.model)[n].reshape(-1) for n in kept]).numpy()
                for i in iterates
            ]
        )
    expected = truth(points, here, exact)
    live = found["row_norm"] > 0
    np.testing.assert_allclose(found["cosine"][:, live], expected[:, live], atol=1e-8)
    assert found["quadratic_residual"].max() < 1e-2


def test_the_residual_grows_with_the_distance_as_the_third_derivative_says(networks, tmp_path):
    residual = []
    for number, distance in enumerate((1e-3, 2e-3)):
        case = networks.make("tanh")
        folder = tmp_path / str(number)
        folder.mkdir()
        iterates = around(case, folder, distance)
        with networks.lent(case.task) as (objective, named):
            engine = make_engine(objective, list(named.values()), curvature="hessian")
            rows = exact_rows(networks.dense_hessian(case).numpy())
            found = cosines(objective, named, iterates, product=engine, rows=rows)
        residual.append(found["quadratic_residual"])
    np.testing.assert_allclose(residual[1] / residual[0], 2, rtol=0.05)


def test_another_reference_is_reached_by_placing_the_parameters(networks, tmp_path):
    iterates = write(tmp_path, POINTS)
    task = quadratic_task(torch.tensor(MATRIX), torch.tensor(STAR))
    with networks.lent(task) as (objective, named):
        parameters = list(named.values())
        storage = parameters[0].data_ptr()
        with placed(parameters, [torch.tensor(POINTS[3])]):
            engine = make_engine(objective, parameters, curvature="hessian")
            found = cosines(objective, named, iterates, product=engine, rows=exact_rows(MATRIX))
        assert parameters[0].data_ptr() == storage
        assert torch.equal(parameters[0].data, torch.tensor(STAR))
    assert found["distance"][3] == 0
    expected = truth(POINTS[:3], POINTS[3])[:, LIVE]
    np.testing.assert_allclose(found["cosine"][:3, LIVE], expected, atol=1e-12)


def test_parameters_come_back_after_an_error(networks):
    def fail(named):
        with placed([named["p"]], [torch.zeros(SIZE).double()]):
            assert not named["p"].any()
            raise ZeroDivisionError

    task = quadratic_task(torch.tensor(MATRIX), torch.tensor(STAR))
    with networks.lent(task) as (_, named):
        with pytest.raises(ZeroDivisionError):
            fail(named)
        assert torch.equal(named["p"].data, torch.tensor(STAR))
