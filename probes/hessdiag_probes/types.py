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


LOOK_EVERY = 5
"""Products between two looks at numbers on a device, each of which waits for all work there."""


def looks(like: Vector, every: int | None) -> int:
    """Products between two looks: as asked, else each on the CPU and every few on a device."""
    if every is not None:
        return every
    return 1 if like.device.type == "cpu" else LOOK_EVERY


class CountedMatvec:
    """A matvec that counts its products and refuses one that is misshapen or not finite.

    On a device whether products are finite is only looked at every few of them.

    Attributes:
        count: Products so far.
        every: Products between two looks; None for 1 on the CPU and a few on a device.
        dtype: Of the last product.
    """

    __slots__ = ("_finite", "_unseen", "count", "dtype", "every", "matvec")

    def __init__(self, matvec: Matvec, every: int | None = None) -> None:
        self.matvec = matvec
        self.count = 0
        self.every = every
        self.dtype = torch.float64
        self._finite: Tensor | None = None
        self._unseen = 0

    def __call__(self, vector: Vector) -> Vector:
        """The product ``A v``.

        Raises:
            ValueError: The product is not shaped like ``vector``.
            Breakdown: The product, or one since the last look, is not finite.
        """
        product = self.unseen(vector)
        finite = torch.isfinite(product).all()
        self.dtype = vector.dtype
        self._finite = finite if self._finite is None else self._finite & finite
        self._unseen += 1
        if self._unseen >= looks(vector, self.every):
            self.look()
        return product

    def unseen(self, vector: Vector) -> Vector:
        """The product, of which the caller himself finds out whether it is finite."""
        self.count += 1
        product = self.matvec(vector)
        if product.shape != vector.shape:
            raise ValueError(
                f"the matvec maps {vector.numel()} numbers to a product of shape "
                f"{list(product.shape)}; it must return one vector of the same length"
            )
        return product

    def several(self, vectors: Tensor) -> Tensor:
        """The products of a matvec that takes several vectors by rows, ``(k, n)``.

        Raises:
            ValueError: The products are not shaped like the vectors.
            Breakdown: One of them is not finite.
        """
        first, self.count = self.count + 1, self.count + len(vectors)
        products = self.matvec(vectors)
        if products.shape != vectors.shape:
            raise ValueError(
                f"the matvec maps vectors of shape {list(vectors.shape)} to products of shape "
                f"{list(products.shape)}; it must return a row for each"
            )
        if not bool(torch.isfinite(products).all()):
            raise not_finite(f"one of products {first} to {self.count}", vectors.dtype)
        return products

    def look(self) -> None:
        """Make sure that all products so far are finite.

        Raises:
            Breakdown: One since the last look is not.
        """
        finite, since, self._finite, self._unseen = self._finite, self._unseen, None, 0
        if finite is not None and not bool(finite):
            first = self.count - since + 1
            which = f"product {first}" if since == 1 else f"one of products {first} to {self.count}"
            raise not_finite(which, self.dtype)


def not_finite(which: str, dtype: torch.dtype) -> Breakdown:
    """What a product that is not finite is told as."""
    return Breakdown(
        f"{which} of the operator is not finite; check the loss and the parameters for "
        f"infinities, or work in a wider dtype than {dtype}"
    )


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
    """The direction, safe where squares of the entries would leave the range of the dtype.

    Of the zero vector it is zero.
    """
    tiny = torch.finfo(vector.dtype).tiny
    shrunk = vector / vector.abs().amax().clamp(min=tiny)
    size = torch.linalg.vector_norm(shrunk, dtype=torch.float64)
    direction: Vector = shrunk / size.clamp(min=tiny)
    return direction
