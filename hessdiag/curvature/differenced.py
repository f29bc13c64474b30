"""The error of products by differences, from the engine to a matrix and to other coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.curvature.engines import Difference
from hessdiag_probes.random import generator, rademacher
from hessdiag_probes.types import Matvec, Vector


@dataclass(frozen=True)
class DifferencedMatrix:
    """H by differences.

    Attributes:
        matrix: Symmetrised, (n, n), float64.
        errors: What each entry may be wrong by, symmetric, (n, n). Their signs are such that the
            product with any vector is no smaller than errors that know nothing of it would give.
    """

    matrix: Tensor
    errors: Tensor


def assemble_differences(product: Matvec, engine: Difference, size: int) -> DifferencedMatrix:
    """The matrix, column by column, and its errors.

    How far it is from symmetric is an error, too: no Hessian is.

    Args:
        product: ``engine``, or what calls it once each time.
        engine: Whose latest product is asked for its error.
        size: n.
    Cost:
        n products; some 6 n² numbers.
    """
    like = engine.position
    matrix = torch.empty(size, size, dtype=torch.float64, device=like.device)
    errors = torch.empty_like(matrix)
    for place in range(size):
        unit = torch.zeros_like(like)
        unit[place] = 1.0
        matrix[:, place] = product(unit)
        errors[:, place] = _last(engine).abs()
    # Either triangle measures the same number; what disagrees by more than both err is an error.
    apart = ((matrix - matrix.T).abs() - errors - errors.T).clamp_min(0)
    scale = errors.square() + errors.T.square()
    weight = torch.where(scale > 0, errors.T.square() / scale, torch.full_like(scale, 0.5))
    matrix = weight * matrix + weight.T * matrix.T
    errors = weight * errors + weight.T * errors.T + apart
    made = generator(0, "difference", "signs")
    sign = rademacher(size, generator=made, dtype=torch.float64, device=like.device)
    return DifferencedMatrix((matrix + matrix.T) / 2, sign[:, None] * errors * sign)


def error_in(
    view: Callable[[Matvec], Matvec] | None, error: Callable[[Vector], Vector]
) -> Callable[[Vector], Vector]:
    """The error of a product that is seen through ``view``, which may add what has none."""
    if view is None:
        return error
    seen, without = view(error), view(torch.zeros_like)
    return lambda vector: seen(vector) - without(vector)


class Watched:
    """A product by differences, in whatever coordinates; keeps the largest errors that it met.

    Attributes:
        block: Largest error of a product with a unit vector.
        rows: Largest error of each row in a product with entries of about ±1, (n,).
    """

    def __init__(self, engine: Difference, view: Callable[[Matvec], Matvec] | None = None) -> None:
        self.product: Matvec = engine if view is None else view(engine)
        self.error = error_in(view, lambda _: _last(engine))
        self.block = 0.0
        self.rows = torch.zeros_like(engine.position, dtype=torch.float64)

    def __call__(self, vector: Vector, /) -> Vector:
        """The product."""
        found = self.product(vector)
        length = float(vector.double().norm())
        if length > 0:
            wrong = self.error(vector).double().abs() / length
            self.block = max(self.block, float(wrong.norm()))
            self.rows = torch.maximum(self.rows, wrong * len(wrong) ** 0.5)
        return found


def _last(engine: Difference) -> Vector:
    if engine.last is None:
        raise ValueError("the engine has made no product yet")
    return engine.last.error
