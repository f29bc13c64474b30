"""Shampoo's M: from both sides of each gradient matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hessdiag.variants.coordinates import Diagonal, Kronecker
from hessdiag.variants.held import held_gradients
from hessdiag.variants.off_diagonality import measured
from hessdiag.variants.parts import (
    SIDE_LIMIT,
    Factor,
    Part,
    assemble,
    damped,
    listed,
    matrix_shape,
    power,
    rotation,
)
from hessdiag.variants.scene import Built, NotApplicable, Scene

EPSILON = 1e-6
"""Damping of each factor, as a share of its largest eigenvalue."""


def shampoo(scene: Scene) -> Built:
    """``M = L^{-1/4} ⊗ R^{-1/4}``, L = Σ GGᵀ + ε I and R = Σ GᵀG + ε I over replayed gradients.

    A convolution's weight counts as the matrix (out, in · kh · kw). A vector has one side, so
    ``M = (Σ ggᵀ + ε I)^{-1/2}``. The exponent is −1/(2k) with k sides, also where a side of more
    than :data:`SIDE_LIMIT` keeps the identity: M then still has the units of 1/|g|. Without any
    side M is AdaGrad's diagonal.

    Raises:
        NotApplicable: No gradients can be replayed, or all of the block are zero.
    Cost:
        An eigendecomposition per side; the gradients are shared with other variants.
    Source:
        Gupta, Koren, Singer (2018); maths.md 3.2. ε follows the largest eigenvalue, as in Anil
        et al. (2020), so that the loss's scale does not matter.
    """
    gradients = held_gradients(scene)
    parts: list[Part] = []
    large: list[str] = []
    still: list[str] = []
    for name, parameter in zip(scene.block.parameters, scene.parameters, strict=True):
        steps = [each[name].detach().double() for each in gradients.each]
        if not any(bool(step.any()) for step in steps):
            still.append(name)
        elif max(_sides(parameter)) > SIDE_LIMIT:
            large.append(name)
        parts.append(_part(name, parameter, steps))
    if len(still) == len(parts):
        raise NotApplicable(
            "every replayed gradient of the block is zero, and Shampoo's M is made from them; "
            "iterates from earlier in the training would have some"
        )
    notes = [
        f"Shampoo {gradients.note}; each factor is damped by {EPSILON:g} of its largest eigenvalue"
    ]
    if large:
        notes.append(
            f"sides of more than {SIDE_LIMIT} keep the identity, and the other side the whole "
            f"exponent: {listed(large)}"
        )
    if still:
        notes.append(f"no gradient, so M is the identity there: {listed(still)}")
    rotated = measured(scene, parts, gradients.each)
    return Built(
        assemble(scene, parts),
        source=gradients.source,
        optimizer_class="Shampoo",
        off_diagonality=rotated.plain,
        notes=(*notes, *rotated.notes),
    )


def _sides(parameter: Tensor) -> tuple[int, ...]:
    """What Shampoo makes a factor for: the sides of a matrix, or the only one of a vector."""
    return matrix_shape(parameter) if parameter.ndim > 1 else (parameter.numel(),)


def _part(name: str, parameter: nn.Parameter, steps: Sequence[Tensor]) -> Part:
    rows, columns = matrix_shape(parameter)
    matrices = [step.reshape(rows, columns) for step in steps]
    if not any(bool(matrix.any()) for matrix in matrices):
        return Part((name,), rows, Kronecker(None, None, rows, columns), None)
    sides = _sides(parameter)
    kept = sum(side <= SIDE_LIMIT for side in sides)
    if kept == 0:
        total = torch.stack(matrices).square().sum(dim=0).reshape(-1)
        moments = total + EPSILON * total.max()
        return Part((name,), rows, Diagonal(moments.pow(-0.25).to(parameter.dtype)), None)
    left = _factor(matrices) if rows <= SIDE_LIMIT else None
    two_sided = len(sides) == 2 and columns <= SIDE_LIMIT
    right = _factor([matrix.mT for matrix in matrices]) if two_sided else None
    exponent = -1 / (4 * kept)
    return Part(
        (name,),
        rows,
        Kronecker(power(left, exponent), power(right, exponent), rows, columns),
        Kronecker(rotation(left), rotation(right), rows, columns),
    )


def _factor(matrices: Sequence[Tensor]) -> Factor:
    """``Σ GGᵀ + ε I`` by its eigenvectors."""
    total = torch.zeros_like(matrices[0] @ matrices[0].mT)
    for matrix in matrices:
        total += matrix @ matrix.mT
    return damped(total, EPSILON * float(torch.linalg.matrix_norm(total, ord=2)))
