"""Several vectors at once through a kept graph: the same arithmetic in fewer, larger operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hessdiag.curvature.hessian import BatchProduct
from hessdiag.curvature.objective import flatten, unflatten
from hessdiag.errors import is_out_of_memory


@dataclass
class Wide:
    """A batch's product that takes several vectors at once.

    Attributes:
        product: By backward passes on a graph that is kept.
        width: Vectors at once; 1 after memory ran out.
    """

    product: BatchProduct
    width: int

    def __call__(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        """``C_B v`` of one vector."""
        return self.product(pieces)

    def many(self, vectors: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The products with ``vectors``, both by rows, (k, n)."""
        try:
            parts = [at_once(self.product, some, parameters) for some in vectors.split(self.width)]
        except Exception as error:
            if self.width == 1 or not is_out_of_memory(error):
                raise
            self.width = 1
            return self.many(vectors, parameters)
        return torch.cat(parts)


def at_once(product: BatchProduct, vectors: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """A batch's products with several vectors by one pass through its graph.

    Args:
        product: By backward passes on a graph that is kept.
        vectors: By rows, (k, n).
        parameters: Of the block, requiring gradients.
    Returns:
        The products by rows, (k, n).
    Raises:
        Exception: An operation of the graph cannot be vectorised; torch raises what it likes.
    Cost:
        The arithmetic of k products, the memory of k graphs at most, the overhead of one product.
    """
    count = len(vectors)
    if count == 1:
        return flatten(product(unflatten(vectors[0], parameters)))[None]
    sizes = [p.numel() for p in parameters]
    pieces = [
        piece.view(count, *parameter.shape)
        for piece, parameter in zip(vectors.split(sizes, dim=1), parameters, strict=True)
    ]
    found = torch.vmap(lambda *one: tuple(product(one)))(*pieces)
    return torch.cat([part.detach().reshape(count, -1) for part in found], dim=1)
