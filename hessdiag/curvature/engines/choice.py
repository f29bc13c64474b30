"""Which engine computes the products of a block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hessdiag.curvature.engines.base import BUILD, Engine
from hessdiag.curvature.engines.difference import Difference
from hessdiag.curvature.engines.kept import Kept
from hessdiag.curvature.engines.linearized import Linearized
from hessdiag.curvature.engines.recompute import Recompute
from hessdiag.curvature.engines.rehearsal import rehearse
from hessdiag.curvature.engines.trial import fastest
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
    products: int = 0,
    columns: bool = False,
) -> Engine:
    """The engine asked for; ``auto`` takes the fastest of those that fit the memory budget.

    Args:
        objective: Whose loss is differentiated.
        parameters: Of the block.
        curvature: Of what matrix the products are.
        engine: As ``--engine`` names it.
        memory_budget: Bytes for what is kept; None takes half of what is free.
        products: How many are expected, about: what trying engines may cost depends on it.
        columns: They are those of a matrix's columns, asked for several at once.
    Raises:
        SelfCheckFailed: The engine asked for cannot work on this model.
    Cost:
        One or two graphs are measured, a forward and a backward each, before those that fit are
        built; ``auto`` spends up to a tenth of the expected time on trying engines.
    """
    if engine == "difference":
        return Difference(objective, parameters)
    build = BUILD[curvature]
    if engine == "recompute":
        return Recompute(objective, parameters, build)
    budget = memory_budget
    if budget is None:
        device = parameters[0].device
        budget = objective.group.share_of(free_memory(device) // 2, device=device.type)
    if engine == "linearized":
        return Linearized(objective, parameters, build, budget=budget)
    kept = Kept(objective, parameters, build, budget=budget)
    usual = rehearse(kept, products) if columns else None
    if engine == "kept":
        return kept
    if kept.rest and not kept.products:
        return Recompute(objective, parameters, build)
    return fastest(kept, products, budget, usual)
