"""Products on graphs that are kept in memory, as many as it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.curvature.engines.base import BuildProduct, Summed, guarded
from hessdiag.curvature.hessian import BatchProduct
from hessdiag.curvature.objective import Objective, only
from hessdiag.data import leaves


class Kept(Summed):
    """Keeps batches' graphs: a product is backward passes only, about two gradients.

    Batches whose graphs do not fit are built again in each product, one at a time; room for one
    of them is left within the budget.

    Attributes:
        batches: Of ``products``.
        held: Bytes of what is kept, about; 0 without a budget.
        largest: Of the largest batch's graph, likewise.
        room: Bytes of the budget that nothing is kept in; None without a budget.
        weight: Bytes of what is kept of a batch, at most, in units of its graph.
        spare: Graphs that are in memory beside it while it is made.
    """

    name = "kept"
    weight = 1
    spare = 1

    def __init__(
        self,
        objective: Objective,
        parameters: Sequence[nn.Parameter],
        build: BuildProduct,
        *,
        budget: int | None = None,
    ) -> None:
        """Build the graphs of this rank's batches that fit.

        Args:
            objective: Whose loss is differentiated.
            parameters: Of the block.
            build: Of one batch's product.
            budget: Bytes for the graphs; None keeps all of them.
        Cost:
            A forward and a backward per batch, and of up to two more under a budget.
        """
        super().__init__(objective, parameters, build)
        own = list(objective.own())
        sizes = [0] * len(own)
        if budget is not None:
            sizes = graph_sizes(objective, parameters, build, [batch for batch, _ in own])
        self.batches: list[Any] = []
        self.held, self.largest = 0, max(sizes, default=0)
        self.room: int | None = None
        beside = self.spare * self.largest
        whole = self.weight * (sum(sizes) - self.largest) + max(self.weight * self.largest, beside)
        fits = budget is None or whole <= budget
        room = 0 if budget is None else budget - beside
        for (batch, share), size in zip(own, sizes, strict=True):
            if not fits and self.held + self.weight * size > room:
                self.rest.append((batch, share))
                continue
            with only(parameters):
                product = self.make(batch)
            if product is not None:
                self.products.append((product, share))
                self.batches.append(batch)
                self.held += self.weight * size
        if budget is not None:
            self.room = budget - self.held

    @property
    def record(self) -> str:
        """The name, and of how many batches something is kept where that is not all of them."""
        kept, rest = len(self.products), len(self.rest)
        return f"{self.name} {kept} of {kept + rest} batches" if rest else self.name

    def make(self, batch: Any) -> BatchProduct | None:
        """What is kept of a batch; None where its product is zero."""
        return guarded(self.build, self.objective, batch, self.parameters)


def graph_bytes(
    objective: Objective, parameters: Sequence[nn.Parameter], build: BuildProduct
) -> int:
    """Bytes that the kept graphs of the whole dataset would hold beyond data and parameters."""
    return sum(graph_sizes(objective, parameters, build, list(objective.batches.items)))


def graph_sizes(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    build: BuildProduct,
    batches: Sequence[Any],
) -> list[int]:
    """Bytes of each batch's kept graph beyond data and parameters, or a little more.

    Measured on the batches with the fewest and the most numbers. Between them a graph grows in
    proportion, or faster (attention), so that the straight line lies above it.

    Cost:
        A forward and a backward of at most two batches.
    """
    counts = [sum(tensor.numel() for tensor in leaves(batch)) for batch in batches]
    if not counts:
        return []
    least, most = min(counts), max(counts)
    high = _graph_bytes(objective, parameters, build, batches[counts.index(most)])
    if least == most:
        return [high] * len(counts)
    low = _graph_bytes(objective, parameters, build, batches[counts.index(least)])
    slope = (high - low) / (most - least)
    return [math.ceil(low + slope * (count - least)) for count in counts]


def _graph_bytes(
    objective: Objective, parameters: Sequence[nn.Parameter], build: BuildProduct, batch: Any
) -> int:
    with only(parameters), _saved_bytes() as storages:
        product = guarded(build, objective, batch, parameters)
    there = resident(objective.model, batch)
    found = sum(size for pointer, size in storages.items() if pointer not in there)
    del product
    return found


def resident(model: nn.Module, batch: Any) -> set[int]:
    """Addresses of the storages of the model and a batch, which are in memory anyway."""
    return {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers(), *leaves(batch))
        if tensor.layout == torch.strided
    }


@contextmanager
def _saved_bytes() -> Iterator[dict[int, int]]:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation's own output would keep its graph alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages
