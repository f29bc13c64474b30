"""What every engine is, and how a user's code that cannot be differentiated twice is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from hessdiag.curvature.ggn import ggn_product
from hessdiag.curvature.hessian import BatchProduct, hessian_product
from hessdiag.curvature.objective import Objective
from hessdiag.errors import HessdiagError, SelfCheckFailed, is_out_of_memory
from hessdiag.options import Curvature
from hessdiag_probes.types import Vector

BuildProduct = Callable[[Objective, Any, Sequence[nn.Parameter]], BatchProduct | None]
BUILD: dict[Curvature, BuildProduct] = {"hessian": hessian_product, "ggn": ggn_product}


class Engine(Protocol):
    """``v -> C v`` over the dataset for one block; linear, and free of side effects."""

    @property
    def name(self) -> str:
        """As ``--engine`` names it."""
        ...

    def __call__(self, vector: Vector, /) -> Vector:
        """The product, flattened in the order of the block's parameters."""
        ...


def guarded(
    build: BuildProduct, objective: Objective, batch: Any, parameters: Sequence[nn.Parameter]
) -> BatchProduct | None:
    """What ``build`` makes of a batch; a graph that has no second derivative is told as such."""
    try:
        return build(objective, batch, parameters)
    except HessdiagError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SelfCheckFailed(_no_second_derivative(error)) from error


def run_product(product: BatchProduct, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    """The product; a graph that has no second derivative is told as such."""
    try:
        return product(pieces)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SelfCheckFailed(_no_second_derivative(error)) from error


def _no_second_derivative(error: Exception) -> str:
    return (
        f"the loss cannot be differentiated twice: {error}\n"
        "Replace the operation that has no double backward by plain torch operations (an eager "
        "version of a fused kernel; non-reentrant activation checkpointing)."
    )
