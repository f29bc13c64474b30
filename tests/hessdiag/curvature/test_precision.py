from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hessdiag.curvature.engines import make_engine
from hessdiag.curvature.precision import (
    Rounded,
    gradient_noise,
    hidden_casts,
    loss_noise,
    noise_of,
)

EPS = torch.finfo(torch.float64).eps


def casts(networks, model, loss=None, data=None, dtype=torch.float64):
    task = networks.Task(model, data or networks.pairs(3), loss or networks.mse)
    with networks.lent(task, dtype) as (objective, named):
        return hidden_casts(objective, list(named.values()))


def test_rounding_is_that_of_float32():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.cat([values, -values, values * 1e-30, torch.zeros(2, dtype=torch.float64)])
    with Rounded(29, torch.float64):
        rounded = values * 1
    assert torch.equal(rounded, values.float().double())


def test_what_cancels_inside_a_kernel_is_seen():
    # The backward of log_softmax computes 1 - p, here 1e-6, which float32 knows to 5 %.
    logits = torch.tensor([[0.0, -13.8]], dtype=torch.float64, requires_grad=True)

    def slope():
        return torch.autograd.grad(-logits.log_softmax(1)[0, 0], logits)[0][0, 0].detach()

    fine = slope()
    with Rounded(29, torch.float64):
        assert abs(slope() - fine) < 1e-6 * abs(fine)
    with Rounded(29, torch.float64, kernels=True):
        assert abs(slope() - fine) > 1e-3 * abs(fine)


def test_infinities_and_integers_stay():
    values = torch.tensor([torch.inf, -torch.inf, 1.7e308], dtype=torch.float64)
    with Rounded(29, torch.float64):
        assert torch.equal((values * 1)[:2], values[:2])
        assert torch.equal(torch.arange(3) + 2**40, torch.arange(3) + 2**40)
        assert torch.isnan(values * torch.nan).all()
        loudest = torch.tensor([2**63 - 1]).view(torch.float64)  # NaN, every bit of it set
        assert torch.isnan(loudest.clone()).all()


def test_rounding_ends_with_its_context():
    x = torch.full((1,), 1 / 3, dtype=torch.float64)
    with Rounded(29, torch.float64):
        assert float(x * 1) != 1 / 3
    assert float(x * 1) == 1 / 3
    assert float(x) == 1 / 3


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", ["tanh", "tied transformer", "outputs"])
def test_the_noise_of_a_product_is_of_the_size_of_its_rounding_error(networks, name, curvature):
    with networks.lent(networks.make(name).task) as (objective, named):
        parameters = list(named.values())
        n = sum(p.numel() for p in parameters)
        vector = torch.randn(n, generator=torch.Generator().manual_seed(0)).double()
        product = make_engine(objective, parameters, curvature=curvature)(vector)
        noise = noise_of(objective, parameters, curvature)(vector)
    assert 0.01 * EPS < float(noise.norm() / product.norm()) < 1e3 * EPS


def test_a_row_that_is_zero_but_for_cancellation_is_seen(networks):
    # A bias before batch normalisation: its exact curvature is 0, its computed one is not.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    case = networks.regression(model, networks.pairs(3, sizes=(16,)), mode="train")
    with networks.lent(case.task) as (objective, named):
        bias, weight = [named["0.bias"]], [named["0.weight"]]
        ones = torch.ones(4, dtype=torch.float64)
        row = make_engine(objective, bias, curvature="hessian")(ones)
        noise = noise_of(objective, bias, "hessian")(ones)
        assert float(row.norm()) <= 1e3 * float(noise.norm())
        alive = make_engine(objective, weight, curvature="hessian")(torch.ones(12).double())
        loud = noise_of(objective, weight, "hessian")(torch.ones(12).double())
        assert float(alive.norm()) > 1e6 * float(loud.norm())


def test_a_zero_matrix_has_zero_noise(networks):
    with networks.lent(networks.make("linear loss").task) as (objective, named):
        noise = noise_of(objective, list(named.values()), "hessian")
        assert not noise(torch.ones(8, dtype=torch.float64)).any()


def test_gradient_and_loss_have_noise_of_their_own(networks):
    with networks.lent(networks.make("tanh").task) as (objective, named):
        parameters = list(named.values())
        gradient = objective.gradient(parameters)
        noise = gradient_noise(objective, parameters)
        assert 0.01 * EPS < float(noise.norm() / gradient.norm()) < 100 * EPS
        narrow = gradient_noise(objective, parameters, narrow=True)
        assert float(narrow.norm()) > float(noise.norm()) * 2**20
        assert EPS < loss_noise(objective) / objective.value() < 1e3 * EPS


def test_measuring_noise_changes_no_number(networks):
    with networks.lent(networks.make("batchnorm eval").task) as (objective, named):
        parameters = list(named.values())
        tensors = [
            *objective.model.parameters(),
            *objective.model.buffers(),
            objective.batches.items[0][0],
        ]
        before = [t.clone() for t in tensors]
        vector = torch.ones(sum(p.numel() for p in parameters), dtype=torch.float64)
        noise_of(objective, parameters, "hessian")(vector)
        assert all(torch.equal(*both) for both in zip(before, tensors, strict=True))


def test_no_network_of_float64_hides_a_cast(case, networks):
    with networks.lent(case.task) as (objective, named):
        assert hidden_casts(objective, [named[name] for name in case.trainable]) == {}


def test_a_cast_in_the_loss_is_named(networks):
    data = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))]
    found = casts(
        networks, networks.mlp(), lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]), data
    )
    assert found == {"the loss function": "float32"}


def test_a_cast_in_a_module_is_named_where_it_happens(networks):
    def inside(x):
        return torch.tanh(x.float()).double()

    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(networks.Calls(inside)), nn.Linear(4, 2))
    assert casts(networks, model) == {"module '1.0' (Calls)": "float32"}


def test_a_cast_in_the_roots_own_forward_is_named(networks):
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x).half().double()

    assert casts(networks, Own(3, 2)) == {"the model's forward": "float16"}


def test_a_cast_in_a_compiled_submodule_has_a_clean_name(networks):
    body = nn.Sequential(nn.Linear(3, 4), networks.Calls(lambda x: x.float().double()))
    model = nn.Sequential(torch.compile(body, backend="eager"), nn.Linear(4, 2))
    assert casts(networks, model) == {"module '0.1' (Calls)": "float32"}


class Narrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.float().double()


def test_a_constant_that_is_rounded_once_is_no_cast(networks):
    class Rotary(torch.nn.Linear):
        def forward(self, x):
            angles = torch.arange(3.0, dtype=x.dtype).float().cos()
            return super().forward(x * angles)

    assert casts(networks, Rotary(3, 2)) == {}


def test_a_cast_in_the_backward_alone_is_found(networks):
    model = nn.Sequential(nn.Linear(3, 4), networks.Calls(Narrowed.apply), nn.Linear(4, 2))
    assert casts(networks, model) == {"the backward pass": "float32"}


def test_float32_arithmetic_is_no_cast_when_float32_was_asked_for(networks):
    model = nn.Sequential(nn.Linear(3, 4), networks.Calls(lambda x: x.float()), nn.Linear(4, 2))
    assert casts(networks, model, dtype=torch.float32) == {}


def test_integers_masks_and_widening_are_no_casts(networks):
    def masked(x):
        mask = (torch.arange(4) > 1).float()
        return x * mask.to(x) + torch.ones(1, dtype=torch.float32)

    model = nn.Sequential(nn.Linear(3, 4), networks.Calls(masked), nn.Linear(4, 2))
    assert casts(networks, model) == {}


def test_the_watch_leaves_no_hook_even_after_an_error(networks):
    def failing(x):
        raise ValueError("no")

    model = nn.Sequential(nn.Linear(3, 4), networks.Calls(failing))
    with pytest.raises(Exception, match="no"):
        casts(networks, model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
