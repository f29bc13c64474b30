"""One batch's exact Hessian as a product, by double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.curvature.objective import Objective

BatchProduct = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Tensors of the parameters' shapes to ``C v`` in the same shapes, for one batch."""


def hessian_product(
    objective: Objective, batch: Any, parameters: Sequence[nn.Parameter]
) -> BatchProduct | None:
    """The graph of the batch's gradient, and its derivative along a vector.

    Args:
        objective: Whose loss is differentiated.
        batch: On the device, in the dtype.
        parameters: Of the block, requiring gradients; all others are constants, so that the
            graph ends at the lowest layer of the block.
    Returns:
        ``v -> H_B v``, or None where the loss is linear in the block (its Hessian is zero).
    Raises:
        RuntimeError: An operation has no double backward.
    Cost:
        A forward and a backward now; about two gradients per product.
    Source:
        Pearlmutter (1994), by reverse over reverse: right where torch's forward-mode second
        derivatives of normalisation layers are not (maths 0.1).
    """
    loss = objective.evaluate(batch)
    if not loss.requires_grad:
        return None
    gradient = torch.autograd.grad(
        loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
    )
    curved = [index for index, part in enumerate(gradient) if part.requires_grad]
    if not curved:
        return None
    outputs = [gradient[index] for index in curved]

    def product(vector: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(
            outputs,
            parameters,
            grad_outputs=[vector[index] for index in curved],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    return product
