"""How far from diagonal a matrix is, before and after a rotation of the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.variants.coordinates import congruence
from hessdiag.variants.parts import Part, rotation_of
from hessdiag.variants.scene import Scene

_NOISE = 1e-13
"""Entries of a rotated float64 vector below this share of its norm are rounding."""


@dataclass(frozen=True)
class OffDiagonality:
    """``‖C − diag C‖_F / ‖C‖_F`` before and after, of C and of C with a unit diagonal.

    The first depends on the scale of each parameter, the second does not.
    """

    before: float
    after: float
    unit_before: float
    unit_after: float

    def note(self, what: str) -> str:
        """What the plain numbers leave out, for the table."""
        return (
            f"off-diagonality of {what}: {self.before:.2g} before, {self.after:.2g} after the "
            f"rotation; with a unit diagonal {self.unit_before:.2g} and {self.unit_after:.2g}"
        )


@dataclass(frozen=True)
class Measured:
    """What a rotation does, as :class:`hessdiag.variants.scene.Built` states it."""

    plain: dict[str, float] | None
    notes: tuple[str, ...]


def measured(
    scene: Scene, parts: Sequence[Part], gradients: Sequence[Mapping[str, Tensor]]
) -> Measured:
    """Of the gradients' second moment and, where it was assembled, of the block's matrix."""
    second, matrix = of_gradients(parts, gradients), of_hessian(scene, parts)
    notes = [
        found.note(what)
        for found, what in ((second, "the gradients"), (matrix, "H"))
        if found is not None
    ]
    plain = None if second is None else {"before": second.before, "after": second.after}
    return Measured(plain, tuple(notes))


def of_gradients(
    parts: Sequence[Part], gradients: Sequence[Mapping[str, Tensor]]
) -> OffDiagonality | None:
    """Of the gradients' second moment, C = mean g gᵀ of a block.

    Args:
        parts: Of the block; their rotations are what changes.
        gradients: By parameter, at each step.
    Returns:
        None where there are no gradients, or all are zero.
    Cost:
        O(T² n) for T gradients: ‖C‖_F² = Σ (g_s · g_t)² / T², without C itself.
    Source:
        maths.md 7.
    """
    if not gradients:
        return None
    before, after, unit_before, unit_after = (_Sums(len(gradients)) for _ in range(4))
    for part in parts:
        vectors = torch.stack([part.ordered(each).double() for each in gradients])
        before.add(vectors)
        unit_before.add(_unit(vectors))
        vectors = part.rotated(vectors)
        after.add(vectors)
        unit_after.add(_unit(vectors))
    if not bool(before.gram.any()):
        return None
    return OffDiagonality(before.off(), after.off(), unit_before.off(), unit_after.off())


class _Sums:
    """The Gram matrix of the vectors, and the squares of the diagonal of their second moment."""

    def __init__(self, count: int) -> None:
        self.gram = torch.zeros(count, count, dtype=torch.float64)
        self.diagonal = 0.0

    def add(self, vectors: Tensor) -> None:
        """Further entries of the same vectors, (T, n)."""
        self.gram += (vectors @ vectors.T).cpu() / len(vectors)
        self.diagonal += float(vectors.square().mean(dim=0).square().sum())

    def off(self) -> float:
        """Of the second moment."""
        total = float(self.gram.square().sum())
        return math.sqrt(max(0.0, 1 - self.diagonal / total)) if total > 0 else 0.0


def _unit(vectors: Tensor) -> Tensor:
    """Scaled so that their second moment has a unit diagonal; noise becomes zero."""
    moments = vectors.square().mean(dim=0)
    live = moments > _NOISE**2 * moments.sum()
    return torch.where(live, vectors / moments.where(live, moments.new_ones(())).sqrt(), 0.0)


def of_hessian(scene: Scene, parts: Sequence[Part]) -> OffDiagonality | None:
    """Of the block's matrix; None where it was not assembled, or is zero."""
    if scene.matrix is None or not bool(scene.matrix.any()):
        return None
    rotated = congruence(scene.matrix, rotation_of(scene, parts))
    return OffDiagonality(
        _off(scene.matrix),
        _off(rotated),
        _off(_unit_diagonal(scene.matrix)),
        _off(_unit_diagonal(rotated)),
    )


def _off(matrix: Tensor) -> float:
    whole = float(torch.linalg.matrix_norm(matrix))
    return float(torch.linalg.matrix_norm(matrix - matrix.diag().diag())) / whole if whole else 0.0


def _unit_diagonal(matrix: Tensor) -> Tensor:
    """``h_ij / √|h_ii h_jj|``; rows without a diagonal entry are left out."""
    diagonal = matrix.diagonal().abs()
    live = diagonal > _NOISE * diagonal.max()
    scale = torch.where(live, diagonal.where(live, diagonal.new_ones(())).rsqrt(), 0.0)
    return scale[:, None] * matrix * scale
