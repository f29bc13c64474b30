"""Which engine computes the products of a block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hessdiag.curvature.engines.base import BUILD, Engine
from hessdiag.curvature.engines.kept import Kept, graph_bytes
from hessdiag.curvature.engines.recompute import Recompute
from hessdiag.curvature.objective import Objective
from hessdiag.memory import free_memory
from hessdiag.options import Curvature, EngineName


def make_engine(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    *,
    curvature: Curvature,
    engine: EngineName = "auto",
    memory_budget: int | None = None,
) -> Engine:
    """The engine asked for; ``auto`` keeps the graphs when they fit the memory budget.

    Cost:
        ``auto`` measures the graph of the largest batch: one forward and backward.
    """
    build = BUILD[curvature]
    if engine == "auto":
        device = parameters[0].device
        budget = free_memory(device) // 2 if memory_budget is None else memory_budget
        needed = graph_bytes(objective, parameters, build)
        engine = "kept" if needed <= budget else "recompute"
    if engine == "kept":
        return Kept(objective, parameters, build)
    return Recompute(objective, parameters, build)
