"""What every engine is, and how a user's code that cannot be differentiated twice is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hessdiag.curvature.engines.clock import timed
from hessdiag.curvature.engines.many import Wide
from hessdiag.curvature.ggn import ggn_product
from hessdiag.curvature.hessian import BatchProduct, hessian_product
from hessdiag.curvature.objective import Objective, flatten, only, unflatten, zeros
from hessdiag.errors import HessdiagError, SelfCheckFailed, is_out_of_memory
from hessdiag.options import Curvature
from hessdiag_probes.types import Vector

BuildProduct = Callable[[Objective, Any, Sequence[nn.Parameter]], BatchProduct | None]
BUILD: dict[Curvature, BuildProduct] = {"hessian": hessian_product, "ggn": ggn_product}

GAIN = 0.95
"""Of the time of kept graphs: what takes more is not worth a change."""
PATIENCE = 1.0
"""Seconds of products between two looks at the clock, about."""
WIDEST = 128
"""Products between two looks at the clock, at most."""


class Engine(Protocol):
    """``v -> C v`` over the dataset for one block; linear, and free of side effects."""

    @property
    def name(self) -> str:
        """As ``--engine`` names it."""
        ...

    def __call__(self, vector: Vector, /) -> Vector:
        """The product, flattened in the order of the block's parameters."""
        ...


class Summed:
    """An engine whose product is a sum over batches: of some it keeps what a product needs.

    Attributes:
        name: As ``--engine`` names it.
        products: What is kept, and the batch's share of the mean.
        rest: This rank's other batches, which are built again in each product.
        tried: Seconds per product of this rank's part, by what was tried; empty where nothing was.
    """

    name = ""

    def __init__(
        self, objective: Objective, parameters: Sequence[nn.Parameter], build: BuildProduct
    ) -> None:
        self.objective = objective
        self.parameters = list(parameters)
        self.build = build
        self.products: list[tuple[BatchProduct, float]] = []
        self.rest: list[tuple[Any, float]] = []
        self.tried: dict[str, float] = {}

    @property
    def record(self) -> str:
        """The name for the provenance, with what else there is to say."""
        return self.name

    def __call__(self, vector: Vector, /) -> Vector:
        """``C v`` over the dataset."""
        return self.objective.summed(lambda: self.part(vector), vector)

    def many(self, vectors: Tensor) -> Tensor:
        """The products with several vectors, both by rows, (k, n); all ranks' sums in one."""
        flat = self.objective.summed(lambda: self.parts(vectors).reshape(-1), vectors.reshape(-1))
        return flat.view_as(vectors)

    def chunk(self, count: int) -> int:
        """How many of ``count`` vectors :meth:`many` should be given at a time; a collective.

        As many as take a second: that is how late a deadline may be seen.

        Cost:
            One product.
        """
        device = self.parameters[0].device
        _, seconds = timed(lambda: self(zeros(self.parameters)), device)
        most = min(count, WIDEST, int(PATIENCE / max(seconds, 1e-9)))
        return max(1, int(self.objective.group.agreed(most)))

    def parts(self, vectors: Tensor) -> Tensor:
        """Of this rank's batches, (k, n), batch by batch; it talks to no other rank."""
        total = torch.zeros_like(vectors)
        with only(self.parameters):
            for product, share in self._each():
                if isinstance(product, Wide):
                    total.add_(product.many(vectors, self.parameters), alpha=share)
                    continue
                for vector, sums in zip(vectors, total, strict=True):
                    parts = run_product(product, unflatten(vector, self.parameters))
                    sums.add_(flatten(parts), alpha=share)
        return total

    def part(self, vector: Vector) -> Vector:
        """Of this rank's batches; it talks to no other rank."""
        pieces = unflatten(vector, self.parameters)
        total: Vector | None = None
        into: list[Tensor] = []
        with only(self.parameters):
            for product, share in self._each():
                parts = run_product(product, pieces)
                if total is None:
                    total = flatten(parts)
                    if share != 1:
                        total *= share
                    into = unflatten(total, self.parameters)
                    continue
                for sums, part in zip(into, parts, strict=True):
                    sums.add_(part, alpha=share)
        return zeros(self.parameters) if total is None else total

    def _each(self) -> Iterator[tuple[BatchProduct, float]]:
        yield from self.products
        for batch, share in self.rest:
            product = guarded(self.build, self.objective, batch, self.parameters)
            if product is not None:
                yield product, share


def guarded(
    build: BuildProduct, objective: Objective, batch: Any, parameters: Sequence[nn.Parameter]
) -> BatchProduct | None:
    """What ``build`` makes of a batch; a graph that has no second derivative is told as such."""
    try:
        return build(objective, batch, parameters)
    except HessdiagError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SelfCheckFailed(no_second_derivative(error)) from error


def run_product(product: BatchProduct, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    """The product; a graph that has no second derivative is told as such."""
    try:
        return product(pieces)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SelfCheckFailed(no_second_derivative(error)) from error


def no_second_derivative(reason: object) -> str:
    """What is wrong with a loss that has no second derivative, and what to do."""
    return (
        f"the loss cannot be differentiated twice: {reason}\n"
        "Replace the operation that has no double backward by plain torch operations (an eager "
        "version of a fused kernel; non-reentrant activation checkpointing), or take products from "
        "differences of gradients, which need no second derivative: --engine difference."
    )
