"""One block's matrix, assembled or as a product, to the fields of its row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.bounds import RitzSpectrum, absent_quantities, ritz_quantities, zero_quantities
from hessdiag.conditioning import (
    ROUNDING_SHARE,
    ExactSpectrum,
    count_inertia,
    exact_quantities,
    rates,
    zero_tolerance,
)
from hessdiag.forecast import gd_forecast, uniform_forecast
from hessdiag.quantity import Quantity
from hessdiag.run import Value
from hessdiag_probes.exact import eigh, eigvalsh, equilibrate, positive_spectrum
from hessdiag_probes.lanczos import Ritz, lanczos
from hessdiag_probes.random import generator, rademacher, sphere
from hessdiag_probes.types import Matvec, Vector

Array = NDArray[np.float64]

ROW_FACTOR = 1e3  # a row is zero if its norm is at most this many times its own noise
HUGE_RANGE = 1e4  # λ_min below this many τ: solve a positive definite block relatively
RITZ_CONVERGED = 1e-8  # of ‖H‖, at both ends (maths 1.6)
SMALL_STEP = 1e-2  # a gradient step of more than this share of |p| is no stationary point
STORED_VECTORS = 2  # at either end


@dataclass(frozen=True)
class Noise:
    """The error of a block's products by floating point (maths 0.6).

    Attributes:
        error: ``v -> error of C v``, by two recomputed products.
        block: ν, the error of a product with a unit vector.
        rows: ν of each row, (n,): the error of a product with vectors of entries about ±1.
        seen: The largest magnitude in each row of those products, (n,).
        gradient: Bound on the gradient's error, 2-norm.
    """

    error: Callable[[Vector], Vector]
    block: float
    rows: Vector
    seen: Vector
    gradient: float


@dataclass(frozen=True)
class Problem:
    """What a block's fields are computed from, besides its matrix.

    Attributes:
        name: Of the block; with ``seed`` it fixes every random vector.
        gradient: Of the loss alone, (n,).
        position: The block's parameters, (n,).
        loss: Over the dataset, without weight decay.
        noise: Of the products.
        eps: Unit roundoff of the products.
        weight_decay: λ, added to the diagonal and to the gradient.
        damping: μ of ``kappa_damped``, or None.
        seed: Of the analysis.
    """

    name: str
    gradient: Vector
    position: Vector
    loss: float
    noise: Noise
    eps: float
    weight_decay: float
    damping: float | None
    seed: int

    @property
    def full_gradient(self) -> Vector:
        """Of the loss with its weight decay."""
        return self.gradient + self.weight_decay * self.position

    @property
    def full_loss(self) -> float:
        """With the weight decay of the block: what its steps can lower at most."""
        return self.loss + 0.5 * self.weight_decay * float(self.position.square().sum())


@dataclass(frozen=True)
class Solved:
    """The fields of a row and the arrays behind them, named as in the file."""

    values: dict[str, Value]
    spectrum: dict[str, Array]
    rows: dict[str, Array]


def measure_noise(
    error: Callable[[Vector], Vector],
    product: Matvec,
    like: Vector,
    *,
    seed: int,
    name: str,
    gradient: float,
) -> Noise:
    """ν of a block and of its rows, from two vectors of random signs and sizes in 1/2 … 3/2.

    Plain signs would cancel in a live row such as (1, −1), half the time to exactly zero; normal
    numbers are too small for a row with one entry now and then.

    Cost:
        Two products and two calls of ``error``.
    """
    # In float64 whatever the products are, for squares leave the range of float32.
    rows = torch.zeros_like(like, dtype=torch.float64)
    seen = rows.clone()
    block = 0.0
    for purpose in ("noise 1", "noise 2"):
        source = generator(seed, name, purpose)
        sign = rademacher(like.numel(), generator=source)
        size = 0.5 + torch.rand(like.numel(), generator=source, dtype=torch.float64)
        vector = (sign * size).to(like)
        wrong = error(vector).double()
        rows = torch.maximum(rows, wrong.abs())
        seen = torch.maximum(seen, product(vector).abs().double())
        block = max(block, float(wrong.norm()) / float(vector.norm()))
    return Noise(error, block, rows, seen, gradient)


def solve_exact(matrix: Tensor, problem: Problem) -> Solved:
    """All eigenvalues of an assembled block, and every field that follows from them.

    Args:
        matrix: Symmetric, (n, n), without weight decay.
        problem: The block.
    Cost:
        Two or three dense eigenproblems, O(n³); two more products for the equilibrated noise.
    Source:
        maths 1.1–1.5; huge range by 1.6 (iv).
    """
    matrix, inactive = _without_noise(matrix, problem.noise)
    matrix.diagonal().add_(problem.weight_decay)
    norms = matrix.norm(dim=1)
    values = _common(problem, int(inactive.sum()), "exact")
    if not bool((norms > 0).any()):
        nothing = {"eigenvalue": np.zeros(len(norms))}
        return Solved(values | _zero_fields(problem, len(norms)), nothing, _rows(matrix, problem))
    live = norms > 0
    active = matrix[live][:, live]
    spectrum, vector = _decompose(active, live, problem)
    full, order = _with_zeros(spectrum, matrix)
    gradient = problem.full_gradient.to(vector)
    coefficient = torch.cat([vector.T @ gradient[live], gradient[~live]])[order]
    values |= exact_quantities(full, eps=problem.eps, damping=problem.damping)
    values |= gd_forecast(
        full.value,
        coefficient.cpu().numpy(),
        error=full.error,
        tolerance=full.tolerance,
        resolved=full.resolved,
        gradient_error=problem.noise.gradient,
        loss=problem.full_loss,
    )
    kappa = values["kappa"]
    if isinstance(kappa, Quantity):
        values |= rates(kappa)
    values["gd_rate_applies"] = _rate_applies(full, problem)
    values["notes"] = _notes(full)
    arrays = {"eigenvalue": full.value} | _extremes(full, vector, live)
    return Solved(values, arrays, _rows(matrix, problem))


def _without_noise(matrix: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """The matrix with its noise rows and columns zeroed, and which they are."""
    norms = matrix.norm(dim=1)
    inactive = norms <= ROW_FACTOR * noise.rows.to(norms)
    if float(norms.norm()) <= ROW_FACTOR * noise.block * math.sqrt(len(norms)):
        inactive = torch.ones_like(inactive)
    clean = matrix.clone()
    clean[inactive] = 0.0
    clean[:, inactive] = 0.0
    return clean, inactive


def _decompose(active: Tensor, live: Tensor, problem: Problem) -> tuple[ExactSpectrum, Tensor]:
    size = active.shape[0]
    balanced = equilibrate(active)
    noise = _scaled_noise(problem, live, balanced.scale, "equilibrated")
    signs = eigvalsh(balanced.matrix)
    norm = float(signs.abs().max())
    inertia = count_inertia(signs.cpu().numpy(), zero_tolerance(norm, size, problem.eps, noise))
    found = eigh(active)
    value, vector = found.value, found.vector
    tolerance = zero_tolerance(float(value.abs().max()), size, problem.eps, problem.noise.block)
    error = torch.full_like(value, ROUNDING_SHARE * tolerance)
    definite = inertia.positive == size and not inertia.ambiguous
    # Narrower products have no entry right enough for a huge range to mean anything (maths 0.3).
    full_precision = problem.eps <= torch.finfo(torch.float64).eps
    if definite and full_precision and float(value[0]) < HUGE_RANGE * tolerance:
        scale = active.diagonal().clamp_min(torch.finfo(active.dtype).tiny).rsqrt()
        entry = _scaled_noise(problem, live, scale, "relative")
        certified = positive_spectrum(
            active, entry_error=4 * problem.eps + 10 * entry / math.sqrt(size)
        )
        if certified is not None:
            # Both solve the same matrix: each eigenvalue from where it is better known.
            relative = certified.relative_error * certified.value.to(active)
            value = torch.where(relative < error, certified.value.to(active), value)
            value = value.cummax(dim=0).values
            error, tolerance = torch.minimum(relative, error), 0.0
            vector = certified.vector.to(active)
    return (
        ExactSpectrum(
            value=value.cpu().numpy(),
            error=error.cpu().numpy(),
            tolerance=tolerance,
            inertia=inertia,
            diagonal=active.diagonal().cpu().numpy(),
            frobenius=float(active.norm()),
            noise=problem.noise.block,
        ),
        vector,
    )


def _scaled_noise(problem: Problem, live: Tensor, scale: Vector, purpose: str) -> float:
    """ν of D A D on the live rows: the error of its product with a unit vector."""
    like = problem.gradient
    unit = sphere(
        scale.numel(),
        generator=generator(problem.seed, problem.name, "noise", purpose),
        dtype=like.dtype,
        device=like.device,
    )
    probe = torch.zeros_like(like)
    mask = live.to(like.device)
    probe[mask] = scale.to(like) * unit
    return float((scale.to(like) * problem.noise.error(probe)[mask]).norm())


def _with_zeros(active: ExactSpectrum, matrix: Tensor) -> tuple[ExactSpectrum, Tensor]:
    """The spectrum with the zero rows' eigenvalues, ascending, and the order that sorts it."""
    missing = matrix.shape[0] - active.value.size
    value = np.concatenate([active.value, np.zeros(missing)])
    error = np.concatenate([active.error, np.zeros(missing)])
    order = np.argsort(value, kind="stable")
    full = ExactSpectrum(
        value=value[order],
        error=error[order],
        tolerance=active.tolerance,
        inertia=active.inertia,
        diagonal=matrix.diagonal().cpu().numpy(),
        frobenius=active.frobenius,
        noise=active.noise,
    )
    return full, torch.as_tensor(order, device=matrix.device)


def _rate_applies(spectrum: ExactSpectrum, problem: Problem) -> bool:
    """Positive semidefinite as far as is known, and near enough to a stationary point."""
    if spectrum.inertia.negative_high > 0 or spectrum.inertia.positive == 0:
        return False
    step = float(problem.full_gradient.norm()) / spectrum.norm
    return step <= SMALL_STEP * float(problem.position.norm())


def _notes(spectrum: ExactSpectrum) -> list[str]:
    inertia, notes = spectrum.inertia, []
    if inertia.ambiguous:
        notes.append("eigenvalues lie near the zero tolerance: counts and kappa depend on it")
    seen = int((spectrum.value > spectrum.tolerance).sum())
    if not inertia.ambiguous and seen != inertia.positive:
        notes.append(
            f"float64 resolves {seen} of {inertia.positive} positive eigenvalues without "
            "rescaling; kappa is a lower bound"
        )
    return notes


def _extremes(spectrum: ExactSpectrum, vector: Tensor, live: Tensor) -> dict[str, Array]:
    """The eigenvectors of the largest and of the smallest live eigenvalues, embedded."""
    size = vector.shape[1]
    chosen = sorted(
        {*range(min(STORED_VECTORS, size)), *range(max(size - STORED_VECTORS, 0), size)}
    )
    embedded = vector.new_zeros(len(chosen), live.numel())
    embedded[:, live.to(vector.device)] = vector[:, chosen].T
    # The live eigenvalues are the spectrum without as many zeros as there are dead rows.
    dead = live.numel() - size
    first_zero = int(np.searchsorted(spectrum.value, 0.0)) if dead else 0
    alive = np.delete(spectrum.value, slice(first_zero, first_zero + dead))
    return {"vector": embedded.cpu().numpy(), "vector_value": alive[chosen]}


def _rows(matrix: Tensor, problem: Problem) -> dict[str, Array]:
    """Row norms and diagonal, weight decay included, with their rounding bounds."""
    norm, diagonal = matrix.norm(dim=1), matrix.diagonal()
    slack = 10 * problem.noise.rows.to(norm) + 4 * len(norm) ** 0.5 * problem.eps * norm
    return {
        name: tensor.cpu().numpy().copy()
        for name, tensor in {
            "norm": norm,
            "norm_low": (norm - slack).clamp_min(0.0),
            "norm_high": norm + slack,
            "diagonal": diagonal,
            "diagonal_low": diagonal - slack,
            "diagonal_high": diagonal + slack,
        }.items()
    }


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
    values = _common(problem, int(dead.sum()), "lanczos")
    if zero and problem.weight_decay == 0:
        return Solved(values | _zero_fields(problem, like.numel()), {}, {}), 0
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


def _common(problem: Problem, inactive: int, method: str) -> dict[str, Value]:
    return {
        "inactive": inactive,
        "loss": problem.loss,
        "gradient_norm": float(problem.full_gradient.norm()),
        "method": method,
    }


def _zero_fields(problem: Problem, size: int) -> dict[str, Value]:
    zero = Quantity.zero()
    return (
        zero_quantities(size, problem.damping)
        | uniform_forecast(zero)
        | {"gd_rate": zero, "gd_iterations_per_decade": zero, "gd_rate_applies": False}
        | {"notes": ["the matrix is zero: the loss is linear in this block, or does not use it"]}
    )


def skipped_fields() -> dict[str, Value]:
    """Every field of a row that has nothing to analyse, or whose analysis failed."""
    absent = Quantity.absent()
    return (
        absent_quantities()
        | uniform_forecast(absent)
        | {"gd_rate": absent, "gd_iterations_per_decade": absent, "gd_rate_applies": None}
        | {"inactive": 0, "loss": None, "gradient_norm": None, "method": "", "notes": []}
    )
