"""AdaDiag's M: Adam's in coordinates that the gradient's singular vectors rotate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.variants.coordinates import Composed, Diagonal, Kronecker
from hessdiag.variants.held import held_gradients
from hessdiag.variants.moments import RULES, Scaling
from hessdiag.variants.off_diagonality import measured
from hessdiag.variants.parts import (
    SIDE_LIMIT,
    Part,
    assemble,
    listed,
    matrix_shape,
    orthogonal,
)
from hessdiag.variants.scene import Built, Scene

_ADAM = RULES["adam"]
_ROUNDING = 1e-12
"""What a rotation in float64 may leave where nothing is, as a share of the vector's norm."""


def adadiag(scene: Scene) -> Built:
    """``M = R diag(1 / (√v̂ + ε)) Rᵀ`` with R = U ⊗ I: the gradients' columns are rotated.

    U holds the left singular vectors, all of them, of the last replayed gradient G = U S Vᵀ: the
    optimizer decomposes the gradient of the step it is at, and no average. v is Adam's average
    of (Rᵀg)² over the replayed gradients, with R held fixed. A convolution's weight counts as
    the matrix (out, in · kh · kw). Vectors keep Adam's diagonal M, and a side of more than
    :data:`SIDE_LIMIT` is not rotated.

    Raises:
        NotApplicable: No gradients can be replayed.
    Cost:
        A singular value decomposition; the gradients are shared with other variants.
    Source:
        arXiv 2502.07488; maths.md 7.
    """
    return _rotated(scene, right=False)


def adadiag2(scene: Scene) -> Built:
    """The same from both sides, R = U ⊗ V (AdaDiag++). See :func:`adadiag`."""
    return _rotated(scene, right=True)


def _rotated(scene: Scene, *, right: bool) -> Built:
    gradients = held_gradients(scene)
    group = _ADAM.defaults()
    dead = {name: scene.dead[where] for name, where in scene.places().items()}
    parts: list[Part] = []
    zero = unscaled = 0
    for name, parameter in zip(scene.block.parameters, scene.parameters, strict=True):
        steps = [each[name].detach().double() for each in gradients.each]
        rotation = _rotation(parameter, steps[-1], right=right)
        scaling = _moments(rotation, steps, group)
        buried = _dead(rotation, dead[name])
        zero += int(scaling.zero.sum())
        unscaled += int((scaling.zero & ~buried).sum())
        root = torch.where(buried & scaling.zero, 1.0, scaling.m.sqrt()).to(parameter.dtype)
        scaled = Diagonal(root)
        rows, _ = matrix_shape(parameter)
        parts.append(
            Part((name,), rows, scaled, None)
            if rotation is None
            else Part((name,), rows, Composed(rotation, scaled), rotation)
        )
    notes = [
        f"AdaDiag {gradients.note}; R of the last one; "
        f"beta2 {group['betas'][1]:g}, eps {group['eps']:g}"
    ]
    sides = {
        name: matrix_shape(parameter)[: 2 if right else 1]
        for name, parameter in zip(scene.block.parameters, scene.parameters, strict=True)
        if parameter.ndim > 1
    }
    large = [name for name, found in sides.items() if max(found) > SIDE_LIMIT]
    if large:
        notes.append(f"sides of more than {SIDE_LIMIT} are not rotated: {listed(large)}")
    if not sides:
        notes.append("a block of vectors has no side to rotate: this is Adam's M")
    if unscaled:
        notes.append(f"{unscaled} directions that are not dead have no gradient: eps sets their M")
    rotated = measured(scene, parts, gradients.each)
    return Built(
        assemble(scene, parts),
        source=gradients.source,
        optimizer_class="AdaDiag++" if right else "AdaDiag",
        zero_state=zero,
        off_diagonality=rotated.plain,
        notes=(*notes, *rotated.notes),
    )


def _rotation(parameter: nn.Parameter, gradient: Tensor, *, right: bool) -> Kronecker | None:
    """``U ⊗ V`` of the gradient, in full, or None where no side is rotated."""
    if parameter.ndim < 2:
        return None
    rows, columns = matrix_shape(parameter)
    turn_left, turn_right = rows <= SIDE_LIMIT, right and columns <= SIDE_LIMIT
    if not (turn_left or turn_right):
        return None
    matrix = gradient.reshape(rows, columns)
    # The full SVD, as the method's: the basis of the null space enters M.
    full = (rows <= columns or turn_left) and (columns <= rows or turn_right)
    left, _, right_t = torch.linalg.svd(matrix, full_matrices=full)
    return Kronecker(
        orthogonal(left) if turn_left else None,
        orthogonal(right_t.mT) if turn_right else None,
        *(rows, columns),
    )


def _moments(rotation: Kronecker | None, steps: Sequence[Tensor], group: dict[str, Any]) -> Scaling:
    """M in rotated coordinates, by Adam's own recurrence."""
    state: dict[str, Tensor | float] = {}
    for step in steps:
        flat = step.reshape(-1)
        _ADAM.advance(state, group, flat if rotation is None else rotation.transposed(flat))
    found = _ADAM.scaling(state, group)
    if rotation is None:
        return found
    moments = torch.as_tensor(state["exp_avg_sq"])
    return replace(found, zero=moments <= _ROUNDING**2 * moments.sum())


def _dead(rotation: Kronecker | None, dead: Tensor) -> Tensor:
    """Which rotated parameters are made of dead ones alone."""
    if rotation is None:
        return dead
    left, right = rotation.left, rotation.right
    squares = Kronecker(
        None if left is None else orthogonal(left.matrix.square()),
        None if right is None else orthogonal(right.matrix.square()),
        *(rotation.rows, rotation.columns),
    )
    return squares.transposed((~dead).to(torch.float64)) < _ROUNDING
