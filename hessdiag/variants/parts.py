"""Matrix-valued M, put together from parts: a matrix of parameters, its factors, its rotation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.variants.coordinates import Coordinates, Dense, Joined, Kronecker
from hessdiag.variants.scene import Scene

SIDE_LIMIT = 4096
"""Largest side of a matrix that gets a dense factor; eigenvectors of more cost minutes."""


@dataclass(frozen=True)
class Part:
    """Parameters that M takes together, as one matrix.

    Attributes:
        names: Of the parameters; several stand side by side, as ``[W b]``.
        rows: Of the matrix.
        coordinates: P, on the matrix's entries in row-major order.
        rotation: Its orthogonal factor, or None where P is diagonal.
    """

    names: tuple[str, ...]
    rows: int
    coordinates: Coordinates
    rotation: Coordinates | None

    def ordered(self, values: Mapping[str, Tensor]) -> Tensor:
        """The part's entries of ``values`` (one tensor per parameter), in its own order."""
        if len(self.names) == 1:
            return values[self.names[0]].reshape(-1)
        columns = [values[name].reshape(self.rows, -1) for name in self.names]
        return torch.cat(columns, dim=1).reshape(-1)

    def rotated(self, vectors: Tensor) -> Tensor:
        """``Rᵀ v`` of every row."""
        return vectors if self.rotation is None else self.rotation.transposed(vectors)


def assemble(scene: Scene, parts: Sequence[Part]) -> Coordinates:
    """P of the block from those of its parts, which hold each of its parameters once."""
    if len(parts) == 1 and len(parts[0].names) == 1:
        return parts[0].coordinates
    places = scene.places()
    return Joined([(part.ordered(places), part.coordinates) for part in parts])


def rotation_of(scene: Scene, parts: Sequence[Part]) -> Coordinates:
    """R of the block; parts without one keep their coordinates."""
    places = scene.places()
    found: list[tuple[Tensor, Coordinates]] = []
    for part in parts:
        where = part.ordered(places)
        found.append((where, part.rotation or Kronecker(None, None, where.numel(), 1)))
    return Joined(found)


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix: (out, in · kh · kw); a vector is a column."""
    rows = tensor.shape[0] if tensor.ndim else 1
    return rows, tensor.numel() // max(rows, 1)


@dataclass(frozen=True)
class Factor:
    """A positive definite matrix by its eigenvalues, ascending, and eigenvectors (columns)."""

    values: Tensor
    vectors: Tensor

    def times(self, scale: float) -> Factor:
        """``scale`` times the matrix."""
        return Factor(self.values * scale, self.vectors)


def power(factor: Factor | None, exponent: float) -> Dense | None:
    """The symmetric power and its inverse; None stands for the identity."""
    if factor is None:
        return None
    scales = factor.values**exponent
    return Dense(
        (factor.vectors * scales) @ factor.vectors.T, (factor.vectors / scales) @ factor.vectors.T
    )


def rotation(factor: Factor | None) -> Dense | None:
    """The eigenvectors."""
    return None if factor is None else orthogonal(factor.vectors)


def damped(matrix: Tensor, shift: float) -> Factor:
    """``A + shift I`` of a matrix that has no negative eigenvalues but by rounding.

    Args:
        matrix: A, symmetric, float64, (d, d).
        shift: Positive, and far above the rounding of A.
    Cost:
        An eigendecomposition, O(d³).
    """
    values, vectors = torch.linalg.eigh(matrix)
    return Factor(values + shift, vectors)


def orthogonal(vectors: Tensor) -> Dense:
    """A rotation by its columns."""
    return Dense(vectors, vectors.T)


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first of these names, for a note."""
    every = list(dict.fromkeys(names))
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
