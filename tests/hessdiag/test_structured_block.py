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
from hessdiag.opened import Opened
from hessdiag.options import make_options
from hessdiag.solve.problem import Noise
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


def whitened(outputs, penalty):
    """A layer whose Hessian is the identity, and of its weights' penalty besides."""
    torch.manual_seed(0)
    inputs = torch.linalg.qr(torch.randn(16, 12, dtype=torch.float64))[0] * 4.0

    def loss(model, batch):
        fitted = outputs / 2 * mse(model, batch)
        return fitted + penalty(model.weight)

    data = [(inputs, torch.zeros(16, outputs, dtype=torch.float64))]
    return Case(nn.Linear(12, outputs, bias=False), data, loss, [16.0])


def of_rank_one(weight):
    return 1e-12 * weight.sum().square() / weight.numel() / 2


def of_one_weight(weight):
    return 1e-12 * weight[0, 0].square() / 2


@pytest.mark.parametrize("penalty", [of_rank_one, of_one_weight])
def test_a_penalty_far_below_what_random_vectors_show_of_it_is_not_missed(eager, penalty):
    # Of a matrix of rank one a random product shows 1/√n, n = 144.
    case = whitened(12, penalty)
    hessian = whole(case)
    assert hessian.refused == "its weights act in other ways, too"
    weight = torch.zeros(12, 12, dtype=torch.float64)
    known = torch.autograd.functional.hessian(penalty, weight).reshape(144, 144)
    assert (hessian.matrix - torch.eye(144) - known).abs().max() < 2e-14


@pytest.mark.parametrize(
    ("missed", "least"),
    [(torch.ones(40, 40) / 40, 1.0), (torch.eye(40), 40**0.5), (-torch.eye(40), 40**0.5)],
)
def test_the_certificate_holds_the_norm_and_the_trace_of_what_the_structure_misses(
    eager, monkeypatch, missed, least
):
    size, made = 4e-15, structured_block.structured_matrix
    case = whitened(4, lambda weight: 0.0)
    case.model = nn.Linear(12, 4, bias=False)
    missed = torch.nn.functional.pad(missed, (0, 8, 0, 8)).double()

    def spoiled(*args, **more):
        return made(*args, **more) + size * missed

    monkeypatch.setattr(structured_block, "structured_matrix", spoiled)
    monkeypatch.setattr(structured_block, "ROUNDING", 1e3)
    with sample_networks.lent(case.task) as (objective, named):
        network = Network(objective, make_options(), lambda event: None)
        block = Block(WHOLE, tuple(named), 48)
        opened = Opened(network, block, Row(WHOLE, (1, 1)))
        hessian, _ = opened.hessian, opened.matrix
        assert opened.problem.noise.block >= hessian.departure.block
    assert hessian.engine_name == "structure"
    assert hessian.departure.block >= 0.7 * size * least * (1 if least == 1 else (40 / 48) ** 0.5)
    quiet = Noise(torch.zeros_like, 0.0, torch.zeros(48).double(), torch.zeros(48), 0.0)
    noise = hessian.with_departure(quiet)
    assert noise.block == hessian.departure.block
    assert (noise.rows[:40] > 0.3 * size * missed.norm(dim=1)[:40]).all()


class Apart(nn.Module):
    """Two layers of which each sees its own inputs."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(4, 6), nn.Linear(2, 3)

    def forward(self, x):
        return torch.cat([self.small(x[:, :4]), self.large(x[:, 4:])], dim=1)


def scaled_apart():
    torch.manual_seed(0)
    inputs = torch.randn(30, 6, dtype=torch.float64)
    inputs[:, 4:] *= 1e6

    def loss(model, batch):
        return mse(model, batch) + 1e-6 * model.small.weight.sum().square()

    return Case(Apart(), [(inputs, torch.randn(30, 9).double())], loss, [30.0])


def test_a_layer_is_judged_by_its_own_scale_beside_one_a_trillion_times_as_curved(eager):
    case = scaled_apart()
    assert whole(case).refused == "its weights act in other ways, too"
    run = analyze(case.task, variants="raw", blocks="layer")
    _, _, matrix, _ = dense(case.model, case.data, case.loss, case.weights, case.mode)
    part = matrix[:30, :30]
    found, top = run["small"].variants["raw"], np.linalg.eigvalsh(part)[-1]
    assert found["inactive"] == 0
    assert found["lambda_max"].low <= top <= found["lambda_max"].high
    assert found["lambda_max"].high - found["lambda_max"].low < 1e-11
    norms = np.linalg.norm(part, axis=1)
    assert (found.rows["norm_low"] <= norms).all()
    assert (norms <= found.rows["norm_high"]).all()


def test_a_part_of_the_whole_that_is_wrong_by_itself_is_assembled_again(eager):
    # Each layer is linear by itself; their product hides the penalty on one of them.
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)

        def forward(self, x):
            return self.left(x) * self.right(x)

    def loss(model, batch):
        return model(batch[0]).sum() / 30 + 2e-15 * model.left.weight.square().sum() / 2

    torch.manual_seed(0)
    case = Case(Product(), [(torch.randn(30, 4).double(),)], loss, [30.0])
    with sample_networks.lent(case.task) as (objective, named):
        network = Network(objective, make_options(), lambda event: None)
        assembled = BlockHessian(network, Block(WHOLE, tuple(named), 48), Row(WHOLE, (1, 2)))
        assert assembled.matrix.shape == (48, 48)
        assert assembled.engine_name == "structure"
        layer = BlockHessian(network, Block("left", ("left.weight",), 24), Row("left", (2, 2)))
        assert torch.equal(layer.matrix, 2e-15 * torch.eye(24).double())
        other = BlockHessian(network, Block("right", ("right.weight",), 24), Row("right", (2, 2)))
        assert (other.matrix.norm(), other.engine_name) == (0.0, "")
        assert other.departure.block == 0.0
    assert layer.refused


def test_products_whose_rounding_has_a_direction_do_not_refuse_their_own_matrix(eager):
    # A layer norm of two features, which are ±1 whatever they were.
    assert whole(sample_networks.make("encoder layer")).engine_name.startswith("structure")


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
    inputs = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    case = Case(nn.Linear(2, 1, bias=False), [(inputs, torch.zeros(2, 1).double())], mse, [2.0])
    made = structured_block.structured_matrix

    def spoiled(*args, **more):
        matrix = made(*args, **more)
        matrix[1, 1] += 2e-15  # of 1e-12; nothing to the block, whose norm is 1
        return matrix

    assert whole(case).engine_name == "structure"
    monkeypatch.setattr(structured_block, "structured_matrix", spoiled)
    hessian = whole(case)
    assert "drowns rows" in hessian.refused
    assert torch.allclose(hessian.matrix, torch.diag(torch.tensor([1.0, 1e-12])).double())


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
