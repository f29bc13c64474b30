"""K-FAC's M from moments that a test writes out, on small tasks of two ragged batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from dense_oracle import dense as dense_curvature
from hessdiag.variants.kfac import DAMPING, kfac
from lent_scenes import dense, lent_scene

SIZES = (5, 3)


def pairs(*shape, out=2):
    return [(torch.randn(n, *shape), torch.randn(n, out)) for n in SIZES]


def half_squares(model, batch):
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(dim=1).mean()


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def classes(*shape, count=3):
    return [(torch.randn(n, *shape), torch.randint(0, count, (n,))) for n in SIZES]


def everything(data):
    """The whole dataset as one batch, in float64."""
    inputs, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    return inputs.double(), targets.double() if targets.is_floating_point() else targets


def with_one(h):
    return torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], dim=1)


def second_moment(h):
    return h.T @ h / len(h)


def damped_inverse(factor):
    """λ = DAMPING tr(G) tr(A) / (d_G d_A) split by π = √(tr(A) d_G / (tr(G) d_A))."""
    shift = DAMPING**0.5 * factor.trace() / len(factor)
    return torch.linalg.inv(factor + shift * torch.eye(len(factor), dtype=factor.dtype))


def made_of(task, names=None, **scene):
    with lent_scene(task, names, **scene) as found:
        return kfac(found)


def metric(made):
    p = dense(made.coordinates)
    return p @ p.T


def in_block_order(matrix, outputs, inputs):
    """A matrix over the rows of [W b] as one over W's entries, then b's."""
    grid = torch.arange(outputs * (inputs + 1)).reshape(outputs, inputs + 1)
    order = torch.cat([grid[:, :-1].reshape(-1), grid[:, -1]])
    return matrix[order][:, order]


def layer_metric(outer, inner):
    """``G⁻¹ ⊗ A⁻¹`` of one layer, damped, in the block's order."""
    found = torch.kron(damped_inverse(outer), damped_inverse(inner))
    return in_block_order(found, len(outer), len(inner) - 1)


def close(found, truth):
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9 * float(truth.abs().max()))


def hessian(task, names):
    weights = [len(batch[1]) for batch in task.data]
    _, _, matrix, index = dense_curvature(task.model, task.data, task.loss, weights)
    places = [place for name in names for place in index[name]]
    return torch.from_numpy(matrix[places][:, places])
