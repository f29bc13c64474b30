"""The self-check of the gradient, against the loss itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from hessdiag.checks import Check
from hessdiag.curvature.objective import Objective, moved
from hessdiag.errors import InputError
from hessdiag_probes.types import Vector

SLOPE_LIMIT = 1e-2


def check_slope(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    direction: Vector,
    *,
    steps: Sequence[float],
    noise: float,
) -> Check:
    """The gradient against differences of the loss along a direction.

    The second derivative cannot tell that the first one misses a part of the loss. An error
    counts beyond rounding, relative to what a random direction sees of the gradient.

    Args:
        objective: On loan.
        parameters: All that will be analysed.
        direction: Random signs, as long as the parameters are.
        steps: Of the differences, along it, the largest first.
        noise: A bound on the loss's error by rounding.
    Raises:
        InputError: The loss is not finite even a step away.
    Cost:
        A gradient, and two losses per step.
    """
    gradient = objective.gradient(parameters)
    claimed = float(gradient @ direction)
    seen = float(gradient.norm()) * float(direction.norm()) / direction.numel() ** 0.5
    best = math.inf
    for step in steps:
        try:
            with moved(parameters, step * direction):
                ahead = objective.value()
            with moved(parameters, -step * direction):
                behind = objective.value()
        except InputError:  # it may not be finite that far off
            continue
        found = (ahead - behind) / (2 * step)
        error = max(abs(found - claimed) - noise / step, 0.0)
        best = min(best, error / max(seen, abs(found)) if error else 0.0)
        if best < 0.01 * SLOPE_LIMIT:
            break
    if best == math.inf:
        raise InputError(
            f"the loss is finite at the weights, but not at {steps[-1]:.0e} of their norm from "
            "them (the log or sqrt of a number near 0?); its curvature there means nothing"
        )
    return Check(best, SLOPE_LIMIT, best < SLOPE_LIMIT)
