"""Products whose graphs are built again each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hessdiag.curvature.engines.base import BuildProduct, guarded, run_product
from hessdiag.curvature.objective import Objective, flatten, only, unflatten, zeros
from hessdiag_probes.types import Vector


@dataclass(frozen=True)
class Recompute:
    """Builds every batch's graph again for every product: one batch in memory at a time."""

    objective: Objective
    parameters: Sequence[nn.Parameter]
    build: BuildProduct
    name: str = "recompute"

    def __call__(self, vector: Vector, /) -> Vector:
        """``C v`` over the dataset."""
        return self.objective.summed(lambda: self._part(vector), vector)

    def _part(self, vector: Vector) -> Vector:
        """Of this rank's batches."""
        total = zeros(self.parameters)
        pieces = unflatten(vector, self.parameters)
        with only(self.parameters):
            for batch, share in self.objective.own():
                product = guarded(self.build, self.objective, batch, self.parameters)
                if product is not None:
                    total += share * flatten(run_product(product, pieces))
        return total
