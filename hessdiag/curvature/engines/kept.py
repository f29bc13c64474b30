"""Products on graphs that are kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hessdiag.curvature.engines.base import BuildProduct, guarded, run_product
from hessdiag.curvature.hessian import BatchProduct
from hessdiag.curvature.objective import Objective, flatten, only, unflatten, zeros
from hessdiag.data import leaves
from hessdiag_probes.types import Vector


class Kept:
    """Keeps every batch's graph: a product is backward passes only, about two gradients."""

    name = "kept"

    def __init__(
        self, objective: Objective, parameters: Sequence[nn.Parameter], build: BuildProduct
    ) -> None:
        self.objective = objective
        self.parameters = parameters
        self.products: list[tuple[BatchProduct, float]] = []
        with only(parameters):
            for batch, share in objective.own():
                product = guarded(build, objective, batch, parameters)
                if product is not None:
                    self.products.append((product, share))

    def __call__(self, vector: Vector, /) -> Vector:
        """``C v`` over the dataset."""
        return self.objective.summed(lambda: self._part(vector), vector)

    def _part(self, vector: Vector) -> Vector:
        """Of this rank's batches."""
        total = zeros(self.parameters)
        pieces = unflatten(vector, self.parameters)
        with only(self.parameters):
            for product, share in self.products:
                total += share * flatten(run_product(product, pieces))
        return total


def graph_bytes(
    objective: Objective, parameters: Sequence[nn.Parameter], build: BuildProduct
) -> int:
    """Bytes that the kept graphs of the whole dataset would hold beyond data and parameters.

    Measured on the batch with the most values and scaled by the number of values.
    """
    sizes = [sum(t.numel() for t in leaves(batch)) for batch, _ in objective]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    batch = objective.batches.items[largest]
    with only(parameters), _saved_bytes() as storages:
        product = guarded(build, objective, batch, parameters)
    model = objective.model
    there = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers(), *leaves(batch))
        if tensor.layout == torch.strided
    }
    held = sum(size for pointer, size in storages.items() if pointer not in there)
    del product
    return int(held * sum(sizes) / max(sizes[largest], 1))


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
