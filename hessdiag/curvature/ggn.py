"""One batch's Gauss–Newton matrix as a product: the model linearised, the loss kept curved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.curvature.hessian import BatchProduct
from hessdiag.curvature.objective import Objective
from hessdiag.data import transform
from hessdiag.errors import TaskError


@dataclass(frozen=True)
class Split:
    """The loss cut at the model's outputs: ``p -> outputs`` and ``cuts -> loss``.

    ``cuts`` are the outputs' values as new leaves, so that neither graph reaches the other.
    """

    outputs: list[Tensor]
    cuts: list[Tensor]
    loss: Tensor


@contextmanager
def _cut_outputs(model: nn.Module, outputs: list[Tensor], cuts: list[Tensor]) -> Iterator[None]:
    def cut(_module: nn.Module, _inputs: Any, result: Any) -> Any:
        def leaf(tensor: Tensor) -> Tensor:
            if not (tensor.is_floating_point() and tensor.requires_grad):
                return tensor
            outputs.append(tensor)
            cuts.append(tensor.detach().requires_grad_(True))
            return cuts[-1]

        return transform(result, leaf)

    handle = model.register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def split(objective: Objective, batch: Any, parameters: Sequence[nn.Parameter]) -> Split:
    """Evaluate one batch and cut the graph where the model hands its output to the loss.

    Raises:
        TaskError: There is no such place, or the loss uses the parameters besides it.
    """
    outputs: list[Tensor] = []
    cuts: list[Tensor] = []
    with _cut_outputs(objective.model, outputs, cuts):
        try:
            loss = objective.evaluate(batch)
        except TaskError as error:
            if "differentiated Tensor" not in str(error):
                raise
            raise TaskError(
                "Gauss–Newton cuts the graph at the model's output, and the task's loss "
                "differentiates that output by the input (a PINN?); use --curvature hessian"
            ) from error
    if not cuts and loss.requires_grad:
        raise TaskError(
            "Gauss–Newton needs to see the model's output, and the task's loss never calls "
            "model(…) itself (model.forward(…) and single layers are not seen), or the output "
            "holds no tensor; call model(…) in the loss, or use --curvature hessian"
        )
    if loss.requires_grad:
        direct = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        if any(part is not None for part in direct):
            raise TaskError(
                "Gauss–Newton is defined for a loss of the model's outputs, and the task's loss "
                "uses parameters besides them (a penalty?); use --weight-decay for an L2 term, "
                "or --curvature hessian"
            )
    if len(outputs) > 1:
        # An output that came from an earlier one: its Jacobian would miss the way through it.
        for later in range(1, len(outputs)):
            through = torch.autograd.grad(
                outputs[later].sum(), cuts[:later], allow_unused=True, retain_graph=True
            )
            if any(part is not None for part in through):
                raise TaskError(
                    "Gauss–Newton cannot be cut out of a loss that feeds the model's output back "
                    "into the model; use --curvature hessian"
                )
    return Split(outputs, cuts, loss)


def ggn_product(
    objective: Objective, batch: Any, parameters: Sequence[nn.Parameter]
) -> BatchProduct | None:
    """``v -> Jᵀ Λ J v`` for one batch, Λ the Hessian of the batch's loss in the outputs.

    Args:
        objective: Whose loss is differentiated; the split is at ``model(…)``.
        batch: On the device, in the dtype.
        parameters: Of the block, requiring gradients.
    Returns:
        The product, or None where it is zero.
    Raises:
        TaskError: See :func:`split`.
        RuntimeError: An operation has no double backward.
    Cost:
        A forward and two backwards now; a product is three backwards on kept graphs.
    Source:
        Schraudolph (2002). ``J v`` is the derivative of ``u -> Jᵀu``, which is linear, so no
        second derivative of the model enters.
    """
    parts = split(objective, batch, parameters)
    if not parts.cuts or not parts.loss.requires_grad:
        return None
    slope = torch.autograd.grad(parts.loss, parts.cuts, create_graph=True, allow_unused=True)
    used = [index for index, part in enumerate(slope) if part is not None]
    curved = [index for index in used if slope[index].requires_grad]
    if not curved:
        if used and all(parts.cuts[index].dim() == 0 for index in used):
            raise TaskError(
                "Gauss–Newton needs the model's output before the loss, and this model returns "
                "the loss itself, one number; take the loss from its other outputs (the logits), "
                "or use --curvature hessian"
            )
        return None
    pushed = pushforward(parts, parameters)

    def product(vector: Sequence[Tensor]) -> Sequence[Tensor]:
        change = pushed(vector)
        bent = torch.autograd.grad(
            [slope[index] for index in curved],
            parts.cuts,
            grad_outputs=[change[index] for index in curved],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.autograd.grad(
            parts.outputs,
            parameters,
            grad_outputs=bent,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    return product


def pushforward(parts: Split, parameters: Sequence[nn.Parameter]) -> BatchProduct:
    """``v -> J v`` in the shapes of the outputs, as the transpose of the transpose."""
    dummies = [torch.zeros_like(output, requires_grad=True) for output in parts.outputs]
    pulled = torch.autograd.grad(
        parts.outputs,
        parameters,
        grad_outputs=dummies,
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    linear = [index for index, part in enumerate(pulled) if part.requires_grad]

    def push(vector: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(
            [pulled[index] for index in linear],
            dummies,
            grad_outputs=[vector[index] for index in linear],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    return push
