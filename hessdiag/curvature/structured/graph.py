"""One batch's loss as a function of offsets that are added to the outputs of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.curvature.engines import BUILD
from hessdiag.curvature.objective import Objective
from hessdiag.curvature.structured.sites import Site
from hessdiag.data import row_count
from hessdiag.options import Curvature


class NotStructured(Exception):
    """The block's matrix is not what its structure would make of it; the message says why."""


@dataclass
class Offsets:
    """Zeros added to the outputs of layers, and what the layers were given.

    Attributes:
        added: The zeros, in the order of the calls.
        inputs: Of the layers, with their graphs.
        order: Places of the layers, in the order of the calls.
        repeated: A layer was called twice.
    """

    places: dict[int, int]
    added: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    repeated: bool = False

    def hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Of a layer's forward."""
        place = self.places[id(module)]
        if torch._C._current_graph_task_id() != -1:
            # A backward pass computes the layer again (activation checkpointing).
            return output + self.added[self.order.index(place)]
        if place in self.order:
            self.repeated = True
            return output
        self.order.append(place)
        self.added.append(torch.zeros_like(output, requires_grad=True))
        self.inputs.append(args[0] if args else kwargs["input"])
        return output + self.added[-1]


@contextmanager
def offsets(sites: Sequence[Site]) -> Iterator[Offsets]:
    """Offsets at these layers for one batch; its backward passes belong inside, too."""
    found = Offsets({id(site.layer.module): place for place, site in enumerate(sites)})
    handles = []
    try:
        handles += [
            site.layer.module.register_forward_hook(found.hook, with_kwargs=True) for site in sites
        ]
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Direction:
    """What an offset of one neuron at one position, of all samples at once, changes.

    Attributes:
        bent: By site from its own on: derivatives of the slopes, like the outputs; None is zero.
        moved: By site after its own: derivatives of the inputs, like them; None is zero.
    """

    bent: list[Tensor | None]
    moved: list[Tensor | None]


class BatchGraph:
    """Derivatives of one batch's loss by the offsets of its sites, to second order.

    Attributes:
        samples: Rows of the batch.
        inputs: ĥ by site, (samples, positions, features).
        slopes: ∂L/∂a by site, (samples, positions, outputs); of Gauss–Newton's matrix, where
            they do not enter, None.
    """

    def __init__(
        self,
        objective: Objective,
        batch: Any,
        sites: Sequence[Site],
        curvature: Curvature,
        made: Offsets,
    ) -> None:
        self.sites, self.curvature, self.made = sites, curvature, made
        self.samples = row_count(batch)
        self._linear: list[Tensor | None] = []
        self._dummies: list[Tensor] = []
        self._product = None
        self.slopes: list[Tensor | None] = [None] * len(sites)
        if curvature == "ggn":
            # The list is filled by the forward pass before anything is differentiated by it.
            self._product = BUILD[curvature](objective, batch, made.added)  # type: ignore[arg-type]
            self._check()
            self.curved = self._product is not None
        else:
            loss = objective.evaluate(batch)
            self._check()
            self.curved = loss.requires_grad and self._differentiate(loss)
        self.inputs = [
            site.rows(value.detach(), self.samples)
            for site, value in zip(sites, made.inputs, strict=True)
        ]

    def _check(self) -> None:
        if self.made.repeated or self.made.order != list(range(len(self.sites))):
            raise NotStructured("batches call its layers differently")

    def _differentiate(self, loss: Tensor) -> bool:
        added = self.made.added
        self._gradient = torch.autograd.grad(
            loss, added, create_graph=True, allow_unused=True, materialize_grads=True
        )
        self.slopes = [
            site.outward(part.detach().contiguous(), self.samples)
            for site, part in zip(self.sites, self._gradient, strict=True)
        ]
        later = [value for value in self.made.inputs if value.requires_grad]
        if later:
            self._later = later
            self._dummies = [torch.zeros_like(value, requires_grad=True) for value in later]
            pulled = torch.autograd.grad(
                later, added, self._dummies, create_graph=True, allow_unused=True
            )
            self._linear = [
                part if part is not None and part.requires_grad else None for part in pulled
            ]
        else:
            self._linear = [None] * len(added)
        return any(part.requires_grad for part in self._gradient)

    def direction(self, site: int, seed: Tensor) -> Direction:
        """The derivatives along an offset of one site, like its output."""
        bent: list[Tensor | None] = [None] * len(self.sites)
        moved: list[Tensor | None] = [None] * len(self.sites)
        if self._product is not None:
            pieces = [torch.zeros_like(part) for part in self.made.added]
            pieces[site] = seed
            bent[site:] = self._product(pieces)[site:]
            return Direction(bent, moved)
        gradient = self._gradient[site]
        if gradient.requires_grad:
            bent[site:] = torch.autograd.grad(
                gradient, self.made.added[site:], seed, retain_graph=True, allow_unused=True
            )
        linear = self._linear[site]
        if linear is not None:
            changed = torch.autograd.grad(
                linear, self._dummies, seed, retain_graph=True, allow_unused=True
            )
            by_dummy = iter(changed)
            for place, value in enumerate(self.made.inputs):
                if value.requires_grad:
                    moved[place] = next(by_dummy)
        return Direction(bent, moved)
