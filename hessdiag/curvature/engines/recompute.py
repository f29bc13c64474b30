"""Products whose graphs are built again each time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hessdiag.curvature.engines.base import BuildProduct, Summed
from hessdiag.curvature.objective import Objective


class Recompute(Summed):
    """Builds every batch's graph again for every product: one batch in memory at a time."""

    name = "recompute"

    def __init__(
        self, objective: Objective, parameters: Sequence[nn.Parameter], build: BuildProduct
    ) -> None:
        super().__init__(objective, parameters, build)
        self.rest = list(objective.own())
