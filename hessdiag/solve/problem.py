"""A block to solve: what it is computed from, what comes out, and the fields of trivial rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.conditioning.bounds import absent_quantities, unresolved_quantities, zero_quantities
from hessdiag.conditioning.forecast import uniform_forecast
from hessdiag.conditioning.spectrum import Inertia
from hessdiag.quantity import Quantity
from hessdiag.run import Value
from hessdiag_probes.random import generator, rademacher
from hessdiag_probes.types import Matvec, Vector

Array = NDArray[np.float64]
ROW_FACTOR = 1e3  # a row is zero if its norm is at most this many times its own noise
DOUBT_FACTOR = 10.0  # a zeroed row above this many times its noise may be real
SMALL_STEP = 1e-2  # a gradient step of more than this share of |p| is no stationary point
CUT_SHORT = "ended by --max-seconds: the intervals are as wide as they were by then"


@dataclass(frozen=True)
class Noise:
    """The error of a block's products by floating point (maths 0.6).

    Attributes:
        error: ``v -> error of C v``, by two recomputed products.
        block: ν, the error of a product with a unit vector.
        rows: ν of each row, (n,): the error of a product with vectors of entries about ±1.
        seen: The largest magnitude in each row of those products, (n,).
        gradient: Bound on the gradient's error, 2-norm.
        coarse: The products err by more than the rounding of their type, as differences of
            gradients do: what they show to be zero may be small and real.
    """

    error: Callable[[Vector], Vector]
    block: float
    rows: Vector
    seen: Vector
    gradient: float
    coarse: bool = False

    def doubtful(self, norms: Vector, dead: Tensor) -> Vector:
        """What the rows that are zeroed may have been, (n,): 0 for those that are zero.

        Args:
            norms: Of the rows, or what products showed of them, (n,).
            dead: Which are zeroed, (n,).
        """
        rows = self.rows.to(norms)
        if self.coarse:
            return torch.where(dead, norms + rows, torch.zeros_like(norms))
        real = dead & (norms > DOUBT_FACTOR * rows.clamp_min(self.block))
        return torch.where(real, norms, torch.zeros_like(norms))


@dataclass(frozen=True)
class Problem:
    """What a block's fields are computed from, besides its matrix A = PᵀHP, in coordinates z.

    Attributes:
        name: Of the block and its variant; with ``seed`` it fixes every random vector.
        gradient: By z, of the loss with its weight decay, (n,).
        position: z = P⁻¹p, (n,).
        loss: Over the dataset, without weight decay.
        attainable: The loss with the weight decay of the block: what steps can lower at most.
        noise: Of the products.
        eps: Unit roundoff of the products.
        shift: Weight decay on the diagonal of A, which neither matrix nor products hold.
        damping: μ of ``kappa_damped``, or None.
        seed: Of the analysis.
        floor: A lower bound on the eigenvalues of A + shift that its structure gives, or None.
        inertia: Of A, where that of another congruent matrix is known; None counts A's own.
        positive: Share of positive eigenvalues, where a congruent matrix's is known, or None.
        rounding: Bounds on the errors of the entries of A by the change of coordinates, or by
            differences, (n, n); None where they are no more than those of any product.
        doubt: What A lacks of rows that were zeroed in other coordinates though they may be
            real: norms of its rows, (n,), or None.
    """

    name: str
    gradient: Vector
    position: Vector
    loss: float
    attainable: float
    noise: Noise
    eps: float
    shift: float
    damping: float | None
    seed: int
    floor: float | None = None
    inertia: Inertia | None = None
    positive: Quantity | None = None
    rounding: Tensor | None = None
    doubt: Vector | None = None

    @property
    def narrow(self) -> bool:
        """Whether ordinary eigenvalues may lie far below τ, where no sign is known."""
        return self.noise.coarse or self.eps > torch.finfo(torch.float64).eps


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
    vectors: int = 2,
    coarse: bool = False,
) -> Noise:
    """ν of a block and of its rows, from vectors of random signs and sizes in 1/2 … 3/2.

    Plain signs would cancel in a live row such as (1, −1), half the time to exactly zero; normal
    numbers are too small for a row with one entry now and then.

    Cost:
        As many products and calls of ``error`` as ``vectors``.
    """
    # In float64 whatever the products are, for squares leave the range of float32.
    rows = torch.zeros_like(like, dtype=torch.float64)
    seen = rows.clone()
    block = 0.0
    for index in range(vectors):
        vector = noise_vector(like, seed=seed, name=name, index=index)
        wrong = error(vector).double()
        rows = torch.maximum(rows, wrong.abs())
        seen = torch.maximum(seen, product(vector).abs().double())
        block = max(block, float(wrong.norm()) / float(vector.norm()))
    return Noise(error, block, rows, seen, gradient, coarse)


def noise_vector(like: Vector, *, seed: int, name: str, index: int) -> Vector:
    """One of the vectors that a block's noise is measured with."""
    source = generator(seed, name, f"noise {index + 1}")
    sign = rademacher(like.numel(), generator=source)
    size = 0.5 + torch.rand(like.numel(), generator=source, dtype=torch.float64)
    return (sign * size).to(like)


def common_fields(problem: Problem, inactive: int, method: str) -> dict[str, Value]:
    """The plain fields that every solved row has."""
    return {
        "inactive": inactive,
        "loss": problem.loss,
        "gradient_norm": float(problem.gradient.norm()),
        "method": method,
    }


def zero_fields(problem: Problem, size: int) -> dict[str, Value]:
    """The fields of a block whose matrix is zero."""
    zero = Quantity.zero()
    return (
        zero_quantities(size, problem.damping)
        | uniform_forecast(zero)
        | {"gd_rate": zero, "gd_iterations_per_decade": zero, "gd_rate_applies": False}
        | {"notes": ["the matrix is zero: the loss is linear in this block, or does not use it"]}
    )


def drowned_fields(problem: Problem) -> dict[str, Value]:
    """The fields of a block whose every row is within a thousand times its rounding error."""
    unresolved = Quantity.unresolved()
    damped = unresolved if problem.damping is not None else Quantity.absent()
    return (
        unresolved_quantities()
        | uniform_forecast(unresolved)
        | {"gd_rate": unresolved, "gd_iterations_per_decade": unresolved, "gd_rate_applies": None}
        | {"kappa_damped": damped, "ambiguous": True}
        | {"notes": ["every row is drowned in rounding: it may be zero, or small and real"]}
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
