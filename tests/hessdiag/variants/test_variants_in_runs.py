"""Every number of a variant's row against PᵀHP written out here, whatever makes P."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

import dense_oracle
import hessdiag.rows
from hessdiag import Task, analyze
from hessdiag.run import row_label
from hessdiag.variants.coordinates import Dense, Diagonal
from hessdiag.variants.scene import Built, NotApplicable, Scene

DECAY = 0.03


def turned_matrix(n: int) -> np.ndarray:
    source = np.random.default_rng(n)
    return np.eye(n) + 0.4 * source.normal(size=(n, n)) / np.sqrt(n)


def scaling(n: int) -> np.ndarray:
    return np.exp(np.random.default_rng(n + 1).normal(size=n))


def dense_maker(scene: Scene) -> Built:
    matrix = torch.from_numpy(turned_matrix(scene.block.size))
    return Built(Dense(matrix, torch.linalg.inv(matrix)), source="hessian", notes=("turned",))


def diagonal_maker(scene: Scene) -> Built:
    return Built(Diagonal(torch.from_numpy(scaling(scene.block.size))), source="state")


def decoupled_maker(scene: Scene) -> Built:
    return replace(diagonal_maker(scene), decoupled=True)


def refusing(scene: Scene) -> Built:
    raise NotApplicable(f"nothing for\n{scene.block.name}")


@pytest.fixture
def makers(monkeypatch):
    """Coordinates whose P the test knows, under names that the grammar has."""
    known = {"jacobi": dense_maker, "adam": diagonal_maker, "adamw": decoupled_maker}
    monkeypatch.setattr(hessdiag.rows, "MAKERS", known | {"ruiz": refusing})


@cache
def truth_of(name):
    return dense_oracle.case(name).dense()


def seen(run, variant, name, decay=0.0):
    """By block: its JSON, its arrays and the truth under this variant's P."""
    value, gradient, matrix, index = truth_of(name)
    model = dense_oracle.case(name).model.double()
    everything = {n: p.detach().reshape(-1).numpy() for n, p in model.named_parameters()}
    for block in json.loads(run.to_json())["blocks"]:
        found = block["variants"][variant]
        if found["skipped"] is not None:
            continue
        at = np.concatenate([index[n] for n in block["parameters"]])
        p = np.concatenate([everything[n] for n in block["parameters"]])
        change = turned_matrix(len(at)) if variant == "jacobi" else np.diag(scaling(len(at)))
        h, g = matrix[np.ix_(at, at)], gradient[at]
        if variant == "adamw":
            z = np.linalg.solve(change, p)
            a = change.T @ h @ change + decay * np.eye(len(at))
            slope = change.T @ g + decay * z
        else:
            a = change.T @ (h + decay * np.eye(len(at))) @ change
            slope = change.T @ (g + decay * p)
        truth = dense_oracle.Truth((a + a.T) / 2, slope, value)
        yield block["name"], found, run[block["name"]].variants[variant], truth


@pytest.mark.parametrize(
    ("name", "decay", "blocks"),
    [
        ("mlp tanh", 0.0, "layer"),
        ("mlp tanh", DECAY, "layer"),
        ("convnet, BatchNorm eval", 0.0, "3"),
        ("transformer, tied, padded", DECAY, "qkv,embed"),
        ("indefinite", 0.0, "layer"),
        pytest.param("convnet, BatchNorm eval", DECAY, "layer", marks=pytest.mark.slow),
        pytest.param("transformer, tied, padded", 0.0, "layer", marks=pytest.mark.slow),
    ],
)
def test_every_number_of_a_row_is_that_of_the_congruent_matrix(name, decay, blocks, makers):
    case = dense_oracle.case(name)
    run = analyze(case.task(), variants="jacobi,adam,adamw", weight_decay=decay, blocks=blocks)
    checked = 0
    for variant in ("jacobi", "adam", "adamw"):
        for block, found, arrays, truth in seen(run, variant, name, decay):
            distance = np.abs(arrays.spectrum["eigenvalue"] - truth.values).max()
            assert distance <= 1e-9 * truth.norm, (block, variant)
            norm = found["gradient_norm"]
            assert norm == pytest.approx(np.linalg.norm(truth.gradient), rel=1e-9)
            if found["ambiguous"]:
                continue
            for path, (right, error) in truth.scalars().items():
                quantity = dense_oracle.entry(found, path)
                assert dense_oracle.holds(quantity, right, error), (block, variant, path, right)
                checked += 1
            for horizon, parts in truth.forecasts():
                for part, right in zip(("positive", "null", "negative"), parts, strict=True):
                    quantity = found["forecast"][horizon][part]
                    assert dense_oracle.holds(quantity, right, 1e-9 * max(1.0, abs(right)))
    assert checked > 20


def test_rows_are_those_of_the_congruent_matrix(makers):
    run = analyze(dense_oracle.case("mlp tanh").task(), variants="jacobi")
    for _, _, arrays, truth in seen(run, "jacobi", "mlp tanh"):
        norms = np.linalg.norm(truth.matrix, axis=1)
        assert (arrays.rows["norm_low"] <= norms).all()
        assert (norms <= arrays.rows["norm_high"]).all()
        np.testing.assert_allclose(arrays.rows["diagonal"], np.diag(truth.matrix), atol=1e-12)


def test_a_congruence_costs_no_products_and_says_what_it_was_made_from(makers):
    run = analyze(dense_oracle.case("mlp tanh").task(), variants="jacobi,adam")
    turned, scaled = (run["0"].variants[name] for name in ("jacobi", "adam"))
    assert turned["products"] == scaled["products"] == 0
    assert (turned["source"], scaled["source"]) == ("hessian", "state")
    assert "turned" in turned["notes"]


def test_what_does_not_apply_is_skipped_with_its_reason_and_fails_nothing(makers):
    run = analyze(dense_oracle.case("mlp tanh").task(), variants="ruiz")
    assert run["0"].variants["ruiz"]["skipped"] == "nothing for 0"
    assert run.provenance.environment["failed"] == []


def test_a_maker_that_raises_fails_its_own_row_alone(monkeypatch):
    def broken(scene: Scene) -> Built:
        raise ArithmeticError("no square root")

    monkeypatch.setattr(hessdiag.rows, "MAKERS", {"ruiz": broken, "adam": diagonal_maker})
    run = analyze(dense_oracle.case("mlp tanh").task(), variants="ruiz,adam")
    assert run["0"].variants["ruiz"]["skipped"] == "failed: ArithmeticError: no square root"
    assert run["0"].variants["adam"]["skipped"] is None
    assert row_label("0", "ruiz") in run.provenance.environment["failed"]


def test_coordinates_that_are_not_finite_are_refused(monkeypatch):
    def infinite(scene: Scene) -> Built:
        return Built(Diagonal(torch.full((scene.block.size,), torch.inf, dtype=torch.float64)))

    monkeypatch.setattr(hessdiag.rows, "MAKERS", {"adam": infinite})
    run = analyze(dense_oracle.case("mlp tanh").task(), variants="adam")
    assert "leaves the range of floating point" in run["0"].variants["adam"]["skipped"]


@pytest.mark.parametrize(
    ("name", "decay", "blocks"),
    [
        ("mlp tanh", 0.0, "layer"),
        ("mlp tanh", DECAY, "whole"),
        ("convnet, BatchNorm eval", 0.0, "3"),
        pytest.param("convnet, BatchNorm eval", DECAY, "layer", marks=pytest.mark.slow),
        pytest.param("transformer, tied, padded", DECAY, "layer", marks=pytest.mark.slow),
    ],
)
def test_above_the_exact_limit_every_certificate_holds(name, decay, blocks, makers):
    case = dense_oracle.case(name)
    run = analyze(
        case.task(),
        variants="jacobi,adam,adamw",
        exact_limit=0,
        weight_decay=decay,
        blocks=blocks,
    )
    checked = 0
    for variant in ("jacobi", "adam", "adamw"):
        for block, found, _, truth in seen(run, variant, name, decay):
            for path, (right, error) in truth.scalars().items():
                quantity = dense_oracle.entry(found, path)
                # What holds at 95 % only is a matter of coverage, not of one draw.
                if (quantity["confidence"] or 0.0) > 0.99:
                    assert dense_oracle.holds(quantity, right, error), (block, variant, path)
                    checked += 1
            assert found["products"] <= 80
    assert checked > 10


def test_gauss_newton_with_decay_has_a_floor_in_other_coordinates_too(makers):
    case = dense_oracle.case("mlp tanh")
    run = analyze(
        case.task(),
        variants="adam,adamw",
        blocks="0",
        exact_limit=0,
        weight_decay=DECAY,
        curvature="ggn",
    )
    exact = analyze(
        case.task(), variants="adam,adamw", blocks="0", weight_decay=DECAY, curvature="ggn"
    )
    for variant in ("raw", "adam", "adamw"):
        bounded, known = (r["0"].variants[variant]["kappa"] for r in (run, exact))
        assert bounded.status == "interval"
        assert bounded.low <= known.value <= bounded.high


def test_variants_of_a_zero_block_are_zero(makers):
    case = dense_oracle.case("mlp tanh")
    task = replace(
        case.task(),
        loss=lambda model, batch: (
            model(batch[0]).sum() * 0.0 + sum(p.sum() for p in model.parameters())
        ),
    )
    run = analyze(task, variants="jacobi,adam", blocks="0")
    assert {r["kappa"].status for r in run["0"].variants.values()} == {"zero"}


def far_inputs(ratio):
    source = torch.Generator().manual_seed(3)
    x = torch.randn(60, 5, generator=source, dtype=torch.float64)
    return x + ratio * torch.rand(5, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4, 1e6])
def test_what_cancels_in_a_change_of_parameters_is_in_its_error(ratio):
    x = far_inputs(ratio)
    net = nn.Sequential(nn.Linear(5, 1)).double()
    task = Task(net, [(x, x[:, :1].sin())], nn.MSELoss())
    run = analyze(task, variants="bnp", blocks="0")
    # For squares PᵀHP is twice the second moments of the standardised inputs and of ones.
    with mpmath.workdps(60):
        columns = [[mpmath.mpf(float(v)) for v in column] for column in x.T]
        centred = [[v - mpmath.fsum(c) / len(c) for v in c] for c in columns]
        scaled = [
            [v / mpmath.sqrt(mpmath.fsum(u * u for u in c) / len(c)) for v in c] for c in centred
        ]
        count = len(scaled)
        moments = mpmath.matrix(count + 1, count + 1)
        for i in range(count):
            for j in range(count):
                moments[i, j] = 2 * mpmath.fdot(scaled[i], scaled[j]) / len(x)
        moments[count, count] = 2
        truth = sorted(mpmath.eigsy(moments, eigvals_only=True))
    found = run["0"].variants["bnp"]
    for name, right in (("lambda_max", truth[-1]), ("lambda_min", truth[0])):
        assert found[name].low <= right <= found[name].high, (name, found[name], right)
        assert abs(found[name].value - right) <= 1e-8 * truth[-1]
    kappa = found["kappa"]
    assert kappa.low <= truth[-1] / truth[0]
    # At 1e6 the signs of raw, which are those of every congruence, are not certain.
    assert kappa.status == ("exact" if ratio < 1e6 else "lower-bound")
    assert kappa.high is None or truth[-1] / truth[0] <= kappa.high
    assert found["products"] == (6 if ratio > 1e3 else 0)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("seed", [2, 25, 26, 28, 33])
def test_a_semidefinite_block_stays_so_under_a_dense_change(seed, dtype):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 3)).double()
    x, y = torch.randn(37, 5).double(), torch.randint(0, 3, (37,))
    task = Task(net, [(x, y)], nn.CrossEntropyLoss())
    run = analyze(task, variants="kfac,shampoo", blocks="0", dtype=dtype)
    known = analyze(task, variants="kfac,shampoo", blocks="0")
    for name in ("kfac", "shampoo"):
        found = run["0"].variants[name]
        least = found["lambda_min"]
        assert least.low <= 0 <= least.high, (name, least)
        # P differs by rounding, which moves κ by no decade.
        true = known["0"].variants[name]["kappa"]
        assert found["kappa"].low is None or found["kappa"].low <= 3 * true.value, name


def dead_unit():
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.randn(30, 4).double()
    data = [(x, x[:, :2].sin())]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=DECAY)
    for _ in range(12):
        optimizer.zero_grad()
        nn.MSELoss()(net(x), data[0][1]).backward()
        optimizer.step()
    with torch.no_grad():
        net[0].bias[0] = -1e3
    return net, data, optimizer


@pytest.mark.parametrize("variant", ["optimizer", "adamw"])
def test_weight_decay_on_dead_rows_is_scaled_by_the_stored_second_moments(variant, tmp_path):
    net, data, optimizer = dead_unit()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "m.pt")
    run = analyze(
        Task(net, data, nn.MSELoss()),
        checkpoint=tmp_path / "m.pt",
        variants=variant,
        blocks="0",
        weight_decay=DECAY,
    )
    group = optimizer.param_groups[0]
    scale, values = [], []
    for p in (net[0].weight, net[0].bias):
        held = optimizer.state[p]
        corrected = held["exp_avg_sq"] / (1 - group["betas"][1] ** float(held["step"]))
        scale.append((1 / (corrected.sqrt() + group["eps"])).sqrt().reshape(-1))
        values.append(p.detach().reshape(-1))
    change, p = torch.cat(scale).numpy(), torch.cat(values).numpy()
    _, gradient, matrix, index = dense_oracle.dense(net, data, dense_oracle.squares, [30])
    at = np.concatenate([index[n] for n in ("0.weight", "0.bias")])
    scaled = change[:, None] * matrix[np.ix_(at, at)] * change
    if variant == "adamw":
        truth = scaled + DECAY * np.eye(len(at))
        slope = change * gradient[at] + DECAY * p / change
    else:
        truth = scaled + DECAY * np.diag(change**2)
        slope = change * (gradient[at] + DECAY * p)
    found = run["0"].variants[variant]
    expected = np.linalg.eigvalsh(truth)
    np.testing.assert_allclose(
        found.spectrum["eigenvalue"], expected, rtol=0, atol=1e-9 * expected[-1]
    )
    assert found["gradient_norm"] == pytest.approx(np.linalg.norm(slope), rel=1e-9)


def test_a_joined_network_replays_the_tasks_own_batches():
    case = dense_oracle.case("mlp tanh")
    run = analyze(case.task(), variants="bn+adam", blocks="2")
    notes = run["2"].variants["bn+adam"]["notes"]
    assert any("3 gradients of the task's mini-batches" in note for note in notes)
