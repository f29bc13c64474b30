"""What the coordinates of a block are made from, as its variants' makers see it."""

from __future__ import annotations

import math

from torch import Tensor

from hessdiag.checkpoint.optimizer import OptimizerState
from hessdiag.opened import Opened
from hessdiag.run import VariantResult
from hessdiag.solve import entry_error, without_noise
from hessdiag.variants.scene import Iterates, Scene
from hessdiag_probes.types import CountedMatvec, Vector


def scene_of(
    opened: Opened,
    raw: VariantResult,
    optimizer: OptimizerState | None = None,
    iterates: Iterates = (),
    *,
    decoupled: bool = False,
) -> Scene:
    """What coordinates of the block are made from.

    Args:
        opened: The block.
        raw: Its row.
        optimizer: State of the checkpoint.
        iterates: Of the trajectory.
        decoupled: Weight decay is no part of what they are made for.
    """
    alive = ~opened.dead
    decay = 0.0 if decoupled else opened.network.options.weight_decay
    matrix = None
    if opened.exact:
        matrix = without_noise(opened.matrix, opened.problem.noise).matrix
        matrix.diagonal().add_(decay)
    product = opened.product

    def error(matrix: Tensor) -> float:
        found = entry_error(matrix, opened.problem)
        return math.inf if found is None else found

    def cleaned(vector: Vector) -> Vector:
        mask = alive.to(vector)
        return mask * product(mask * vector) + decay * vector

    return Scene(
        block=opened.block,
        named=opened.network.named,
        objective=opened.network.given,
        options=opened.network.options,
        optimizer=optimizer,
        changed=opened.network.changed,
        product=CountedMatvec(cleaned),
        matrix=matrix,
        rows=raw.rows,
        dead=opened.dead,
        iterates=iterates,
        batch_rows=opened.network.batch_rows,
        entry_error=lambda: math.inf if matrix is None else error(matrix),
        cache=opened.network.cache,
    )
