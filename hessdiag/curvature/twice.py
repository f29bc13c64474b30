"""Whether a gradient can be differentiated again, where autograd does not say so by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.curvature.objective import Objective, only

DELAYED = "Error"
"""Name of the node that ``once_differentiable`` puts into the graph of a gradient."""


def once_only(tensors: Iterable[Tensor]) -> bool:
    """Whether the graph holds what is marked ``once_differentiable``.

    ``torch.autograd.grad`` with inputs does not run a node that leads to none of them, and this
    one leads nowhere: instead of its error the derivative through it is silently missing.
    """
    left: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        if type(node).__name__ == DELAYED:
            return True
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                left.append(parent)
    return False


def gradient_once_only(objective: Objective, parameters: Sequence[nn.Parameter]) -> bool:
    """The same of the gradient of the first batch.

    Cost:
        A forward and a backward that keep their graph.
    """
    with only(parameters):
        loss = objective.evaluate(objective.batches.items[0])
        if not loss.requires_grad:
            return False
        gradient = torch.autograd.grad(
            loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return once_only(gradient)
