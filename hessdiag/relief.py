"""What a block does without for want of memory, and who keeps which part of a Krylov basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hessdiag.distributed import Group
from hessdiag_probes.basis import Share
from hessdiag_probes.types import Vector


@dataclass(frozen=True)
class Relief:
    """What a block does without for want of memory.

    Attributes:
        recompute: No graphs are kept between products.
        rows: Most rows of a batch; None leaves batches as they are.
        matrix_free: The block is not assembled, though it is small enough.
        basis: The Krylov basis in float32, or none at all; None as the budget has it.
        notes: Of all that, for the rows.
    """

    recompute: bool = False
    rows: int | None = None
    matrix_free: bool = False
    basis: Literal["float32", "power"] | None = None
    notes: tuple[str, ...] = ()


def basis_share(group: Group, size: int) -> Share | None:
    """This rank's part of vectors of ``size`` numbers; None where it is alone."""
    if group.size == 1:
        return None
    first, last = (size * rank // group.size for rank in (group.rank, group.rank + 1))

    def reduce(part: Tensor) -> Tensor:
        return group.summed(lambda: part)

    def gather(part: Vector) -> Vector:
        def whole() -> Vector:
            vector = torch.zeros(size, dtype=part.dtype, device=part.device)
            vector[first:last] = part
            return vector

        return group.summed(whole)

    return Share(first, last, reduce, gather)
