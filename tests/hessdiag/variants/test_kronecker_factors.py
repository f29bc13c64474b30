"""The factors of K-FAC against per-sample derivatives, and where G is not called exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

import hessdiag.variants.kronecker_factors
from hessdiag import Task
from kfac_oracle import (
    classes,
    close,
    entropy,
    everything,
    half_squares,
    layer_metric,
    made_of,
    metric,
    pairs,
    second_moment,
    with_one,
)
from lent_scenes import dense


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(11)


def tail_jacobian(tail, activations):
    """``d outputs_j / d a_j`` of every sample, (samples, outputs, …)."""
    return torch.stack(
        [torch.autograd.functional.jacobian(tail, a[None])[0, :, 0] for a in activations]
    )


def test_g_of_a_hidden_layer_is_the_mean_of_the_jacobians_between_the_losss_hessian():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    task = Task(net, classes(3), entropy)
    made = made_of(task, ["0.weight", "0.bias"])
    x, _ = everything(task.data)
    double = net.double()
    with torch.no_grad():
        a = double[0](x)
        p = double[1:](a).softmax(dim=1)
    jacobians = tail_jacobian(double[1:], a)
    curved = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    g = (jacobians.mT @ curved @ jacobians).mean(dim=0)
    close(metric(made), layer_metric(g, second_moment(with_one(x))))


def test_a_convolution_takes_patches_for_a_and_sums_g_over_positions():
    net = nn.Sequential(
        nn.Conv2d(2, 3, (2, 3), stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)
    )
    task = Task(net, pairs(2, 4, 5), half_squares)
    made = made_of(task, ["0.weight", "0.bias"])
    x, _ = everything(task.data)
    double = net.double()
    with torch.no_grad():
        a = double[0](x)
    patches = F.unfold(x, (2, 3), stride=2, padding=1).mT.reshape(-1, 12)
    jacobians = tail_jacobian(double[1:], a).flatten(3)  # samples, outputs, channels, positions
    g = torch.einsum("nkct,nkdt->cd", jacobians, jacobians) / len(x)
    close(metric(made), layer_metric(g, second_moment(with_one(patches))))


def test_positions_of_a_linear_layer_count_as_those_of_a_convolution():
    net = nn.Sequential(nn.Linear(3, 2), nn.Flatten())
    task = Task(net, pairs(4, 3, out=8), half_squares)
    x, _ = everything(task.data)
    g = 4 * torch.eye(2, dtype=torch.float64)
    truth = layer_metric(g, second_moment(with_one(x.reshape(-1, 3))))
    close(metric(made_of(task)), truth)


def test_what_follows_a_layer_in_place_does_not_change_its_factors():
    nets = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=on), nn.Linear(4, 2)) for on in (0, 1)]
    nets[1].load_state_dict(nets[0].state_dict())
    data = pairs(3)
    found = [metric(made_of(Task(net, data, half_squares))) for net in nets]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


def test_calls_of_a_layer_count_as_positions():
    net = Twice()
    task = Task(net, pairs(3, out=3), half_squares)
    made = made_of(task)
    double = net.layer.double()
    x, _ = everything(task.data)
    with torch.no_grad():
        w, h = double.weight.detach(), double(x)
    g = torch.eye(3, dtype=torch.float64) + w.T @ w
    close(metric(made), layer_metric(g, second_moment(with_one(torch.cat([x, h])))))
    assert "each call counts as a further position: layer" in made.notes


def gradient_moment(net, tail, data, loss):
    """Mean over samples of the squared gradients of each one's own loss at a layer's output."""
    x, y = everything(data)
    a = net(x).detach().requires_grad_(True)
    terms = sum(loss(tail, (a[j : j + 1], y[j : j + 1])) for j in range(len(x)))
    (gradient,) = torch.autograd.grad(terms, a)
    return second_moment(gradient)


def huber(model, batch):
    """Not convex in the outputs: Geman and McClure's."""
    square = (model(batch[0]) - batch[1]).square()
    return (square / (1 + square)).sum(dim=1).mean()


def linear_loss(model, batch):
    return (model(batch[0]) * batch[1]).sum(dim=1).mean()


def test_g_is_the_gradients_second_moment_where_there_are_many_outputs(monkeypatch):
    monkeypatch.setattr(hessdiag.variants.kronecker_factors, "OUTPUT_LIMIT", 1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    task = Task(net, pairs(3), half_squares)
    made = made_of(task, ["0.weight", "0.bias"])
    double = net.double()
    g = gradient_moment(double[0], double[1:], task.data, half_squares)
    x, _ = everything(task.data)
    close(metric(made), layer_metric(g, second_moment(with_one(x))))
    assert "G from the gradients of the loss (a sample has more than 1 outputs)" in made.notes[0]


@pytest.mark.parametrize(
    ("loss", "reason"),
    [(huber, "the loss is not convex"), (linear_loss, "the loss is linear in the network's")],
)
def test_a_loss_without_a_positive_hessian_in_the_outputs_gives_the_empirical_g(loss, reason):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    task = Task(net, pairs(3), loss)
    made = made_of(task, ["0.weight", "0.bias"])
    double = net.double()
    g = gradient_moment(double[0], double[1:], task.data, loss)
    x, _ = everything(task.data)
    close(metric(made), layer_metric(g, second_moment(with_one(x))))
    assert reason in made.notes[0]


def spread(model, batch):
    """Of the outputs of a batch about their mean."""
    outputs = model(batch[0])
    return (outputs - outputs.mean(dim=0)).square().mean()


def penalised(model, batch):
    return half_squares(model, batch) + model.weight.square().sum()


@pytest.mark.parametrize(
    ("net", "loss", "mode", "reason"),
    [
        (nn.Linear(3, 2), spread, "eval", "the loss lets the samples of a batch meet"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
            half_squares,
            "train",
            "samples of a batch meet in the network, as in BatchNorm",
        ),
        (nn.Linear(3, 2), penalised, "eval", "uses parameters besides them"),
    ],
)
def test_where_one_samples_curvature_is_not_its_own_g_is_not_called_exact(net, loss, mode, reason):
    made = made_of(Task(net, pairs(3), loss, mode=mode))
    assert "G from the gradients of the loss" in made.notes[0]
    assert reason in made.notes[0]
    assert dense(made.coordinates).isfinite().all()


class Parts(nn.Module):
    """A hidden layer that is recomputed in the backward pass, or not."""

    def __init__(self, *, recomputed):
        super().__init__()
        self.recomputed = recomputed
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def body(self, x):
        return torch.tanh(self.first(x))

    def forward(self, x):
        if self.recomputed:
            return self.second(checkpoint(self.body, x, use_reentrant=False))
        return self.second(self.body(x))


@pytest.mark.parametrize("limit", [1, 128])
def test_layers_that_are_recomputed_in_the_backward_pass_count_once(limit, monkeypatch):
    monkeypatch.setattr(hessdiag.variants.kronecker_factors, "OUTPUT_LIMIT", limit)
    nets, data = [Parts(recomputed=on) for on in (False, True)], pairs(3)
    nets[1].load_state_dict(nets[0].state_dict())
    plain, recomputed = (made_of(Task(net, data, half_squares)) for net in nets)
    torch.testing.assert_close(metric(recomputed), metric(plain))
    assert recomputed.notes == plain.notes


class Frozen(nn.Module):
    """A layer whose call has no graph."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            h = self.first(x)
        return self.second(h)


def test_a_layer_that_runs_without_gradients_keeps_the_identity():
    made = made_of(Task(Frozen(), pairs(3), half_squares))
    eye = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(metric(made)[:16, :16], eye)
    note = "M is the identity for first.weight, first.bias: no curvature reaches it"
    assert note in made.notes


class Image(nn.Module):
    """A convolution of one image, with a batch dimension or without."""

    def __init__(self, *, batched):
        super().__init__()
        self.batched = batched
        self.conv, self.head = nn.Conv2d(2, 3, 2), nn.Linear(12, 2)

    def forward(self, x):
        found = self.conv(x) if self.batched else self.conv(x[0])[None]
        return self.head(found.flatten(1))


def test_a_convolution_without_a_batch_is_one_sample():
    nets = [Image(batched=on) for on in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    data = [(torch.randn(1, 2, 3, 3), torch.randn(1, 2))]
    batched, alone = (metric(made_of(Task(net, data, half_squares))) for net in nets)
    torch.testing.assert_close(alone, batched)


class Summed(nn.Module):
    """Outputs of samples, and one that is nobody's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        y = self.layer(x)
        return y, y.square().mean()


def test_outputs_that_belong_to_no_sample_give_the_empirical_g():
    def loss(model, batch):
        y, size = model(batch[0])
        return (y - batch[1]).square().mean() + size

    made = made_of(Task(Summed(), pairs(3), loss))
    assert "no common first dimension of samples" in made.notes[0]
