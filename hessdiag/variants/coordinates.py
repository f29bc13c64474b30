"""Changes of a block's parameters, p = P z: invertible linear maps, never held as n × n.

Every map acts on the last dimension, so that a matrix is transformed row by row at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Coordinates(Protocol):
    """``p = P z`` of one block of n parameters; M = P Pᵀ is the preconditioner."""

    @property
    def size(self) -> int:
        """The number of parameters, n."""
        ...

    @property
    def diagonal(self) -> bool:
        """Whether P is diagonal."""
        ...

    def apply(self, z: Tensor, /) -> Tensor:
        """``P z``; (…, n)."""
        ...

    def transposed(self, vector: Tensor, /) -> Tensor:
        """``Pᵀ v``; (…, n)."""
        ...

    def inverse(self, p: Tensor, /) -> Tensor:
        """``P⁻¹ p``; (…, n)."""
        ...

    def least(self) -> float | None:
        """A lower bound on the smallest eigenvalue of PᵀP, or None where none is known."""
        ...

    def magnitude(self) -> Coordinates:
        """A map whose entries bound those of P in magnitude; all its entries are >= 0."""
        ...


@dataclass(frozen=True)
class Diagonal:
    """``P = diag(scale)``, so that ``M = diag(scale²)``; ``scale`` (n,), none of it zero."""

    scale: Tensor

    @property
    def size(self) -> int:
        """The number of parameters, n."""
        return self.scale.numel()

    @property
    def diagonal(self) -> bool:
        """True."""
        return True

    def apply(self, z: Tensor, /) -> Tensor:
        """``P z``."""
        return z * self.scale

    def transposed(self, vector: Tensor, /) -> Tensor:
        """``Pᵀ v``."""
        return vector * self.scale

    def inverse(self, p: Tensor, /) -> Tensor:
        """``P⁻¹ p``."""
        return p / self.scale

    def least(self) -> float | None:
        """The smallest eigenvalue of PᵀP."""
        return float(self.scale.abs().min()) ** 2

    def magnitude(self) -> Coordinates:
        """|P|."""
        return Diagonal(self.scale.abs())


def identity(like: Tensor) -> Diagonal:
    """The coordinates of ``raw`` for a block like the vector ``like``."""
    return Diagonal(torch.ones_like(like))


@dataclass(frozen=True)
class Dense:
    """``P`` as a matrix (n, n), for what is small by nature.

    Attributes:
        matrix: P.
        inverted: P⁻¹.
    """

    matrix: Tensor
    inverted: Tensor

    @property
    def size(self) -> int:
        """The number of parameters, n."""
        return self.matrix.shape[0]

    @property
    def diagonal(self) -> bool:
        """False."""
        return False

    def apply(self, z: Tensor, /) -> Tensor:
        """``P z``."""
        return z @ self.matrix.T.to(z)

    def transposed(self, vector: Tensor, /) -> Tensor:
        """``Pᵀ v``."""
        return vector @ self.matrix.to(vector)

    def inverse(self, p: Tensor, /) -> Tensor:
        """``P⁻¹ p``."""
        return p @ self.inverted.T.to(p)

    def least(self) -> float | None:
        """From the 2-norm of P⁻¹."""
        return float(torch.linalg.matrix_norm(self.inverted, ord=2)) ** -2

    def magnitude(self) -> Dense:
        """|P|."""
        return Dense(self.matrix.abs(), self.inverted.abs())


@dataclass(frozen=True)
class Kronecker:
    """``P = left ⊗ right`` on the row-major entries of a matrix: ``vec(X) -> vec(L X Rᵀ)``.

    Attributes:
        left: (rows, rows), or None for the identity.
        right: (columns, columns), or None for the identity.
        rows: Of the matrix.
        columns: Of the matrix; n = rows · columns.
    """

    left: Dense | None
    right: Dense | None
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """The number of parameters, n."""
        return self.rows * self.columns

    @property
    def diagonal(self) -> bool:
        """False."""
        return False

    def apply(self, z: Tensor, /) -> Tensor:
        """``P z``."""
        return self._sided(z, Dense.apply)

    def transposed(self, vector: Tensor, /) -> Tensor:
        """``Pᵀ v``."""
        return self._sided(vector, Dense.transposed)

    def inverse(self, p: Tensor, /) -> Tensor:
        """``P⁻¹ p``."""
        return self._sided(p, Dense.inverse)

    def least(self) -> float | None:
        """The product of the factors' own."""
        sides = [side.least() or 0.0 for side in (self.left, self.right) if side is not None]
        return float(torch.tensor(sides, dtype=torch.float64).prod())

    def magnitude(self) -> Coordinates:
        """|L| ⊗ |R|."""
        left = None if self.left is None else self.left.magnitude()
        right = None if self.right is None else self.right.magnitude()
        return Kronecker(left, right, self.rows, self.columns)

    def _sided(self, vector: Tensor, side: Callable[[Dense, Tensor], Tensor]) -> Tensor:
        found = vector.reshape(*vector.shape[:-1], self.rows, self.columns)
        if self.right is not None:
            found = side(self.right, found)
        if self.left is not None:
            found = side(self.left, found.mT).mT
        return found.reshape(vector.shape)


@dataclass(frozen=True)
class Composed:
    """``P = first · then``: ``z -> first(then(z))``, as a rotation times a diagonal."""

    first: Coordinates
    then: Coordinates

    @property
    def size(self) -> int:
        """The number of parameters, n."""
        return self.first.size

    @property
    def diagonal(self) -> bool:
        """Whether both are."""
        return self.first.diagonal and self.then.diagonal

    def apply(self, z: Tensor, /) -> Tensor:
        """``P z``."""
        return self.first.apply(self.then.apply(z))

    def transposed(self, vector: Tensor, /) -> Tensor:
        """``Pᵀ v``."""
        return self.then.transposed(self.first.transposed(vector))

    def inverse(self, p: Tensor, /) -> Tensor:
        """``P⁻¹ p``."""
        return self.then.inverse(self.first.inverse(p))

    def least(self) -> float | None:
        """The product of both."""
        first, then = self.first.least(), self.then.least()
        return None if first is None or then is None else first * then

    def magnitude(self) -> Coordinates:
        """The product of both, which bounds that of P."""
        return Composed(self.first.magnitude(), self.then.magnitude())


@dataclass(frozen=True)
class Joined:
    """Block-diagonal ``P``: each part acts on its own places of the block.

    Attributes:
        parts: Pairs of places (indices into the block, a partition of it) and coordinates.
    """

    parts: Sequence[tuple[Tensor, Coordinates]]

    @property
    def size(self) -> int:
        """The number of parameters, n."""
        return sum(part.size for _, part in self.parts)

    @property
    def diagonal(self) -> bool:
        """Whether every part is."""
        return all(part.diagonal for _, part in self.parts)

    def apply(self, z: Tensor, /) -> Tensor:
        """``P z``."""
        return self._each(z, lambda part, piece: part.apply(piece))

    def transposed(self, vector: Tensor, /) -> Tensor:
        """``Pᵀ v``."""
        return self._each(vector, lambda part, piece: part.transposed(piece))

    def inverse(self, p: Tensor, /) -> Tensor:
        """``P⁻¹ p``."""
        return self._each(p, lambda part, piece: part.inverse(piece))

    def least(self) -> float | None:
        """The least of the parts."""
        found = [part.least() for _, part in self.parts]
        known = [value for value in found if value is not None]
        return min(known) if len(known) == len(found) else None

    def magnitude(self) -> Coordinates:
        """Each part's own."""
        return Joined([(places, part.magnitude()) for places, part in self.parts])

    def _each(self, vector: Tensor, side: Callable[[Coordinates, Tensor], Tensor]) -> Tensor:
        result = torch.empty_like(vector)
        for places, part in self.parts:
            result[..., places] = side(part, vector[..., places])
        return result


def congruence(matrix: Tensor, coordinates: Coordinates) -> Tensor:
    """``Pᵀ A P`` of a symmetric matrix (n, n), symmetrised."""
    found = coordinates.transposed(coordinates.transposed(matrix).mT)
    return (found + found.mT) / 2


def entry_rounding(size: int, eps: float) -> float:
    """What rounding does to an entry of a congruence, relative to the sum of its terms' sizes."""
    return 10 * float(size**0.5) * eps


def congruence_error(matrix: Tensor, coordinates: Coordinates, eps: float) -> Tensor | None:
    """Bounds on what rounding does to each entry of :func:`congruence`, (n, n).

    ``10 √n ε |Pᵀ| |A| |P|``: what cancels in the sums, as the mean of an input far from zero does,
    is not in the result but in its error. None for diagonal P, whose entries are single products.

    Args:
        matrix: A.
        coordinates: P.
        eps: Unit roundoff of the entries of A, no less than that of the sums.
    Source:
        Higham (2002), section 3.5; √n in place of n by Higham and Mary (2019).
    """
    if coordinates.diagonal:
        return None
    unit = entry_rounding(len(matrix), eps)
    bound: Tensor = unit * congruence(matrix.abs(), coordinates.magnitude())
    return bound
