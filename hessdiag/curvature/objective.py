"""The loss of a task as a function of one block of parameters, over the whole dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.data import Batches
from hessdiag.distributed import Alone, Group
from hessdiag.errors import InputError, TaskError, is_out_of_memory
from hessdiag_probes.types import Vector

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """``L(p) = Σ_B share_B loss(model, B)``: the mean over the dataset, whatever the batches.

    A batch counts by the units that its own mean was taken over (rows, or counted targets), so
    that a ragged last batch and padded tokens weigh what they should.

    Attributes:
        model: On loan.
        loss: Of the model and a batch, the mean over its units.
        batches: All of them, on every rank.
        group: The processes that share the work on them.
    """

    model: nn.Module
    loss: LossFunction
    batches: Batches
    group: Group = field(default_factory=Alone)

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        """All batches, with their shares of the mean."""
        return zip(self.batches.items, self.batches.shares, strict=True)

    def own(self) -> Iterator[tuple[Any, float]]:
        """The batches of this rank, with their shares of the mean over all."""
        return islice(self, self.group.rank, None, self.group.size)

    def summed(self, part: Callable[[], Vector], argument: Vector | None = None) -> Vector:
        """The sum over all ranks of ``part``, this one's share; see :class:`Group`."""
        return self.group.summed(part, argument)

    def evaluate(self, batch: Any) -> Tensor:
        """The batch's loss, a scalar.

        Raises:
            TaskError: The loss is no scalar tensor, or the user's code raised.
        """
        try:
            value = self.loss(self.model, batch)
        except TaskError:
            raise
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            raise TaskError(_why_loss_failed(error)) from error
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            found = (
                f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
            )
            raise TaskError(
                f"the task's loss returned {found}, not a real scalar tensor; "
                "return the mean over the batch"
            )
        return value.reshape(())

    def value(self) -> float:
        """The loss over the dataset.

        Raises:
            InputError: The loss is not finite; the message names the batch.
        """
        total = 0.0
        for index, (batch, share) in enumerate(self):
            # Gradients stay on: a loss may differentiate the model by its input (PINNs).
            loss = float(self.evaluate(batch).detach())
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss of batch {index} is {loss}; look at its data (NaN, inf, "
                    "log of zero) and at the weights before their curvature"
                )
            total += share * loss
        return total

    def gradient(self, parameters: Sequence[nn.Parameter]) -> Vector:
        """The gradient over the dataset, flattened in the order of ``parameters``."""

        def part() -> Vector:
            total = zeros(parameters)
            with only(parameters):
                for batch, share in self.own():
                    loss = self.evaluate(batch)
                    if loss.requires_grad:
                        parts = torch.autograd.grad(
                            loss, parameters, allow_unused=True, materialize_grads=True
                        )
                        total += share * flatten(parts)
            return total

        return self.summed(part)


def _why_loss_failed(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    message = f"the task's loss raised {type(error).__name__}: {text}"
    if "dtype" in text or "scalar type" in text:
        message += (
            "\nhessdiag runs the model and the data in float64 so that small eigenvalues are "
            "right. Tensors that the loss or the model makes or holds on its own must follow "
            "(register them as buffers, or write x.new_tensor(…), .to(x.dtype)); "
            "or analyse with --dtype float32."
        )
    elif "positional argument" in text:
        message += "\nA loss is called as loss(model, batch) and returns the batch's mean loss."
    return message


@contextmanager
def only(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Require gradients of these parameters alone: the graph then leaves out all others."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def zeros(parameters: Sequence[nn.Parameter]) -> Vector:
    """A zero vector of the block."""
    size = sum(p.numel() for p in parameters)
    return torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)


def flatten(parts: Sequence[Tensor]) -> Vector:
    """One vector from tensors of the parameters' shapes."""
    return torch.cat([part.detach().reshape(-1) for part in parts])


def unflatten(vector: Vector, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Tensors of the parameters' shapes from one vector."""
    pieces = vector.split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


@contextmanager
def placed(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """The parameters at ``values``; their storage is not written, so kept graphs stay right."""
    saved = [p.data for p in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value.to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, data in zip(parameters, saved, strict=True):
            parameter.data = data


@contextmanager
def moved(parameters: Sequence[nn.Parameter], step: Vector) -> Iterator[None]:
    """The parameters at ``p + step``, as :func:`placed` puts them."""
    pieces = unflatten(step, parameters)
    with placed(parameters, [p.data + piece for p, piece in zip(parameters, pieces, strict=True)]):
        yield
