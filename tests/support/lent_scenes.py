"""Scenes of real tasks, and tasks whose mini-batch gradients are given tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import sample_networks
from hessdiag import Task
from hessdiag.blocks import Block
from hessdiag.checkpoint.optimizer import OptimizerState
from hessdiag.names import named_parameters
from hessdiag.options import make_options
from hessdiag.variants.coordinates import Coordinates
from hessdiag.variants.scene import Scene
from hessdiag_probes.types import CountedMatvec


@contextmanager
def lent_scene(
    task: Task,
    names: Sequence[str] | None = None,
    *,
    matrix: Tensor | None = None,
    dead: Tensor | None = None,
    iterates: Sequence[Mapping[str, Tensor]] = (),
    optimizer: OptimizerState | None = None,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> Iterator[Scene]:
    """The block of these parameters (all of them by default), the model on loan."""
    with sample_networks.lent(task, dtype) as (objective, trainable):
        chosen = tuple(trainable if names is None else names)
        size = sum(trainable[name].numel() for name in chosen)
        yield Scene(
            block=Block("block", chosen, size),
            named=dict(named_parameters(objective.model)),
            objective=objective,
            options=make_options(**options),
            optimizer=optimizer,
            changed=False,
            product=CountedMatvec(lambda v: v if matrix is None else (matrix @ v.to(matrix)).to(v)),
            matrix=matrix,
            rows={},
            dead=torch.zeros(size, dtype=torch.bool) if dead is None else dead,
            iterates=tuple(_reader(each) for each in iterates),
            cache={},
        )


def _reader(values: Mapping[str, Tensor]) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: values


class Held(nn.Module):
    """Parameters of these shapes, called ``p0``, ``p1``, …; its output is all of them."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        for index, shape in enumerate(shapes):
            self.register_parameter(f"p{index}", nn.Parameter(torch.ones(tuple(shape))))

    def forward(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.parameters()])


def linear_task(shapes: Sequence[Sequence[int]], gradients: Sequence[Sequence[Tensor]]) -> Task:
    """A task whose batch number t has exactly the gradients ``gradients[t]``."""
    data = [torch.cat([g.reshape(-1) for g in step])[None] for step in gradients]
    return Task(Held(shapes), data, lambda model, batch: (batch[0] * model()).sum())


def dense(coordinates: Coordinates) -> Tensor:
    """P, column by column."""
    eye = torch.eye(coordinates.size, dtype=torch.float64)
    return coordinates.apply(eye).T
