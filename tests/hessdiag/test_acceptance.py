"""Every number of the JSON document against dense matrices that share no code with hessdiag."""

import json
import math
from decimal import Decimal, getcontext
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import dense_oracle
from hessdiag import Task, analyze

CASES, HORIZONS, holds = dense_oracle.CASES, dense_oracle.HORIZONS, dense_oracle.holds


@cache
def analysed(name):
    """The run, and (JSON, stored arrays, truth) of each block that was analysed."""
    case = dense_oracle.case(name)
    run = analyze(case.task())
    return run, dense_oracle.against(run, *case.dense())


@pytest.mark.parametrize("name", CASES)
def test_eigenvalues_lie_within_1e_9_of_the_norm(name):
    for _, arrays, truth in analysed(name)[1].values():
        distance = np.abs(arrays.spectrum["eigenvalue"] - truth.values).max()
        assert distance <= 1e-9 * truth.norm


@pytest.mark.parametrize("name", CASES)
def test_counts_add_up_and_are_exact_where_they_are_not_ambiguous(name):
    unambiguous = 0
    for found, _, truth in analysed(name)[1].values():
        counts = [found[key]["value"] for key in ("n_positive", "n_negative", "n_zero")]
        assert sum(counts) == found["size"] == truth.n
        if not found["ambiguous"]:
            unambiguous += 1
            assert counts[:2] == [truth.positive.size, truth.negative.size]
    assert unambiguous


@pytest.mark.parametrize("name", CASES)
def test_the_truth_is_inside_every_interval_and_the_value_is_it(name):
    for block, (found, _, truth) in analysed(name)[1].items():
        if found["ambiguous"]:
            assert found["kappa"]["status"] == "lower-bound"
            continue
        assert found["kappa"]["status"] == ("exact" if truth.positive.size else None)
        for path, (right, error) in truth.scalars().items():
            quantity = dense_oracle.entry(found, path)
            assert quantity["status"] == "exact", (block, path)
            assert quantity["confidence"] == 1.0
            assert quantity["low"] <= quantity["value"] <= quantity["high"]
            assert holds(quantity, right, error), (block, path, quantity, right)
            assert abs(quantity["value"] - right) <= 2 * error + 1e-12 * abs(right), (block, path)


@pytest.mark.parametrize("name", CASES)
def test_the_forecast_is_what_the_steps_of_gradient_descent_take_off(name):
    for block, (found, _, truth) in analysed(name)[1].items():
        for horizon, (positive, null, negative) in truth.forecasts():
            told = found["forecast"][horizon]
            total = positive + null + negative
            error = 1e-7 * abs(positive) + 1e-12 * abs(truth.loss)
            assert holds(told["positive"], positive, error), (block, horizon)
            assert abs(told["positive"]["value"] - positive) <= error + 1e-5 * positive
            if math.isfinite(negative):
                assert holds(told["negative"], negative, error + 1e-6 * abs(negative))
            unfit = (truth.loss > 0 and total > truth.loss) or negative > 0.1 * total
            if unfit or not math.isfinite(total):
                assert told["total"]["status"] == "unresolved"
            else:
                assert holds(told["total"], total, error + 1e-6 * abs(negative)), (block, horizon)


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_rows_and_diagonal_are_those_of_the_whole_data(name):
    for found, arrays, truth in analysed(name)[1].values():
        assert found["loss"] == pytest.approx(truth.loss, rel=1e-12)
        assert found["gradient_norm"] == pytest.approx(np.linalg.norm(truth.gradient), rel=1e-9)
        error, rows = 1e-12 * truth.norm, arrays.rows
        for stored, right in (
            ("norm", np.linalg.norm(truth.matrix, axis=1)),
            ("diagonal", np.diag(truth.matrix)),
        ):
            assert np.abs(rows[stored] - right).max() <= error
            assert (rows[f"{stored}_low"] <= right + error).all()
            assert (rows[f"{stored}_high"] >= right - error).all()


def test_inactive_parameters_are_the_zero_rows_also_where_rounding_hides_them():
    expected = {
        "convnet, BatchNorm train": {"0": 2, "3": 3, "whole": 5},  # biases before BatchNorm
        "transformer, tied, padded": {"qkv": 4, "whole": 4},  # key biases
        "mlp tanh": {},
    }
    for name, inactive in expected.items():
        told = {block: found["inactive"] for block, (found, _, _) in analysed(name)[1].items()}
        assert {block: count for block, count in told.items() if count} == inactive


def test_the_document_has_every_key_of_the_contract_and_no_number_that_json_cannot_hold():
    document = json.loads(analysed("mlp tanh")[0].to_json(), parse_constant=pytest.fail)
    assert {"format": "hessdiag-run", "version": "1.0.0", "curvature": "hessian"}.items() <= (
        document.items()
    )
    found = document["blocks"][0]["variants"]["raw"]
    assert list(found["forecast"]) == [str(t) for t in HORIZONS]
    assert list(found["profile"]) == [f"1e-{k:02d}" for k in range(1, 13)]
    assert list(found["kappa_quantile"]) == ["0.5", "0.9"]
    assert (found["kappa_damped"], found["half_ratio"], found["diagonal_gap"]) == (None,) * 3
    assert set(found["kappa"]) == {"value", "low", "high", "status", "confidence"}


def test_certified_positive_definite_blocks_are_exact_far_below_rounding():
    getcontext().prec = 60
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 2, generator=generator, dtype=torch.float64)
    x[:, 1] *= 1e-9
    run = analyze(Task(nn.Linear(2, 1, bias=False).double(), [(x, x[:, :1])], dense_oracle.squares))
    columns = [[Decimal(v) for v in column] for column in x.T.tolist()]
    a, b, c = (
        sum(p * q for p, q in zip(columns[i], columns[j], strict=True)) * 2 / 23
        for i, j in ((0, 0), (0, 1), (1, 1))
    )
    top = (a + c + ((a - c) ** 2 + 4 * b * b).sqrt()) / 2
    kappa = float(top * top / (a * c - b * b))
    told = run["weight"].variants["raw"]["kappa"]
    assert kappa > 1e17
    assert told.status == "exact"
    assert told.value == pytest.approx(kappa, rel=1e-12)
    assert told.low <= kappa <= told.high


def test_a_huge_range_does_not_blur_the_large_eigenvalues():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 3, generator=generator, dtype=torch.float64)
    x = torch.stack([x[:, 0], x[:, 0] + 1e-4 * x[:, 1], 1e-6 * x[:, 2]], dim=1)
    target = torch.ones(23, 1, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    told = analyze(Task(model, [(x, target)], dense_oracle.squares))["weight"].variants["raw"]
    assert told["kappa"].status == "exact"  # by the relative accuracy of a definite matrix
    assert told["kappa"].value > 1e12
    matrix = 2 / 23 * (x.T @ x).numpy()
    gradient = 2 / 23 * (x.T @ (model(x) - target)).detach().numpy()[:, 0]
    top = np.linalg.eigvalsh(matrix)[-1]
    assert told["lambda_max"].value == pytest.approx(top, rel=1e-14)
    assert told["lambda_max"].high - told["lambda_max"].low <= 1e-12 * top
    gain = gradient @ gradient / top - gradient @ matrix @ gradient / (2 * top**2)
    assert told["forecast_total"]["1"].value == pytest.approx(gain, rel=1e-12)
