"""Every number of a variant's row against PᵀHP written out here, whatever makes P."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import dense_oracle
import hessdiag.rows
from hessdiag import analyze
from hessdiag.run import row_label
from hessdiag.variants.coordinates import Dense, Diagonal
from hessdiag.variants.scene import Built, NotApplicable, Scene

CASES = ("mlp tanh", "convnet, BatchNorm eval", "transformer, tied, padded", "indefinite")
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


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("name", CASES)
def test_every_number_of_a_row_is_that_of_the_congruent_matrix(name, decay, makers):
    case = dense_oracle.case(name)
    run = analyze(case.task(), variants="jacobi,adam,adamw", weight_decay=decay)
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
    assert checked > 50


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


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("name", CASES[:3])
def test_above_the_exact_limit_every_certificate_holds(name, decay, makers):
    case = dense_oracle.case(name)
    run = analyze(
        case.task(),
        variants="jacobi,adam,adamw",
        exact_limit=0,
        weight_decay=decay,
        curvature="hessian",
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
    assert checked > 20


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
