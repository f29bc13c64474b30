"""The backward passes behind theorem 3: the curvature of the loss in a layer's pre-activations."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn

from hessdiag.activations import Layer
from hessdiag.curvature.objective import Objective
from hessdiag.variants.scene import NotApplicable
from hessdiag_probes.random import gaussian, generator, rademacher

SECONDS = 20.0
"""Of one layer's backward passes, as measured; those that take longer are given up."""
TOGETHER = {"cpu": 2**16, "cuda": 2**24}
"""Numbers of one tensor up to which neurons are differentiated together: a cache; a launch."""
MANY = 2000
"""Backward passes below which that is not worth the first use of vmap, most of a second."""
AGREES = 1e-8  # relative, of two ways to a gradient in float64
AGREES_NARROW = 1e-4


@dataclass
class Passes:
    """Backward passes of one layer: neurons at once, and whether they end in time.

    Attributes:
        total: Neurons times samples.
        together: The same of one pass, if more than one neuron is.
        seconds: Allowed for all; None for any.
    """

    total: int
    together: int
    seconds: float | None
    _begun: float = field(default_factory=perf_counter)
    _first: float = 0.0
    _last: float = 0.0
    _done: int = 0
    _timed: int = 0

    @classmethod
    def of(cls, objective: Objective, layer: Layer, seconds: float | None) -> Passes:
        """Those of a layer; neurons go together where that saves time."""
        widest = max(max(p.shape, default=1) for p in objective.model.parameters())
        together = TOGETHER.get(layer.tensor.device.type, 0) // max(widest, 1)
        if layer.outputs * len(objective.batches.items) < MANY:
            together = 0
        return cls(layer.outputs * objective.batches.rows, together, seconds)

    def neurons(self, samples: int) -> int:
        """Of one pass over so many samples."""
        return max(self.together // max(samples, 1), 1)

    def done(self, entries: int) -> None:
        """Some more neurons times samples.

        Raises:
            NotApplicable: All of them will take too long, at the pace so far.
        """
        now = perf_counter()
        self._done += entries
        if self._last:  # the first has what is done only once in it
            self._timed += entries
        else:
            self._first = now
        self._last = now
        pace = (now - self._first) / self._timed if self._timed else 0.0
        expected = now - self._begun + pace * max(self.total - self._done, 0)
        if self.seconds is not None and expected > self.seconds:
            raise NotApplicable(
                f"its neurons would take about {expected:.0f} s one by one, more than the "
                f"{self.seconds:g} s that they are given; take fewer samples with --max-examples"
            )


def diagonal(
    loss: Tensor, rows: Tensor, offset: Tensor, parameters: list[nn.Parameter], passes: Passes
) -> Tensor:
    """``∂²loss/∂a_ij²``, (outputs, samples of the batch).

    Args:
        loss: Of the batch, with its graph.
        rows: The layer's inputs, (samples, features).
        offset: A zero that was added to the layer's output.
        parameters: The layer's weight, and its bias if it has one.
        passes: Of the layer, over all batches.
    Raises:
        NotApplicable: Samples interact, the weights act elsewhere too, or time is short.
        RuntimeError: The loss has no second derivative.
    """
    outputs = offset.shape[-1]
    if not loss.requires_grad:
        return offset.new_zeros(outputs, offset.numel() // outputs)

    def derivative(of: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(
            of, offset, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return found.detach().reshape(-1, outputs)

    first, *direct = torch.autograd.grad(
        loss,
        [offset, *parameters],
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    gradient = first.reshape(-1, outputs)
    _check_path(gradient.detach(), rows, [part.detach() for part in direct])
    if not gradient.requires_grad:
        return torch.zeros_like(gradient).T
    samples = len(gradient)
    made = generator(0, "interaction of samples")
    weight = gaussian(outputs, generator=made, dtype=loss.dtype, device=loss.device)
    sign = rademacher(samples, generator=made, dtype=loss.dtype, device=loss.device)[:, None]
    together = derivative((gradient * weight).sum())
    alone = derivative((gradient * weight * sign).sum()) * sign
    if float((together - alone).norm()) > _agreement(loss) * float(together.norm() + alone.norm()):
        raise NotApplicable(
            "the loss of a sample depends on other samples (batch normalisation in train mode, "
            "or a loss that compares samples): S is not diagonal"
        )
    if passes.neurons(samples) > 1:
        try:
            found, mixed = _entries(gradient, offset, weight, passes)
        except RuntimeError:
            # Not every backward can be batched, nor has room; what else is wrong the loop will say.
            passes.together = 0
        else:
            if float((mixed - together).norm()) <= _agreement(loss) * float(together.norm()):
                return found
        passes.together = 0
    return _entries(gradient, offset, weight, passes)[0]


def _entries(
    gradient: Tensor, offset: Tensor, weight: Tensor, passes: Passes
) -> tuple[Tensor, Tensor]:
    """``∂²loss/∂a_ij²``, (outputs, samples); ``Σ_i weight_i ∂²loss/∂a_i∂a``, (samples, outputs).

    The latter, which one pass gives too, checks neurons that are differentiated together; it is
    zero where each goes alone.
    """
    samples, outputs = gradient.shape
    mixed = torch.zeros_like(gradient, requires_grad=False)
    diagonals = []
    several = passes.neurons(samples)
    for some in torch.arange(outputs, device=gradient.device).split(several):
        one = torch.zeros(len(some), samples, outputs, dtype=gradient.dtype, device=gradient.device)
        at = torch.arange(len(some), device=gradient.device)
        one[at, :, some] = 1.0
        found = _derivatives(gradient, offset, one)
        diagonals.append(found[at, :, some])
        if several > 1:
            mixed += torch.einsum("i,ijk->jk", weight[some], found)
        passes.done(len(some) * samples)
    return torch.cat(diagonals), mixed


def _derivatives(gradient: Tensor, offset: Tensor, directions: Tensor) -> Tensor:
    """Derivatives by ``offset`` of the gradient along directions, (some, samples, outputs)."""
    single = len(directions) == 1
    with warnings.catch_warnings():
        # Where torch falls back to a loop of its own it says so: no concern of the user's.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        (found,) = torch.autograd.grad(
            gradient,
            offset,
            directions[0] if single else directions,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=not single,
        )
    return (
        torch.zeros_like(directions) if found is None else found.detach().reshape(directions.shape)
    )


def _agreement(value: Tensor) -> float:
    return AGREES if value.dtype == torch.float64 else AGREES_NARROW


def _check_path(gradient: Tensor, rows: Tensor, direct: list[Tensor]) -> None:
    """The weights' own gradient is Σ g_j ĥ_jᵀ where they act through the layer's outputs alone."""
    through = (gradient.T @ rows, gradient.sum(dim=0))
    sizes = (gradient.abs().T @ rows.abs(), gradient.abs().sum(dim=0))
    for have, want, size in zip(direct, through, sizes, strict=False):
        scale = float(have.norm()) + float(size.norm())
        if float((have - want).norm()) > _agreement(have) * scale:
            raise NotApplicable(
                "its weights act outside of its forward, too (a derivative by the inputs, a "
                "penalty, another use): theorem 3 does not hold"
            )
