"""Networks whose changes are known, and curvature by plain double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag import Task
from hessdiag.curvature.objective import Objective, only
from hessdiag.options import Options
from hessdiag.task import units
from hessdiag.variants.networks import Changed, changed_network
from sample_networks import lent, mse


def tanh_mlp(*, bias: bool = True) -> nn.Module:
    """3-4-3-2 with tanh."""
    return nn.Sequential(
        *(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=bias), nn.Tanh(), nn.Linear(3, 2))
    )


def task(
    model: nn.Module, *shape: int, sizes: Sequence[int] = (12,), loss: Any = mse, mode: Any = "eval"
) -> Task:
    """Regression of noise, in batches of these sizes."""
    with torch.no_grad():
        out = model(torch.randn(2, *shape)).shape[1:]
    data = [(torch.randn(n, *shape), torch.randn(n, *out)) for n in sizes]
    return Task(model, data, loss, mode=mode)


@contextmanager
def changed(name: str, given: Task, **options: Any) -> Iterator[tuple[Changed, dict[str, Any]]]:
    """The changed network of a task on loan, and its parameters by name."""
    with (
        lent(given) as (objective, _),
        changed_network(name, objective, Options(**options), units=units(given)) as found,
    ):
        yield found, dict(objective.model.named_parameters())


def hessian(objective: Objective, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Of the whole loss, row by row."""
    with only(parameters):
        loss = sum(share * objective.evaluate(batch) for batch, share in objective)
        slope = flat(torch.autograd.grad(loss, parameters, create_graph=True))
        options: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
        rows = [flat(torch.autograd.grad(s, parameters, **options)) for s in slope]
    return torch.stack(rows)


def hessian_of(loss: Callable[..., Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Of a function of tensors, in the order given."""
    shapes = [p.shape for p in parameters]

    def on_vector(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes])
        return loss(*(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)))

    return torch.autograd.functional.hessian(on_vector, flat(parameters))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
