"""Small smooth losses and their dense Hessians by double backward, for products by differences."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from hessdiag import Task


class Once(torch.autograd.Function):
    """tanh whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class OnceTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


class Quartic(nn.Module):
    """A quartic, cubic and quadratic in parameters whose natural scales span decades."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=made, dtype=torch.float64)

        n, decades = 3 + seed % 6, (0, 2, 4)[seed % 3]
        self.scale = 10 ** (decades * (torch.rand(n, generator=made, dtype=torch.float64) - 0.5))
        self.p = nn.Parameter(normal(n) * self.scale)
        self.a, self.q = normal(n, n), normal(n, n)

    def forward(self) -> Tensor:
        z = self.p / self.scale
        u = self.a @ z
        return (u**4).sum() / 24 + (u**3).sum() / 60 + 0.5 * z @ (self.q @ z)


def mlp(seed: int, act: nn.Module | None = None, samples: int = 12) -> Task:
    torch.manual_seed(seed)
    d, h, o = 2 + seed % 3, 2 + seed % 4, 2 + seed % 2
    model = nn.Sequential(nn.Linear(d, h), act or nn.Tanh(), nn.Linear(h, o)).double()
    x = torch.randn(samples, d, dtype=torch.float64) * 10.0 ** (seed % 3 - 1)
    return Task(model, [(x, torch.randint(0, o, (samples,)))], nn.CrossEntropyLoss())


def task(index: int) -> Task:
    """One of as many small problems as there are numbers."""
    if index % 2:
        model = Quartic(index // 2)
        return Task(model, [torch.zeros(1, 1, dtype=torch.float64)], lambda m, _: m())
    return mlp(index // 2, (nn.Tanh(), nn.GELU(), nn.Softplus())[index // 2 % 3])


def dense(task: Task) -> tuple[Tensor, Tensor]:
    """The Hessian and the gradient over the one batch of a task, entry by entry."""
    (batch,) = task.data
    parameters = list(task.model.parameters())

    def flat(of: Tensor, **more: bool) -> Tensor:
        found = torch.autograd.grad(
            of, parameters, allow_unused=True, materialize_grads=True, **more
        )
        return torch.cat([part.reshape(-1) for part in found])

    loss = (
        task.model()
        if isinstance(task.model, Quartic)
        else F.cross_entropy(task.model(batch[0]), batch[1])
    )
    slope = flat(loss, create_graph=True)
    matrix = torch.stack([flat(entry, retain_graph=True) for entry in slope])
    return (matrix + matrix.T) / 2, slope.detach()
