from __future__ import annotations

import pytest
import torch
from torch import nn

from hessdiag.curvature.engines import BUILD, Kept, Linearized, make_engine
from hessdiag.curvature.engines.linearized import (
    CannotLinearize,
    Reference,
    linearized,
    routes,
)
from hessdiag.curvature.objective import only
from hessdiag.errors import SelfCheckFailed

NO_FORWARD = ("lstm", "gru")  # they write into constants, which forward mode shows


def matrix(product, size):
    return torch.stack([product(row) for row in torch.eye(size, dtype=torch.float64)])


@pytest.fixture
def dense(networks):
    oracles = {"hessian": networks.dense_hessian, "ggn": networks.dense_ggn}
    return lambda name, curvature: oracles[curvature](networks.make(name))


def played(objective, parameters, curvature, route):
    """An engine of tapes of one route only, whatever the others could do."""
    build = BUILD[curvature]
    kept = Kept(objective, parameters, build)
    with only(parameters):
        reference = Reference.of(kept.products[0][0], parameters)
        first = linearized(objective, kept.batches[0], parameters, reference, route)
        return Linearized.of(kept, first)


FORWARD = ["tanh", "relu", "batchnorm eval", "batchnorm train", "groupnorm", "instancenorm"]
FORWARD += ["tied transformer", "encoder layer", "checkpoint", "partial", "pinn", "outputs"]
FORWARD += ["spectral norm", "old spectral norm", "compiled inside", "data parallel"]


@pytest.mark.parametrize("name", FORWARD)
def test_forward_tapes_are_the_dense_hessian(networks, dense, name):
    with networks.lent(networks.make(name).task) as (objective, named):
        parameters = list(named.values())
        engine = played(objective, parameters, "hessian", "forward")
        assert {product.route for product, _ in engine.products} == {"forward"}
        found = matrix(engine, sum(p.numel() for p in parameters))
    wanted = dense(name, "hessian")
    assert float((found - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


REVERSE = [*FORWARD, "lstm", "gru"]


@pytest.mark.parametrize(
    ("name", "curvature"),
    [*((n, "hessian") for n in REVERSE), *((n, "ggn") for n in REVERSE if n != "pinn")],
)
def test_reverse_tapes_are_the_dense_matrix(networks, dense, name, curvature):
    with networks.lent(networks.make(name).task) as (objective, named):
        parameters = list(named.values())
        engine = played(objective, parameters, curvature, "reverse")
        found = matrix(engine, sum(p.numel() for p in parameters))
    wanted = dense(name, curvature)
    assert float((found - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def test_a_zero_hessian_needs_no_tape(networks):
    with networks.lent(networks.make("linear loss").task) as (objective, named):
        engine = make_engine(
            objective, list(named.values()), curvature="hessian", engine="linearized"
        )
        assert not engine.products
        assert not engine(torch.ones(8, dtype=torch.float64)).any()


def test_rounding_noise_in_place_of_a_hessian_is_no_disagreement(networks):
    """A bias before BatchNorm in train mode moves nothing: both routes give noise of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    task = networks.regression(model, networks.pairs(3, sizes=(6, 5)), mode="train").task
    with networks.lent(task) as (objective, named):
        engine = played(objective, [named["0.bias"]], "hessian", "forward")
        assert float(engine(torch.ones(4, dtype=torch.float64)).norm()) < 1e-14


class Hidden(torch.autograd.Function):
    """sin(x), out of torch's sight: no tape can follow what NumPy does."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy().copy()).sin()

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return HiddenSlope.apply(x, slope)


class HiddenSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x, slope)
        return torch.from_numpy(x.detach().numpy().copy()).cos() * slope

    @staticmethod
    def backward(ctx, bend):
        x, slope = ctx.saved_tensors
        seen = torch.from_numpy(bend.detach().numpy().copy())
        return -x.sin() * slope * seen, x.cos() * seen


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(Hidden.apply(self.first(x)))


def test_a_product_that_no_tape_can_follow_ends_with_the_engine_to_use(networks):
    with networks.lent(networks.regression(Foreign()).task) as (objective, named):
        parameters = list(named.values())
        with pytest.raises(SelfCheckFailed, match="use --engine kept, or auto"):
            make_engine(objective, parameters, curvature="hessian", engine="linearized")
        engine = make_engine(objective, parameters, curvature="hessian", products=10**6)
        assert engine.name == "kept"


def test_a_tape_that_disagrees_is_not_used(networks):
    with networks.lent(networks.make("tanh").task) as (objective, named):
        parameters = list(named.values())
        batch, _ = next(objective.own())
        with only(parameters):
            product = BUILD["hessian"](objective, batch, parameters)

            def wrong(vector):
                return [1.001 * part for part in product(vector)]

            with pytest.raises(CannotLinearize, match=r"disagrees with .* by 1\.0e-03"):
                linearized(objective, batch, parameters, Reference.of(wrong, parameters), "forward")


@pytest.mark.parametrize("name", ["tanh", "tied transformer", "batchnorm train", "groupnorm"])
def test_nothing_is_left_behind_by_recording(networks, name):
    with networks.lent(networks.make(name).task) as (objective, named):
        parameters = list(named.values())
        kept = make_engine(objective, parameters, curvature="hessian", engine="kept")
        vector = torch.ones(sum(p.numel() for p in parameters), dtype=torch.float64)
        before = kept(vector)
        bits = [p.detach().clone() for p in parameters]
        places = [p.data_ptr() for p in parameters]
        versions = [p._version for p in parameters]
        make_engine(objective, parameters, curvature="hessian", engine="linearized")
        assert all(torch.equal(p, b) for p, b in zip(parameters, bits, strict=True))
        assert places == [p.data_ptr() for p in parameters]
        assert versions == [p._version for p in parameters]
        assert not any(p.requires_grad or p.grad is not None for p in parameters)
        with torch.autograd.forward_ad.dual_level():
            assert all(torch.autograd.forward_ad.unpack_dual(p).tangent is None for p in parameters)
        assert torch.equal(kept(vector), before)


def test_the_tapes_hold_no_graph(networks):
    with networks.lent(networks.make("tied transformer").task) as (objective, named):
        engine = make_engine(
            objective, list(named.values()), curvature="hessian", engine="linearized"
        )
        result = engine(torch.ones(sum(p.numel() for p in named.values()), dtype=torch.float64))
        assert result.grad_fn is None
        for product, _ in engine.products:
            held = [t for step in product.tape.steps for t in step.given]
            held = [t for t in held if isinstance(t, torch.Tensor)]
            assert all(t.grad_fn is None for t in held)


def test_gauss_newton_has_the_reverse_route_only():
    assert routes(BUILD["hessian"]) == ("forward", "reverse")
    assert routes(BUILD["ggn"]) == ("reverse",)


def test_float32_products_are_compared_within_its_own_precision(networks):
    with networks.lent(networks.make("tanh").task, dtype=torch.float32) as (objective, named):
        parameters = list(named.values())
        engine = make_engine(objective, parameters, curvature="hessian", engine="linearized")
        kept = make_engine(objective, parameters, curvature="hessian", engine="kept")
        vector = torch.ones(sum(p.numel() for p in parameters))
        assert engine(vector).dtype == torch.float32
        torch.testing.assert_close(engine(vector), kept(vector), rtol=1e-4, atol=1e-5)
