"""K-FAC's factors against per-sample derivatives written out, and where K-FAC is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hessdiag.variants.kfac
import hessdiag.variants.kronecker_factors
from hessdiag import Task
from hessdiag.variants.coordinates import congruence
from hessdiag.variants.kfac import DAMPING, kfac
from hessdiag.variants.scene import NotApplicable
from kfac_oracle import (
    SIZES,
    classes,
    close,
    damped_inverse,
    entropy,
    everything,
    half_squares,
    hessian,
    in_block_order,
    layer_metric,
    made_of,
    metric,
    pairs,
    second_moment,
    with_one,
)
from lent_scenes import dense, lent_scene


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(11)


@pytest.fixture
def undamped(monkeypatch):
    monkeypatch.setattr(hessdiag.variants.kfac, "DAMPING", 1e-24)


@pytest.mark.parametrize("bias", [True, False])
def test_m_is_the_inverse_hessian_of_a_linear_regression(bias, undamped):
    task = Task(nn.Linear(4, 2, bias=bias), pairs(4), half_squares)
    names = [name for name, _ in task.model.named_parameters()]
    h = hessian(task, names)
    made = made_of(task, matrix=h)
    eye = torch.eye(len(h), dtype=torch.float64)
    torch.testing.assert_close(congruence(h, made.coordinates), eye, atol=1e-9, rtol=0)
    assert made.source == "activations"
    assert made.notes[0].startswith("K-FAC: G exact Gauss–Newton; λ = ")


@pytest.mark.parametrize("names", [["weight"], ["bias"]])
def test_a_block_with_one_of_weight_and_bias_takes_its_part_of_a(names, undamped):
    task = Task(nn.Linear(4, 2), pairs(4), half_squares)
    h = hessian(task, names)
    eye = torch.eye(len(h), dtype=torch.float64)
    found = congruence(h, made_of(task, names).coordinates)
    torch.testing.assert_close(found, eye, atol=1e-9, rtol=0)


def test_m_is_the_inverse_hessian_of_the_last_layer_under_squares(undamped):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    task = Task(net, pairs(3), half_squares)
    names = ["2.weight", "2.bias"]
    h = hessian(task, names)
    found = congruence(h, made_of(task, names).coordinates)
    torch.testing.assert_close(found, torch.eye(10, dtype=torch.float64), atol=1e-8, rtol=0)


def test_g_of_a_softmax_layer_is_the_mean_covariance_of_its_classes():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    task = Task(net, classes(3), entropy)
    made = made_of(task, ["2.weight", "2.bias"])
    with torch.no_grad():
        double = net.double()
        x, _ = everything(task.data)
        h = torch.tanh(double[0](x))
        p = double[2](h).softmax(dim=1)
    g = torch.diag(p.mean(dim=0)) - second_moment(p)
    close(metric(made), layer_metric(g, second_moment(with_one(h))))


def test_the_layers_of_a_block_are_joined_in_its_order():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    task = Task(net, pairs(3), half_squares)
    first, second = (made_of(task, [f"{i}.weight", f"{i}.bias"]) for i in (0, 2))
    whole = metric(made_of(task))
    torch.testing.assert_close(whole, torch.block_diag(metric(first), metric(second)))


class Mixed(nn.Module):
    """Layers that K-FAC is not defined for, beside one that it is."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 5, bias=False)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, tokens):
        x = self.norm(self.embed(tokens))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.grouped(x.mT).mT.mean(dim=1)
        return self.head(x) + self.tied(x)


def test_what_k_fac_is_not_defined_for_keeps_the_identity_and_is_named_with_the_reason():
    data = [(torch.randint(0, 5, (n, 3)), torch.randint(0, 5, (n,))) for n in SIZES]
    task = Task(Mixed(), data, entropy)
    made = made_of(task)
    with lent_scene(task) as scene:
        places = scene.places()
    m = metric(made)
    for name, where in places.items():
        eye = torch.eye(len(where), dtype=torch.float64)
        assert torch.equal(m[where][:, where], eye) is (name != "head.weight"), name
    text = "\n".join(made.notes)
    for line in (
        "norm.weight, norm.bias, attention.in_proj_weight, attention.in_proj_bias: "
        "not of a Linear or convolution layer",
        "embed.weight: shared with another module",
        "grouped.weight, grouped.bias: a convolution with groups",
        "attention.out_proj.weight, attention.out_proj.bias, unused.weight, unused.bias: "
        "its forward is not called",
    ):
        assert f"M is the identity for {line}" in text


def test_a_block_without_any_such_layer_is_refused_with_the_reason():
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    with pytest.raises(NotApplicable, match=r"\(1.weight, 1.bias: not of a Linear"):
        made_of(Task(net, pairs(3), half_squares), ["1.weight", "1.bias"])


def test_a_block_that_no_curvature_reaches_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(net[1].weight)
    with pytest.raises(NotApplicable, match=r"weight.*: no curvature reaches it"):
        made_of(Task(net, pairs(3), half_squares), ["0.weight", "0.bias"])


def test_a_weight_without_any_input_has_no_curvature():
    task = Task(nn.Linear(3, 2), [(torch.zeros(7, 3), torch.randn(7, 2))], half_squares)
    with pytest.raises(NotApplicable, match=r"weight.*: no curvature reaches it"):
        made_of(task, ["weight"])


def test_a_layer_without_inputs_is_named():
    layer = nn.Linear(1, 2)
    layer.weight = nn.Parameter(torch.empty(2, 0))
    task = Task(layer, [(torch.zeros(7, 0), torch.randn(7, 2))], half_squares)
    with pytest.raises(NotApplicable, match="weight, bias: of a layer without weights"):
        made_of(task)


def test_dead_inputs_leave_p_finite_and_invertible():
    data = [(x * torch.tensor([1.0, 0, 1]), y) for x, y in pairs(3)]
    task = Task(nn.Linear(3, 2), data, half_squares)
    p = dense(made_of(task).coordinates)
    assert torch.linalg.cond(p) < 10 / DAMPING**0.25


@pytest.fixture
def limit_of_four(monkeypatch):
    for module in (hessdiag.variants.kfac, hessdiag.variants.kronecker_factors):
        monkeypatch.setattr(module, "SIDE_LIMIT", 4)


@pytest.mark.usefixtures("limit_of_four")
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_side_of_inputs_counts_as_its_mean_eigenvalue(bias):
    net = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4, bias=False))
    task = Task(net, pairs(5, out=4), half_squares)
    made = made_of(task, ["0.weight", "0.bias"][: 1 + bias])
    x, _ = everything(task.data)
    a = second_moment(with_one(x) if bias else x)
    w = net[1].weight.detach().double()
    mean = a.trace() / len(a) * torch.eye(len(a), dtype=torch.float64)
    outer = damped_inverse(w.T @ w)
    truth = torch.kron(outer, damped_inverse(mean))
    close(metric(made), in_block_order(truth, 3, 5) if bias else truth)
    assert "sides of more than 4 count as their mean eigenvalue: 0" in made.notes


@pytest.mark.usefixtures("limit_of_four")
@pytest.mark.parametrize("features", [2, 4])
def test_a_large_side_of_outputs_counts_as_its_mean_eigenvalue(features):
    """And without a bias four inputs make a factor of four."""
    task = Task(nn.Linear(features, 5, bias=False), pairs(features, out=5), half_squares)
    x, _ = everything(task.data)
    eye = torch.eye(5, dtype=torch.float64)
    truth = torch.kron(damped_inverse(eye), damped_inverse(second_moment(x)))
    close(metric(made_of(task)), truth)


def test_without_any_small_side_m_is_one_number(monkeypatch):
    for module in (hessdiag.variants.kfac, hessdiag.variants.kronecker_factors):
        monkeypatch.setattr(module, "SIDE_LIMIT", 1)
    task = Task(nn.Linear(4, 2), pairs(4), half_squares)
    x, _ = everything(task.data)
    a = second_moment(with_one(x)).trace() / 5
    m = 1 / (a * (1 + DAMPING**0.5) ** 2)
    close(metric(made_of(task)), m * torch.eye(10, dtype=torch.float64))


def test_factors_are_computed_once_for_all_blocks(monkeypatch):
    task = Task(nn.Linear(4, 2), pairs(4), half_squares)
    with lent_scene(task) as scene:
        first = kfac(scene)
        monkeypatch.setattr(hessdiag.variants.kfac, "collect", None)
        again = kfac(scene)
    assert torch.equal(metric(first), metric(again))


def test_m_does_not_need_the_gradients_that_off_diagonality_needs():
    task = Task(nn.Linear(4, 2), pairs(4), half_squares)
    made = made_of(task, iterates=[{"weight": torch.ones(9, 9)}])
    assert made.off_diagonality is None
    assert torch.equal(metric(made), metric(made_of(task)))


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with lent_scene(Task(net, pairs(3), half_squares)) as scene:
        before = [p.detach().clone() for p in net.parameters()]
        kfac(scene)
        assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert all(map(torch.equal, before, net.parameters()))


def test_the_eigenvectors_of_the_factors_are_the_rotation(undamped):
    """They diagonalise the Hessian of a regression, which is G ⊗ A."""
    task = Task(nn.Linear(4, 2), pairs(4), half_squares)
    made = made_of(task, matrix=hessian(task, ["weight", "bias"]))
    (note,) = (note for note in made.notes if note.startswith("off-diagonality of H"))
    after = float(note.split("before, ")[1].split(" after")[0])
    assert after < 1e-10
    assert set(made.off_diagonality) == {"before", "after"}


def test_float32_parameters_are_served():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    task = Task(net, pairs(3), half_squares)
    wide = made_of(task).coordinates
    made = made_of(task, dtype=torch.float32).coordinates
    z = torch.randn(2, 26, dtype=torch.float32)
    assert made.apply(z).dtype == torch.float32
    torch.testing.assert_close(made.apply(z).double(), wide.apply(z.double()), rtol=1e-2, atol=1e-2)
