"""The contract of every estimator: a function of a vector, and a wrapper that counts its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hessdiag_probes.errors import Breakdown

Vector: TypeAlias = Tensor
"""A real floating vector of shape ``(n,)``; it carries ``n``, the dtype and the device."""

Matvec: TypeAlias = Callable[[Vector], Vector]
"""``v -> A v`` for a real symmetric ``A`` of shape ``(n, n)``; linear, and free of side effects.

The product has the shape, the dtype and the device of ``v``.
"""


class CountedMatvec:
    """A matvec that counts its products and refuses one that is misshapen or not finite."""

    __slots__ = ("count", "matvec")

    def __init__(self, matvec: Matvec) -> None:
        self.matvec = matvec
        self.count = 0

    def __call__(self, vector: Vector) -> Vector:
        """The product ``A v``.

        Raises:
            ValueError: The product is not shaped like ``vector``.
            Breakdown: The product is not finite.
        """
        self.count += 1
        product = self.matvec(vector)
        if product.shape != vector.shape:
            raise ValueError(
                f"the matvec maps {vector.numel()} numbers to a product of shape "
                f"{list(product.shape)}; it must return one vector of the same length"
            )
        if not bool(torch.isfinite(product).all()):
            raise Breakdown(
                f"product {self.count} of the operator is not finite; check the loss and the "
                f"parameters for infinities, or work in a wider dtype than {vector.dtype}"
            )
        return product


def check_vector(start: Vector) -> None:
    """Refuse a start from which no Krylov space grows.

    Raises:
        ValueError: ``start`` is not one floating vector with at least one entry.
        Breakdown: ``start`` is zero or not finite.
    """
    if start.ndim != 1 or start.numel() == 0 or not start.is_floating_point():
        raise ValueError(
            f"start has shape {list(start.shape)} and dtype {start.dtype}; "
            f"pass one real floating vector with at least one entry"
        )
    if not bool(torch.isfinite(start).all()):
        raise Breakdown("start is not finite; draw it with hessdiag_probes.sphere")
    if not bool(start.any()):
        raise Breakdown(
            "start is the zero vector, and every product with it is zero; "
            "draw it with hessdiag_probes.sphere"
        )


def norm(vector: Vector) -> float:
    """The 2-norm, accumulated in float64 so that float32 vectors neither over- nor underflow."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def unit(vector: Vector) -> Vector:
    """The direction, safe where squares of the entries would leave the range of the dtype."""
    shrunk = vector / vector.abs().amax()
    return shrunk / norm(shrunk)
