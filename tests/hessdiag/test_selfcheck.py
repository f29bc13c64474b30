from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hessdiag import Task
from hessdiag.errors import InputError, SelfCheckFailed
from hessdiag.selfcheck import run_selfchecks


def check(task, networks, curvature="hessian", dtype=torch.float64, names=None):
    with networks.lent(task, dtype) as (objective, named):
        chosen = [named[name] for name in names or named]
        return run_selfchecks(objective, chosen, curvature=curvature, seed=0)


def sandwich(networks, function, mode="eval"):
    torch.manual_seed(0)
    middle = function if isinstance(function, nn.Module) else networks.Calls(function)
    return networks.regression(
        nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 2)), mode=mode
    ).task


def test_every_network_passes_with_all_checks_reported(case, networks):
    checks = check(case.task, networks)
    for found in (checks.slope, checks.symmetry, checks.difference, checks.repeatability):
        assert found.passed
        assert found.value <= found.limit
    assert checks.hidden_casts == {}
    assert checks.notices == ()
    stored = json.loads(json.dumps(checks.to_json()))
    assert set(stored) >= {"slope", "symmetry", "difference", "repeatability", "hidden_casts"}


@pytest.mark.parametrize("name", ["tanh", "relu", "tied transformer", "batchnorm train", "outputs"])
def test_gauss_newton_passes(name, networks):
    checks = check(networks.make(name).task, networks, "ggn")
    assert checks.symmetry.value < 1e-12
    assert checks.difference.value < 1e-6


@pytest.mark.parametrize("name", ["tanh", "relu", "tied transformer", "lstm", "batchnorm train"])
def test_float32_passes(name, networks):
    assert check(networks.make(name).task, networks, dtype=torch.float32).difference.passed


def weight_norm(old, dim=0):
    if not old:
        return nn.utils.parametrizations.weight_norm(nn.Linear(3, 4), dim=dim)
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 4), dim=dim)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm_is_refused_by_name_and_goes_through_with_ggn(networks, old, dim):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(3, 3), nn.Sequential(weight_norm(old, dim), nn.Tanh()), nn.Linear(4, 2)
    )
    task = networks.regression(model).task
    with pytest.raises(
        SelfCheckFailed, match=r"module '1.0' \(Linear with weight_norm\)"
    ) as caught:
        check(task, networks)
    assert "not symmetric" in str(caught.value)
    assert "--curvature ggn" in str(caught.value)
    assert "'2'" not in str(caught.value)
    assert check(task, networks, "ggn").symmetry.passed
    assert check(task, networks, names=["2.weight"]).symmetry.passed


def functional_dropout(x):
    return F.dropout(x, 0.5)


class Drifting(nn.Module):
    """A norm by moving statistics that it also uses."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(
    ("function", "mode", "name"),
    [
        (nn.Dropout(0.5), "train", "module '1' \\(Dropout\\)"),
        (functional_dropout, "eval", "module '1' \\(Calls\\)"),
        (Drifting(), "eval", "module '1' \\(Drifting\\)"),
    ],
)
def test_what_is_not_repeatable_is_refused_by_name(networks, curvature, function, mode, name):
    with pytest.raises(SelfCheckFailed, match=f"same product twice.*{name}"):
        check(sandwich(networks, function, mode), networks, curvature)


def test_functional_dropout_in_a_parents_forward_names_the_parent(networks):
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(functional_dropout(self.first(x)))

    task = networks.regression(nn.Sequential(Parent())).task
    with pytest.raises(SelfCheckFailed, match="module '0' \\(Parent\\)"):
        check(task, networks)


def test_chance_in_the_loss_is_no_modules_fault(networks):
    task = networks.Task(
        networks.mlp(), networks.pairs(3), lambda m, b: m(b[0] + torch.randn_like(b[0])).mean() ** 2
    )
    with pytest.raises(SelfCheckFailed, match="look at the loss function itself"):
        check(task, networks)


def test_encoder_dropout_in_train_mode_is_refused_by_name(networks):
    case = networks.make("encoder layer")
    task = networks.Task(case.model, case.data, case.loss, mode="train")
    with pytest.raises(SelfCheckFailed, match=r"module '0.self_attn' \(MultiheadAttention\)"):
        check(task, networks)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Once(torch.autograd.Function):
    """Its second derivative is dropped by torch without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


WRONG = {
    "straight-through": Straight.apply,
    "straight-through by detach": lambda x: x + (x.sign() - x).detach(),
    "detached statistics": lambda x: x - x.mean(0).detach(),
    "doubled gradient": Doubled.apply,
}


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", WRONG)
def test_a_backward_that_is_not_the_derivative_is_refused(networks, name, curvature):
    with pytest.raises(SelfCheckFailed, match=r"detach|not symmetric"):
        check(sandwich(networks, WRONG[name]), networks, curvature)


def test_a_second_derivative_that_torch_drops_is_refused(networks):
    with pytest.raises(SelfCheckFailed, match="once_differentiable") as caught:
        check(sandwich(networks, Once.apply), networks)
    assert "--engine difference" in str(caught.value)


def test_a_gradient_that_is_wrong_by_a_factor_is_refused_though_its_derivative_agrees(networks):
    task = networks.Task(
        nn.Linear(3, 2), networks.pairs(3), lambda m, b: Doubled.apply(networks.mse(m, b))
    )
    with pytest.raises(SelfCheckFailed, match="gradient is not the derivative of the loss"):
        check(task, networks)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("names", [None, ["body.0.weight"]])
def test_reentrant_checkpoints_that_swallow_the_gradient_are_refused(networks, names):
    body = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    task = networks.regression(networks.Checkpointed(body, reentrant=True)).task
    with pytest.raises(SelfCheckFailed, match="reentrant"):
        check(task, networks, names=names)


def kinked(networks):
    """Zero biases and some zero inputs: pre-activations at exactly zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].bias.zero_()
    x = torch.randn(12, 3)
    x[8:] = 0
    return networks.Task(model, [(x, torch.randn(12, 2))], networks.mse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_relu_network_on_kinks_passes_with_a_notice(networks, dtype):
    checks = check(kinked(networks), networks, dtype=dtype)
    assert checks.difference.passed
    assert any("on a kink" in notice for notice in checks.notices)


class Steep(nn.Module):
    """A large slope and a small curvature, with or without an error in the second derivative."""

    def __init__(self, curvature, *, wrong=False):
        super().__init__()
        self.p = nn.Parameter(torch.randn(20, dtype=torch.float64))
        self.curvature, self.wrong = curvature, wrong

    def forward(self, _):
        bent = 0.5 * self.p.square()
        if self.wrong:
            bent = bent + self.p.detach() * self.p
        return self.p.sum() + self.curvature * bent.sum()


def test_a_curvature_that_differences_cannot_see_beside_the_slope_passes_with_a_notice(networks):
    def loss(model, batch):
        return model(batch)

    torch.manual_seed(0)
    data = [torch.zeros(1, 1, dtype=torch.float64)]
    checks = check(networks.Task(Steep(1e-10), data, loss), networks)
    assert checks.difference.passed
    assert checks.notices == ()  # a longer step sees it
    checks = check(networks.Task(Steep(1e-13), data, loss), networks)
    assert checks.difference.passed
    assert any("drowned" in notice for notice in checks.notices)
    for curvature in (1e-3, 1e-6, 1e-8):
        with pytest.raises(SelfCheckFailed):
            check(networks.Task(Steep(curvature, wrong=True), data, loss), networks)


def test_a_relu_network_with_many_samples_passes_in_float32(networks):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    data = [(torch.randn(1280, 10), torch.randn(1280, 2))]
    checks = check(networks.Task(model, data, networks.mse), networks, dtype=torch.float32)
    assert checks.difference.passed
    assert "float64" in checks.difference.note
    wrong = nn.Sequential(model, networks.Calls(WRONG["detached statistics"]))
    with pytest.raises(SelfCheckFailed):
        check(networks.Task(wrong, data, networks.mse), networks, dtype=torch.float32)


def test_a_kink_does_not_excuse_a_wrong_backward(networks):
    task = kinked(networks)
    model = nn.Sequential(task.model, networks.Calls(WRONG["detached statistics"]))
    with pytest.raises(SelfCheckFailed):
        check(networks.Task(model, task.data, task.loss), networks)


def test_hidden_float32_passes_with_a_notice_that_names_the_place(networks):
    task = sandwich(networks, lambda x: torch.tanh(x.float()).double())
    checks = check(task, networks)
    assert checks.hidden_casts == {"module '1' (Calls)": "float32"}
    assert "hidden float32 in module '1' (Calls)" in checks.notices[0]
    assert checks.symmetry.limit == 1e-4


def test_hidden_bfloat16_is_refused_and_the_place_named(networks):
    task = sandwich(networks, lambda x: torch.tanh(x.bfloat16()).double())
    with pytest.raises(SelfCheckFailed, match="module '1' \\(Calls\\) \\(bfloat16\\)"):
        check(task, networks)


def test_a_derivative_that_is_not_finite_says_so(networks):
    model = nn.Sequential(nn.Linear(3, 2, bias=False), networks.Calls(lambda x: x.abs().sqrt()))
    data = [(torch.zeros(4, 3), torch.ones(4, 2))]
    with pytest.raises(SelfCheckFailed, match="not finite though the loss is"):
        check(networks.Task(model, data, networks.mse), networks)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_zero_matrix_passes(networks, curvature):
    checks = check(networks.make("linear loss").task, networks, curvature)
    assert checks.symmetry.note == "the matrix is zero or rounding noise"
    assert checks.difference.passed


def test_a_minimum_where_the_gradient_is_exactly_zero_passes(networks):
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    task = networks.Task(model, [(torch.randn(5, 3), torch.zeros(5, 2))], networks.mse)
    assert check(task, networks).slope.passed


def test_a_loss_with_a_large_constant_passes(networks):
    task = networks.Task(networks.mlp(), networks.pairs(3), lambda m, b: networks.mse(m, b) + 1e12)
    assert check(task, networks).slope.passed


def test_checks_leave_the_objective_as_it_was(networks):
    with networks.lent(networks.make("relu").task) as (objective, named):
        before = {name: (p.data_ptr(), p.clone()) for name, p in named.items()}
        run_selfchecks(objective, list(named.values()), curvature="hessian", seed=0)
        for name, (pointer, value) in before.items():
            assert named[name].data_ptr() == pointer
            assert torch.equal(named[name], value)
            assert not named[name].requires_grad
        hooks = [m._forward_hooks or m._forward_pre_hooks for m in objective.model.modules()]
        assert not any(hooks)


def test_a_seed_decides_every_number(networks):
    task = networks.make("tanh").task
    assert check(task, networks) == check(task, networks)


def logarithm(least):
    class Power(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([least, 0.3, 0.2]))

        def forward(self, x):
            return x

    return Task(Power(), [torch.ones(1)], lambda model, _: -model.weight.log().sum())


def test_a_loss_that_is_not_finite_a_step_away_is_told_so(networks):
    with pytest.raises(InputError, match="finite at the weights, but not at 3e-08"):
        check(logarithm(1e-9), networks)


def test_a_loss_that_is_finite_only_near_the_weights_is_checked_there(networks):
    assert check(logarithm(3e-6), networks).slope.passed
