"""Train a demo in seconds, the same way every time, and leave its checkpoints on disk."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hessdiag.demos.files import claim, write_demo
from hessdiag.demos.tasks import SEED, demo_task
from hessdiag.errors import OptionError
from hessdiag.task import Task, as_loss

STEPS = 1000
MINIBATCH = 100
ITERATES = 10
LAST_RATE = 0.01
"""Of the first learning rate, where the cosine ends: not at 0, which no optimizer state means."""

Progress = Callable[[int, int], None]
"""``(step, steps) -> None``, called after every step."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained demo and where it lies.

    Attributes:
        path: The final checkpoint, ``model.pt``.
        loss: Mean cross-entropy over all digits, in eval mode, at the final weights.
        accuracy: Fraction of all digits that are classified rightly there.
        steps: Steps of Adam.
        seconds: That the training took.
        task: The built-in task's name, as ``demo:mlp``.
        parameters: Number of trained numbers.
        iterates: The checkpoints on the way; the last one has the final weights.
    """

    path: Path
    loss: float
    accuracy: float
    steps: int
    seconds: float
    task: str
    parameters: int
    iterates: tuple[Path, ...]


def train(
    name: str,
    directory: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    steps: int = STEPS,
) -> Trained:
    """Train a built-in task with Adam; write ``model.pt`` and ten ``iterates/step-*.pt``.

    Two runs on one machine give the same files byte for byte, whatever the global seed and the
    number of threads, and leave both as they were. Nothing is written before the training is done.

    Args:
        name: A key of :data:`hessdiag.demos.DEMOS`.
        directory: Where to write; made when it is not there.
        force: Replace the demo that lies there, all of its iterates included.
        progress: Told after every step.
        steps: Minibatches to train on, at least 10.
    Raises:
        TaskError: There is no such demo.
        OptionError: ``steps`` is less than the number of iterates.
        StoreError: There are checkpoints already, or the directory cannot be written.
        OutOfResources: The disk is full.
    Cost:
        Two to three seconds for the default ``steps``.
    """
    task = demo_task(name)
    if steps < ITERATES:
        raise OptionError(f"steps is {steps}; the {ITERATES} iterates need at least {ITERATES}")
    place = Path(directory)
    claim(place, force=force)
    started = time.perf_counter()
    with _single_thread(), torch.enable_grad():
        checkpoints = _fit(task, steps, progress)
        seconds = time.perf_counter() - started
        loss, accuracy = _score(task)
    path, iterates = write_demo(place, checkpoints)
    return Trained(
        path=path,
        loss=loss,
        accuracy=accuracy,
        steps=steps,
        seconds=seconds,
        task=str(task.name),
        parameters=sum(parameter.numel() for parameter in task.model.parameters()),
        iterates=iterates,
    )


def _fit(task: Task, steps: int, progress: Progress | None) -> dict[int, dict[str, Any]]:
    """Train ``task.model`` in place; the checkpoints of ten evenly spaced steps, the last too."""
    ((inputs, labels),) = task.data
    model, loss = task.model.train(), as_loss(task)
    optimizer = cast("Callable[[nn.Module], torch.optim.Optimizer]", task.optimizer)(model)
    (group,) = optimizer.param_groups
    first_rate = group["lr"]
    wanted = {steps * (index + 1) // ITERATES for index in range(ITERATES)}
    checkpoints = {}
    minibatches = _minibatches(len(labels))
    for step in range(1, steps + 1):
        cosine = (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        group["lr"] = first_rate * (LAST_RATE + (1 - LAST_RATE) * cosine)
        chosen = next(minibatches)
        optimizer.zero_grad()
        loss(model, (inputs[chosen], labels[chosen])).backward()
        optimizer.step()
        if step in wanted:
            checkpoints[step] = _checkpoint(task, optimizer, step)
        if progress is not None:
            progress(step, steps)
    return checkpoints


def _minibatches(examples: int) -> Iterator[Tensor]:
    """Indices of minibatches, a new permutation per epoch, its ragged end left out."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(examples, generator=generator)
        for start in range(0, examples - MINIBATCH + 1, MINIBATCH):
            yield order[start : start + MINIBATCH]


def _checkpoint(task: Task, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """A training dict that shares no memory with the training that goes on."""
    return copy.deepcopy(
        {
            "model": task.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "hessdiag": {"task": task.name},
        }
    )


def _score(task: Task) -> tuple[float, float]:
    """Loss and accuracy over all digits in eval mode."""
    ((inputs, labels),) = task.data
    model = task.model.eval()
    with torch.no_grad():
        loss = as_loss(task)(model, (inputs, labels)).item()
        right = (model(inputs).argmax(dim=1) == labels).double().mean().item()
    return loss, right


@contextmanager
def _single_thread() -> Iterator[None]:
    """One thread: so small a network gains nothing by more, and sums keep one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
