"""Blocks by structure inside an analysis: their certificates, and when products stand in."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import sample_networks
from dense_oracle import dense
from hessdiag import Task, analyze, structured_block
from hessdiag.block_hessian import BlockHessian
from hessdiag.blocks import WHOLE, Block
from hessdiag.curvature.structured import sites
from hessdiag.network import Network, Row
from hessdiag.options import make_options
from sample_networks import Case, cross_entropy, mse, pairs, regression

COUNTS = ("inactive", "n_positive", "n_negative", "n_zero", "ambiguous")


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(sites, "MOST_POSITIONS", 100)
    monkeypatch.setattr(sites, "LEAST_SAVED", 1)


def whole(case, **options):
    """The block's Hessian, its matrix made."""
    with sample_networks.lent(case.task) as (objective, named):
        network = Network(objective, make_options(**options), lambda event: None)
        size = sum(p.numel() for p in named.values())
        hessian = BlockHessian(network, Block(WHOLE, tuple(named), size), Row(WHOLE, (1, 1)))
        _ = hessian.matrix
    return hessian


def assert_dense(hessian, case):
    _, _, matrix, _ = dense(case.model, case.data, case.loss, case.weights, case.mode)
    assert np.abs(hessian.matrix.numpy() - matrix).max() <= 1e-13 * np.abs(matrix).max()


def test_an_analysis_assembles_by_structure_and_says_so(eager):
    case = regression(sample_networks.mlp())
    hessian = whole(case)
    assert (hessian.engine_name, hessian.products) == ("structure", 4 + 3 + 2)
    assert_dense(hessian, case)


def test_what_has_no_structure_is_assembled_by_products(eager):
    case = regression(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)))
    hessian = whole(case)
    name, _, engine = hessian.engine_name.partition(" + ")
    assert (name, hessian.products) == ("structure", 4 + 2 + 8)
    assert engine
    assert_dense(hessian, case)


def test_an_engine_asked_for_by_name_makes_all_products(eager):
    case = regression(sample_networks.mlp())
    hessian = whole(case, engine="recompute")
    assert (hessian.engine_name, hessian.products) == ("recompute", 39)


def penalty(model, batch):
    return mse(model, batch) + sum(p.square().sum() ** 2 for p in model.parameters())


def in_passing(model, batch):
    """The weights also act besides the layer, on one sample each."""
    return mse(model, batch) + 1e-6 * F.linear(batch[0], model[0].weight).sin().mean()


def coupled(model, batch):
    return (model(batch[0]) @ model(batch[0]).T).cos().mean()


@pytest.mark.parametrize(
    ("loss", "reason"), [(penalty, "other ways"), (in_passing, "other ways"), (coupled, None)]
)
def test_a_matrix_that_is_not_that_of_its_structure_is_assembled_by_products(eager, loss, reason):
    case = Case(sample_networks.mlp(), pairs(3), loss, [5.0, 3.0])
    hessian = whole(case)
    assert "structure" not in hessian.engine_name
    assert hessian.products == 39
    assert reason is None or reason in hessian.refused
    assert_dense(hessian, case)


def test_samples_that_interact_are_assembled_by_products(eager):
    case = sample_networks.make("batchnorm train")
    hessian = whole(case)
    assert hessian.refused == "the loss of a sample depends on other samples"
    assert_dense(hessian, case)


def dead_task():
    """Two dead pixels, a dead ReLU, and a layer before a norm that takes out its bias."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.LayerNorm(4))
    model.append(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias[2] = -100.0
    images = torch.randn(30, 6)
    images[:, :2] = 0.0
    return Task(model, [(images, torch.randint(0, 3, (30,)))], cross_entropy)


def test_rows_that_are_zero_or_cancel_are_told_as_products_tell_them(eager):
    ours, theirs = (
        analyze(dead_task(), variants="raw,jacobi", blocks="layer", engine=engine)
        for engine in ("auto", "kept")
    )
    assert ours.provenance.environment["engine"]["whole"].startswith("structure + ")
    dead_pixels, dead_unit, no_outgoing = 2 * 5, 6 + 1 - 2, 4
    first = ours["0"].variants["raw"]
    assert first["inactive"] == dead_pixels + dead_unit
    assert ours["2"].variants["raw"]["inactive"] == no_outgoing
    for block in theirs.blocks:
        for variant, expected in block.variants.items():
            found = ours[block.name].variants[variant]
            for name in COUNTS:
                assert found[name] == expected[name], (block.name, variant, name)
            assert found["kappa"].status == expected["kappa"].status
            if expected["kappa"].value is not None:
                assert found["kappa"].value == pytest.approx(expected["kappa"].value, rel=1e-6)


def test_a_badly_scaled_block_is_certified_to_relative_accuracy():
    torch.manual_seed(1)
    scale = torch.logspace(-5, 5, 30, dtype=torch.float64)
    inputs = torch.randn(80, 30, dtype=torch.float64) * scale
    model = nn.Linear(30, 3, bias=False)
    targets = torch.randn(80, 3, dtype=torch.float64)
    run = analyze(Task(model, [(inputs, targets)], mse), variants="raw", blocks="layer")
    kappa = run.blocks[-1].variants["raw"]["kappa"]
    assert run.provenance.environment["engine"][run.blocks[-1].name] == "structure"
    # The square of the condition number of the inputs, which are graded by columns.
    r = np.linalg.qr((inputs / scale).numpy(), mode="r")
    values = np.linalg.svd(r * scale.numpy(), compute_uv=False)
    assert kappa.status == "exact"
    assert kappa.value == pytest.approx((values[0] / values[-1]) ** 2, rel=1e-4)


def test_rounding_that_drowns_a_row_that_products_resolve_is_refused(eager, monkeypatch):
    inputs = torch.diag(torch.tensor([1.0, 1e-5], dtype=torch.float64))
    case = Case(nn.Linear(2, 1, bias=False), [(inputs, torch.zeros(2, 1).double())], mse, [2.0])
    made = structured_block.structured_matrix

    def spoiled(*args, **more):
        matrix = made(*args, **more)
        matrix[1, 1] += 5e-13  # of 1e-10; nothing to the block, whose norm is 1
        return matrix

    assert whole(case).engine_name == "structure"
    monkeypatch.setattr(structured_block, "structured_matrix", spoiled)
    hessian = whole(case)
    assert "drowns rows" in hessian.refused
    assert torch.allclose(hessian.matrix, torch.diag(torch.tensor([1.0, 1e-10])).double())


def test_the_noise_of_an_assembled_matrix_holds_what_it_differs_from_products_by(eager):
    case = regression(sample_networks.mlp())
    with sample_networks.lent(case.task) as (objective, named):
        network = Network(objective, make_options(), lambda event: None)
        block = Block(WHOLE, tuple(named), sum(p.numel() for p in named.values()))
        hessian = BlockHessian(network, block, Row(WHOLE, (1, 1)))
        wrong = torch.zeros_like(hessian.matrix)
        wrong[3, 5] = 1e-9
        hessian.__dict__["matrix"] = hessian.matrix + wrong
        noise = hessian.matrix_noise()(torch.ones(block.size, dtype=torch.float64)).abs()
    assert noise[3] == pytest.approx(1e-9, rel=1e-5)
    assert noise[torch.arange(block.size) != 3].max() < 1e-14
