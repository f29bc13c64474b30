"""The built-in tasks by name: what ``--task demo:NAME`` and a demo's checkpoint refer to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hessdiag.demos.handwriting import digits
from hessdiag.demos.networks import ConvNet, Transformer, mlp
from hessdiag.errors import TaskError
from hessdiag.task import Task

PREFIX = "demo:"
SEED = 0


def demo_task(name: str) -> Task:
    """The built-in task called ``name``, its model at its first weights, the same at every call.

    Args:
        name: A key of :data:`DEMOS`; ``demo:mlp`` means ``mlp``.
    Raises:
        TaskError: There is no such demo.
    """
    key = name.removeprefix(PREFIX)
    if key not in DEMOS:
        near = get_close_matches(key.lower(), DEMOS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise TaskError(
            f"there is no demo called {key!r}; {hint}The built-in demos are {', '.join(DEMOS)}"
        )
    return DEMOS[key]()


def _mlp_task() -> Task:
    return _task("mlp", mlp, lambda images: images.flatten(1), rate=0.01)


def _convnet_task() -> Task:
    return _task("convnet", ConvNet, lambda images: images.unsqueeze(1), rate=0.005)


def _transformer_task() -> Task:
    return _task("transformer", Transformer, lambda images: images, rate=0.01)


DEMOS: Mapping[str, Callable[[], Task]] = MappingProxyType(
    {"mlp": _mlp_task, "convnet": _convnet_task, "transformer": _transformer_task}
)
"""Builders of the built-in tasks: all 1,797 digits as one batch, cross-entropy, Adam."""


def _task(
    name: str, build: Callable[[], nn.Module], shape: Callable[[Tensor], Tensor], *, rate: float
) -> Task:
    images, labels = digits()
    # torch's initialisers draw from the global generator: borrow it, and leave CUDA's alone.
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(SEED).get_state())
        model = build().float()
    return Task(
        model=model,
        data=[(shape(images), labels)],
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda model: torch.optim.Adam(model.named_parameters(), lr=rate),
        name=PREFIX + name,
    )
