"""A block that is too large to assemble: bounds from one Lanczos run."""

from __future__ import annotations

import math

import torch

from hessdiag.conditioning.bounds import RitzSpectrum, ritz_quantities
from hessdiag.conditioning.forecast import uniform_forecast
from hessdiag.conditioning.kappa import rates
from hessdiag.conditioning.spectrum import ROUNDING_SHARE, zero_tolerance
from hessdiag.quantity import Quantity
from hessdiag.solve.problem import ROW_FACTOR, Problem, Solved, common_fields, zero_fields
from hessdiag_probes.lanczos import Ritz, lanczos
from hessdiag_probes.random import generator, sphere
from hessdiag_probes.types import Matvec, Vector

RITZ_CONVERGED = 1e-8  # of ‖H‖, at both ends (maths 1.6)


def solve_lanczos(product: Matvec, problem: Problem, *, steps: int) -> tuple[Solved, int]:
    """Both ends of a block's spectrum and a lower bound on κ, from one Lanczos run.

    Args:
        product: ``v -> H v`` without weight decay.
        problem: The block.
        steps: Most Lanczos steps.
    Returns:
        The row, and the number of products.
    Cost:
        At most ``steps`` products and ``steps`` n numbers.
    """
    noise = problem.noise
    like = problem.gradient
    dead = noise.seen <= ROW_FACTOR * noise.rows
    zero = float(noise.seen.norm()) <= ROW_FACTOR * noise.block * math.sqrt(like.numel())
    if zero:
        dead = torch.ones_like(dead)
    values = common_fields(problem, int(dead.sum()), "lanczos")
    if zero and problem.weight_decay == 0:
        return Solved(values | zero_fields(problem, like.numel()), {}, {}), 0
    alive = (~dead).to(like)

    def matvec(vector: Vector) -> Vector:
        return alive * product(alive * vector) + problem.weight_decay * vector

    start = sphere(
        like.numel(),
        generator=generator(problem.seed, problem.name, "lanczos"),
        dtype=like.dtype,
        device=like.device,
    )

    def converged(ritz: Ritz) -> bool:
        reach = RITZ_CONVERGED * float(ritz.value.abs().max())
        return max(float(ritz.bound[0]), float(ritz.bound[-1])) <= reach

    run = lanczos(matvec, start, min(steps, like.numel()), converged=converged)
    ritz = run.ritz()
    tolerance = zero_tolerance(
        float(ritz.value.abs().max()), like.numel(), problem.eps, noise.block
    )
    value, bound = ritz.value.numpy(), ritz.bound.numpy()
    spectrum = RitzSpectrum(value, bound, ROUNDING_SHARE * tolerance, tolerance)
    values |= ritz_quantities(spectrum, damping=problem.damping)
    values |= uniform_forecast(Quantity.unresolved())
    kappa = values["kappa"]
    if isinstance(kappa, Quantity):
        values |= rates(kappa)
    values["gd_rate_applies"] = False if value[0] < -tolerance else None
    values["notes"] = [
        "above the exact limit: ends and kappa are bounds from Lanczos, the rest is unresolved"
    ]
    weight = ritz.weight.numpy()
    arrays = {"ritz_value": value, "ritz_weight": weight, "ritz_bound": bound}
    return Solved(values, arrays, {}), run.matvecs
