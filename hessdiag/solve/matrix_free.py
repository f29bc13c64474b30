"""A block that is too large to assemble: every field from products, each with its certificate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from hessdiag.conditioning.bounds import RitzSpectrum, ritz_quantities
from hessdiag.conditioning.density import DensityFields, density_fields
from hessdiag.conditioning.forecast import krylov_forecast, uniform_forecast
from hessdiag.conditioning.kappa import rates
from hessdiag.conditioning.sketch import row_arrays, sketch_quantities
from hessdiag.conditioning.spectrum import ROUNDING_SHARE, zero_tolerance
from hessdiag.errors import is_out_of_memory
from hessdiag.failures import lacks_batch_memory
from hessdiag.quantity import Quantity
from hessdiag.run import Value
from hessdiag.solve.budget import DENSITY_PROBES, Budget
from hessdiag.solve.problem import (
    CUT_SHORT,
    ROW_FACTOR,
    SMALL_STEP,
    Array,
    Noise,
    Problem,
    Solved,
    common_fields,
    drowned_fields,
    zero_fields,
)
from hessdiag_probes.hutchinson import hutchinson
from hessdiag_probes.lanczos import Ritz, Tridiagonal, lanczos
from hessdiag_probes.power import power_ends
from hessdiag_probes.quadrature import stochastic_quadrature
from hessdiag_probes.random import generator, sphere
from hessdiag_probes.rules import gauss, gauss_radau
from hessdiag_probes.types import CountedMatvec, Vector, norm

FAILURE = 1e-3  # of each outer bound of the spectrum
CONFIDENCE = 0.95  # of what comes from the random probes
ROUNDING_MARGIN = 20.0
DOUBT_MARGIN = 4.0  # a row's norm is seldom that many times what two products show of it


def solve_matrix_free(
    product: Callable[[Vector], Vector], problem: Problem, budget: Budget
) -> tuple[Solved, int]:
    """Every field of a block from products alone.

    Args:
        product: ``v -> A v`` without the problem's shift.
        problem: The block, in the coordinates of the products.
        budget: What it may cost. When the time is up, what is certified by then is kept.
    Returns:
        The row, and the number of products.
    Cost:
        At most ``steps`` products for the ends, 20 for the forecast and ``probes``; 600 for the
        density. ``steps`` n numbers, or with power iteration a few n.
    """
    dead, doubt = dead_rows(problem.noise)
    if problem.doubt is not None:
        doubt = math.hypot(doubt, math.sqrt(2) * float(problem.doubt.norm()))
    method = "power" if budget.power else "lanczos"
    values = common_fields(problem, int(dead.sum()), method)
    if bool(dead.all()) and problem.shift == 0 and doubt == 0:
        return Solved(values | zero_fields(problem, dead.numel()), {}, {}), 0
    if bool(dead.all()) and doubt > 0:
        return Solved(values | drowned_fields(problem), {}, {}), 0
    alive = (~dead).to(problem.gradient)

    def shifted(vector: Vector) -> Vector:
        return alive * product(alive * vector) + problem.shift * vector

    matvec = CountedMatvec(shifted)
    spectrum, run = _ends(matvec, problem, budget, doubt)
    notes = [*budget.reasons, *budget.told, *_width_notes(spectrum, budget, matvec.count)]
    values |= ritz_quantities(spectrum, dead.numel(), damping=problem.damping)
    values |= uniform_forecast(Quantity.unresolved())
    arrays: dict[str, Array] = {"ritz_value": spectrum.value, "ritz_bound": spectrum.bound}
    if run is not None:
        arrays["ritz_weight"] = run.ritz().weight.numpy()
    rows: dict[str, Array] = {}
    with _kept_without_memory("the forecast", notes, budget):
        values |= _forecast(matvec, problem, budget, spectrum)
    if budget.probes and not budget.over():
        with _kept_without_memory("what the probes tell", notes, budget):
            sketched, rows = _sketch(matvec, problem, budget, spectrum, run, doubt)
            values |= sketched
    if budget.density and not budget.over():
        with _kept_without_memory("the density", notes, budget):
            found = _density(matvec, problem, budget, spectrum)
            values |= found.values
            arrays |= found.arrays
            notes.append(found.note)
    kappa = values["kappa"]
    if isinstance(kappa, Quantity):
        values |= rates(kappa)
        notes += _kappa_notes(kappa, spectrum, density=bool(budget.density))
    values["gd_rate_applies"] = _rate_applies(spectrum, problem)
    if budget.over():
        notes.append(CUT_SHORT)
    values["notes"] = notes
    return Solved(values, arrays, rows), matvec.count


@contextmanager
def _kept_without_memory(what: str, notes: list[str], budget: Budget) -> Iterator[None]:
    """Let a stage go for want of memory; what is certified before stays."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = error if budget.agree is None else budget.agree(error, what)
        if not is_out_of_memory(told):
            raise
        if lacks_batch_memory(told) and budget.batches_may_shrink:
            raise  # then all of the row is to be had
        notes.append(f"{what} is left out: out of memory")


def dead_rows(noise: Noise) -> tuple[torch.Tensor, float]:
    """Which rows are noise, (n,), and what zeroing those that may be real can cost, 2-norm."""
    dead = noise.seen <= ROW_FACTOR * noise.rows
    if float(noise.seen.norm()) <= ROW_FACTOR * noise.block * math.sqrt(dead.numel()):
        dead = torch.ones_like(dead)
    real = noise.doubtful(noise.seen, dead)
    return dead, DOUBT_MARGIN * math.sqrt(2) * float(real.norm())


def _start(problem: Problem) -> Vector:
    like = problem.gradient
    return sphere(
        like.numel(),
        generator=generator(problem.seed, problem.name, "lanczos"),
        dtype=like.dtype,
        device=like.device,
    )


def _ends(
    matvec: CountedMatvec, problem: Problem, budget: Budget, doubt: float
) -> tuple[RitzSpectrum, Tridiagonal | None]:
    """Both ends of the spectrum from one start, and the Lanczos run if there was one."""
    size = problem.gradient.numel()
    floor = problem.floor
    run: Tridiagonal | None = None
    reach = 0.0
    if budget.power:
        found = power_ends(
            matvec,
            _start(problem),
            budget.steps,
            budget.tolerance,
            failure=FAILURE,
            stop=budget.over,
        )
        value = np.array([found.smallest.value, found.largest.value])
        bound = np.array([found.smallest.residual, found.largest.residual])
        low, high = found.low, found.high
    else:

        def converged(ritz: Ritz) -> bool:
            least, most = float(ritz.value[0]), float(ritz.value[-1])
            low, high = ritz.ends(FAILURE)
            low = low if floor is None else max(low, floor)
            reach = budget.tolerance * max(abs(least), abs(most))
            return max(high - most, least - low) <= reach or budget.over()

        run = lanczos(
            matvec,
            _start(problem),
            min(budget.steps, size),
            converged=converged,
            storage=budget.storage,
        )
        ritz = run.ritz()
        value, bound = ritz.value.numpy(), ritz.bound.numpy()
        low, high = ritz.ends(FAILURE)
        reach = ritz.reach
    tolerance = zero_tolerance(
        float(np.abs(value).max()), size, problem.eps, max(problem.noise.block, doubt)
    )
    return (
        RitzSpectrum(
            value=value,
            bound=bound,
            low=low,
            high=high,
            failure=FAILURE,
            rounding=max(_rounding(value, tolerance, problem), doubt) + reach,
            tolerance=tolerance,
            floor=floor,
        ),
        run,
    )


def _rounding(value: Array, tolerance: float, problem: Problem) -> float:
    """The error of a Rayleigh quotient: a share of τ, and for large blocks much less than that.

    τ grows with n, as the worst case of a dense solver does; sums over n numbers err by about √n.
    """
    size = problem.gradient.numel()
    usual = math.sqrt(size) * problem.eps * float(np.abs(value).max())
    return min(ROUNDING_SHARE * tolerance, ROUNDING_MARGIN * max(usual, problem.noise.block))


def _forecast(
    matvec: CountedMatvec, problem: Problem, budget: Budget, spectrum: RitzSpectrum
) -> dict[str, Value]:
    """From Lanczos started at the gradient, with the step that the certified norm allows."""
    gradient = problem.gradient
    size, reach = norm(gradient), spectrum.norm[1]
    if size == 0:
        return uniform_forecast(Quantity.exact(0.0))
    if reach <= 0 or budget.over() or budget.forecast == 0:
        return uniform_forecast(Quantity.unresolved())
    steps = min(budget.forecast, gradient.numel())
    run = lanczos(
        matvec,
        gradient,
        steps,
        converged=lambda _: budget.over(),
        storage=budget.elsewhere,
    )
    # No node may lie left of the prescribed one, which rounding alone could bring about.
    floor = min(spectrum.bottom.low or 0.0, float(run.ritz().value[0]) - spectrum.rounding)
    return krylov_forecast(
        gauss(run),
        gauss_radau(run, floor),
        norm=size,
        step=1.0 / reach,
        tolerance=spectrum.tolerance,
        rounding=spectrum.rounding,
        gradient_error=problem.noise.gradient,
        loss=problem.attainable,
        confidence=1.0 - 2 * FAILURE,
    )


def _sketch(
    matvec: CountedMatvec,
    problem: Problem,
    budget: Budget,
    spectrum: RitzSpectrum,
    run: Tridiagonal | None,
    doubt: float,
) -> tuple[dict[str, Value], dict[str, Array]]:
    """Trace, norms and rows from random probes outside the Krylov space."""
    like = problem.gradient
    moments = hutchinson(
        matvec,
        like.numel(),
        budget.probes,
        generator=generator(problem.seed, problem.name, "probes"),
        confidence=CONFIDENCE,
        dtype=like.dtype,
        device=like.device,
        deflate=run,
        stop=budget.over,
    )
    # Truncation has a sign of its own, and does not cancel as rounding does.
    terms = like.numel() if problem.noise.coarse else 10 * math.sqrt(like.numel())
    noise = max(terms, 10 * math.sqrt(like.numel())) * problem.noise.block + doubt
    rows = row_arrays(moments, 10 * problem.noise.rows.cpu().numpy() + doubt)
    return sketch_quantities(moments, spectrum, noise), rows


def _density(
    matvec: CountedMatvec, problem: Problem, budget: Budget, spectrum: RitzSpectrum
) -> DensityFields:
    """What stochastic Lanczos quadrature says of the inner spectrum."""
    like = problem.gradient
    quadrature = stochastic_quadrature(
        matvec,
        like.numel(),
        DENSITY_PROBES,
        min(budget.density, like.numel()),
        generator=generator(problem.seed, problem.name, "density"),
        dtype=like.dtype,
        device=like.device,
        stop=budget.over,
        storage=budget.elsewhere,
    )
    return density_fields(quadrature, spectrum, positive=problem.positive)


def _rate_applies(spectrum: RitzSpectrum, problem: Problem) -> bool | None:
    """False with negative curvature or a large gradient, None where neither is certain."""
    high = spectrum.bottom.high
    if high is not None and high < -spectrum.tolerance:
        return False
    step = float(problem.gradient.norm()) / max(spectrum.norm[0], spectrum.tolerance)
    if step > SMALL_STEP * float(problem.position.norm()):
        return False
    return True if spectrum.positive_floor is not None else None


def _width_notes(spectrum: RitzSpectrum, budget: Budget, products: int) -> list[str]:
    """Why the wanted width was not certified; no number of the block, so that rows share it."""
    inside, outside = spectrum.norm
    wanted = budget.tolerance * outside
    if inside <= 0 or 2 * spectrum.rounding > max(wanted, 0.01 * outside):
        return ["above the exact limit: the rounding of the products alone leaves the ends wide"]
    widths = [(end.high or 0.0) - (end.low or 0.0) for end in (spectrum.top, spectrum.bottom)]
    if max(widths) <= wanted + 2 * spectrum.rounding or products < budget.steps:
        return []
    return [
        f"above the exact limit: {products} products do not certify both ends to --tolerance "
        f"{budget.tolerance:g} of ‖H‖; more --steps narrow them"
    ]


def _kappa_notes(kappa: Quantity, spectrum: RitzSpectrum, *, density: bool) -> list[str]:
    notes = []
    if kappa.status == "lower-bound":
        notes.append("κ has no upper bound: nothing certifies a gap between 0 and the rest")
    elif kappa.status == "unresolved":
        notes.append(
            "κ is unresolved: no Ritz pair proves a positive eigenvalue apart from zero; "
            "more --steps may"
        )
    if not density:
        notes.append("κ at the median needs the density: --density, 600 products more")
    return notes
