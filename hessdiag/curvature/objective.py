"""The loss of a task as a function of one block of parameters, over the whole dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from hessdiag.curvature.loan import has_batch_statistics
from hessdiag.data import Batches
from hessdiag.distributed import Alone, Group
from hessdiag.distributed.pieces import Division, dealt, divided
from hessdiag.errors import InputError, TaskError, is_out_of_memory
from hessdiag.failures import batch_work
from hessdiag_probes.random import gaussian, generator
from hessdiag_probes.types import Vector

LossFunction = Callable[[nn.Module, Any], Tensor]
SAME = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative differences by which a loss is taken to be the same when its batches are cut."""
SAME_GRADIENT = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Those of its gradient, in which rows cancel."""
NEARBY = 1e-2
"""Relative distance of the weights at which losses are compared once more."""


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
        units: What a batch's mean is taken over; None where batches must not be cut.
    """

    model: nn.Module
    loss: LossFunction
    batches: Batches
    group: Group = field(default_factory=Alone)
    units: Callable[[Any], float] | None = None
    _agreed: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        """All batches, with their shares of the mean."""
        return zip(self.batches.items, self.batches.shares, strict=True)

    def own(self) -> Iterator[tuple[Any, float]]:
        """The batches of this rank, or its rows of them, with their shares of the mean over all."""
        return ((batch, share) for _, batch, share in self._own())

    def _own(self) -> Iterator[tuple[int, Any, float]]:
        """The same, each with the index of its batch."""
        if self.group.size == 1:
            for index, (batch, share) in enumerate(self):
                yield index, batch, share
            return
        for piece in self.division.pieces[self.group.rank]:
            yield piece.index, piece.batch, piece.share

    @cached_property
    def division(self) -> Division:
        """Which rows each rank has; whole batches where the loss is no mean over rows."""
        items, shares, ranks = self.batches.items, self.batches.shares, self.group.size
        if has_batch_statistics(self.model):
            return dealt(items, shares, ranks, "BatchNorm takes its statistics over a batch")
        division = divided(items, shares, ranks, self.units)
        parts: dict[int, list[tuple[Any, float]]] = {index: [] for index in division.cut}
        for piece in chain.from_iterable(division.pieces):
            if piece.index in parts:
                parts[piece.index].append((piece.batch, piece.share))
        if self.not_sums(parts, gradients=True):
            return dealt(items, shares, ranks, "a batch's loss is not the mean over its rows")
        return division

    def shared_unevenly(self) -> list[str]:
        """What the user should know of ranks that have less to do than others."""
        if self.group.size == 1 or not self.division.reason:
            return []
        rows = ", ".join(map(str, self.division.rows))
        return [
            f"the ranks have {rows} rows, for batches are dealt whole: {self.division.reason}; "
            "fewer processes, or more and smaller batches, waste less"
        ]

    def distributed(self) -> dict[str, Any] | None:
        """How the data were shared, for the provenance; None of one process."""
        record = self.group.record()
        if record is None:
            return None
        batches = [len(own) for own in self.division.pieces]
        return record | {"rows": self.division.rows, "batches": batches}

    def not_sums(
        self, parts: Mapping[int, Sequence[tuple[Any, float]]], *, gradients: bool = False
    ) -> set[int]:
        """Batches whose parts have not their loss: it is not the mean over their rows.

        Compared here, and at weights nearby, for parts that all fit the data perfectly have the
        same loss and gradient however they are weighted.

        Args:
            parts: Of batches, by index; batches and shares.
            gradients: Compare these, too, where there is memory for those of whole batches.
        Returns:
            Indices of the batches; also of those with a part whose loss is not finite, or raises.
        Cost:
            Twice the loss of these batches, and of their parts; a gradient of both.
        """
        parameters = [p for p in self.model.parameters() if p.dtype in SAME]
        with _disable_current_modes():
            found = {index for index in parts if not self._is_sum(index, parts[index])}
            with moved(parameters, _nearby(parameters)):
                for index in parts.keys() - found:
                    same = self._is_sum(index, parts[index])
                    if same and gradients:
                        same = self._has_gradient(index, parts[index], parameters)
                    found |= set() if same else {index}
        return found

    def _is_sum(self, index: int, parts: Sequence[tuple[Any, float]]) -> bool:
        whole = (self.batches.items[index], self.batches.shares[index])
        try:
            values = [
                share * self.evaluate(batch).detach().double() for batch, share in (whole, *parts)
            ]
        except TaskError:  # the loss wants more rows than a part has
            return False
        # The parts' own sizes are the scale: they may cancel in the whole.
        size = float(sum(value.abs() for value in values))
        dtype = next(p.dtype for p in self.model.parameters() if p.dtype in SAME)
        floor = 100 * torch.finfo(dtype).eps ** 2  # squares of residuals that are rounding
        apart = float((sum(values[1:]) - values[0]).abs())
        return math.isfinite(size) and apart <= SAME[dtype] * size + floor

    def _has_gradient(
        self,
        index: int,
        parts: Sequence[tuple[Any, float]],
        parameters: Sequence[nn.Parameter],
    ) -> bool:
        whole = (self.batches.items[index], self.batches.shares[index])
        try:
            total = self._gradient([whole], parameters)
            size = float(total.norm())
            for part in parts:
                slope = self._gradient([part], parameters)
                size += float(slope.norm())
                total -= slope
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                return True  # the losses agree
            raise
        limit = SAME_GRADIENT[total.dtype]
        return math.isfinite(size) and float(total.norm()) <= limit * size

    def _gradient(
        self, batches: Iterable[tuple[Any, float]], parameters: Sequence[nn.Parameter]
    ) -> Vector:
        """The gradient over these batches."""
        slope = zeros(parameters)
        with only(parameters):
            for batch, share in batches:
                loss = self.evaluate(batch)
                if loss.requires_grad:
                    parts = torch.autograd.grad(
                        loss, parameters, allow_unused=True, materialize_grads=True
                    )
                    slope += share * flatten(parts)
        return slope

    def summed(self, part: Callable[[], Vector], argument: Vector | None = None) -> Vector:
        """The sum over all ranks of ``part``, this one's share; see :class:`Group`."""
        if self.group.size > 1 and not self._agreed:
            self.group.same({"division of the data": [self.division.cut, self.division.rows]})
            self._agreed.append(True)
        with batch_work():
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
        return float(self.summed(self._own_value))

    def _own_value(self) -> Tensor:
        total = 0.0
        for index, batch, share in self._own():
            # Gradients stay on: a loss may differentiate the model by its input (PINNs).
            loss = float(self.evaluate(batch).detach())
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss of batch {index} is {loss}; look at its data (NaN, inf, "
                    "log of zero) and at the weights before their curvature"
                )
            total += share * loss
        return torch.tensor([total], dtype=torch.float64)

    def gradient(self, parameters: Sequence[nn.Parameter]) -> Vector:
        """The gradient over the dataset, flattened in the order of ``parameters``."""

        def part() -> Vector:
            return self._gradient(self.own(), parameters)

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


def _nearby(parameters: Sequence[nn.Parameter]) -> Vector:
    """A random step of each parameter, in proportion to its size."""
    flat = flatten([p.data for p in parameters])
    usual = float(flat.double().square().mean().sqrt()) or 1.0
    sizes = [float(p.data.double().square().mean().sqrt()) or usual for p in parameters]
    step = gaussian(
        len(flat),
        generator=generator(0, "objective", "weights nearby"),
        dtype=flat.dtype,
        device=flat.device,
    )
    pieces = unflatten(step, parameters)
    return flatten([NEARBY * s * piece for s, piece in zip(sizes, pieces, strict=True)])


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
