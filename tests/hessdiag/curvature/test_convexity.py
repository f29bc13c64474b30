"""What is called convex is; known by the second derivative of each loss in its outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from hessdiag.curvature.convexity import convex_loss
from hessdiag.curvature.objective import Objective
from hessdiag.data import load_batches

LABEL = torch.tensor([0, 2, 1, 2])
TARGET = torch.tensor([[0.3, 1.0, -2.0]] * 4, dtype=torch.float64)
SHARES = torch.tensor([[0.2, 0.3, 0.5]] * 4, dtype=torch.float64)
SIGNED = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def square(z):
    return z * z


CONVEX = {
    "cross-entropy": lambda z: F.cross_entropy(z, LABEL),
    "smoothed": lambda z: F.cross_entropy(z, LABEL, label_smoothing=0.2),
    "soft labels": lambda z: F.cross_entropy(z, SHARES),
    "by hand": lambda z: -(F.log_softmax(z, -1) * SHARES).sum(-1).mean(),
    "logsumexp": lambda z: (z.logsumexp(-1) - z[:, 0]).mean(),
    "mse": lambda z: F.mse_loss(z, TARGET),
    "squares": lambda z: 0.5 * (z - TARGET).pow(2).sum(),
    "product": lambda z: square(z - TARGET).mean() / 3,
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, SHARES),
    "huber": lambda z: F.huber_loss(z, TARGET) + 2 * F.mse_loss(z, TARGET),
    "linear": lambda z: (z * SIGNED).sum(),
    "reshaped": lambda z: F.cross_entropy(z.view(2, 2, 3).transpose(1, 2), LABEL.view(2, 2)),
    "softplus": lambda z: F.softplus(z, beta=2.0).mean(),
    "poisson": lambda z: (z.exp() - SHARES * z).mean(),
}
NOT_KNOWN = {
    "negative": lambda z: -F.mse_loss(z, TARGET),
    "difference": lambda z: F.mse_loss(z, TARGET) - 2 * F.mse_loss(z, -TARGET),
    "cubes": lambda z: (z - TARGET).pow(3).mean(),
    "sigmoid": lambda z: F.mse_loss(z.sigmoid(), TARGET),
    "softmax": lambda z: F.mse_loss(z.softmax(-1), SHARES),
    "signed weights": lambda z: (F.mse_loss(z, TARGET, reduction="none") * SIGNED).mean(),
    "class weights": lambda z: F.cross_entropy(z, LABEL, weight=SIGNED.flip(0)),
    "signed labels": lambda z: F.cross_entropy(z, SIGNED.expand(4, 3)),
    "product": lambda z: (z[:, 0] * z[:, 1]).mean(),
    "quotient": lambda z: (1 / z).mean(),
    "softplus turned round": lambda z: F.softplus(z, beta=-1.0).mean(),
    "both of its sides": lambda z: F.binary_cross_entropy_with_logits(z[:, 0], z[:, 1].sigmoid()),
    "bilinear": lambda z: F.binary_cross_entropy_with_logits(z[:, 0], z[:, 1]),
    "concave": lambda z: F.log_softmax(z, -1).mean(),
    "outside [0, 1]": lambda z: F.binary_cross_entropy_with_logits(
        z, TARGET, pos_weight=9 * SIGNED.abs()
    ),
}


def objective(loss):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    data = torch.randn(4, 5, dtype=torch.float64)
    batches = load_batches(
        [data], lambda b: len(b), dtype=torch.float64, device=torch.device("cpu")
    )
    return model, Objective(model, lambda m, batch: loss(m(batch)), batches)


def curvature(loss):
    """The smallest eigenvalue of the loss's Hessian in the outputs, over some outputs."""
    torch.manual_seed(1)
    worst = []
    for _ in range(5):
        outputs = torch.randn(4, 3, dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(loss, outputs).reshape(12, 12)
        worst.append(float(torch.linalg.eigvalsh(hessian)[0]))
    return min(worst)


@pytest.mark.parametrize("name", CONVEX)
def test_a_convex_loss_is_recognised_and_is_convex(name):
    model, task = objective(CONVEX[name])
    assert convex_loss(task, list(model.parameters()))
    assert curvature(CONVEX[name]) > -1e-12


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_what_is_not_convex_is_never_called_so(name):
    model, task = objective(NOT_KNOWN[name])
    assert not convex_loss(task, list(model.parameters()))
    assert curvature(NOT_KNOWN[name]) < -1e-6


def test_one_batch_that_is_not_convex_is_enough():
    model, task = objective(lambda z: F.mse_loss(z, TARGET) if len(z) == 4 else -z.pow(2).mean())
    rows = torch.randn(7, 5, dtype=torch.float64)
    batches = load_batches(
        [rows[:4], rows[4:]], lambda b: len(b), dtype=torch.float64, device=torch.device("cpu")
    )
    assert not convex_loss(Objective(model, task.loss, batches), list(model.parameters()))


def test_a_loss_summed_in_a_long_loop_is_read():
    def loss(outputs):
        total = outputs.sum() * 0
        for _ in range(3000):
            total = total + F.mse_loss(outputs, TARGET)
        return total

    model, task = objective(loss)
    assert convex_loss(task, list(model.parameters()))


def test_a_graph_that_shares_its_nodes_is_read_once():
    def loss(outputs):
        for _ in range(60):
            outputs = outputs.relu() + outputs
        return outputs.sum()

    model, task = objective(loss)
    assert convex_loss(task, list(model.parameters()))
