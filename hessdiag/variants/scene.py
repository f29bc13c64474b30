"""What the coordinates of a block are made from, and what their makers return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hessdiag.blocks import Block
from hessdiag.checkpoint.optimizer import OptimizerState
from hessdiag.curvature.objective import Objective
from hessdiag.options import Options
from hessdiag.variants.coordinates import Coordinates
from hessdiag_probes.types import CountedMatvec

Array = NDArray[np.float64]


Iterates = tuple[Callable[[], Mapping[str, Tensor]], ...]
"""Named parameters at each point of a trajectory, in order, as functions that read them."""


class NotApplicable(Exception):
    """Why a variant says nothing about a block; the text becomes its ``skipped``."""


class NotEnoughMemory(NotApplicable):
    """The same for want of memory: another ``--memory-budget`` may do it."""


@dataclass(frozen=True)
class Scene:
    """One block of one network, for those who make coordinates of it.

    The model is on loan: parameters and data are in the working dtype, gradients are off outside
    of :func:`hessdiag.curvature.objective.only`, and everything must be left as it was.

    Attributes:
        block: Whose coordinates are wanted.
        named: Every parameter of the network by its first name.
        objective: Model, loss and batches.
        options: Of the analysis.
        optimizer: State of the checkpoint, or None where it holds none.
        changed: The network is not the checkpoint's own: stored optimizer state is not its.
        product: ``v -> H v`` of the block, dead rows and their columns zeroed, with weight decay
            where that is coupled.
        matrix: The same as a matrix (n, n), float64, where the block is exact, else None.
        rows: ``norm, norm_low, norm_high, diagonal, diagonal_low, diagonal_high`` of raw, (n,)
            each; empty where the probes were left out.
        dead: Which rows are zero or rounding noise, (n,).
        iterates: Of the trajectory; empty without ``--iterates``.
        cache: Shared by all blocks and variants of this network: what was computed once (such as
            activations by layer) is kept here under a key of the maker's own.
        entry_error: Measures a bound of ``|δh_ij| / sqrt(h_ii h_jj)`` of the matrix, where all live
            h_ii are positive; None counts roundoff alone.
        batch_rows: Rows of each of the task's batches, where they were joined into one.
    """

    block: Block
    named: Mapping[str, nn.Parameter]
    objective: Objective
    options: Options
    optimizer: OptimizerState | None
    changed: bool
    product: CountedMatvec
    matrix: Tensor | None
    rows: Mapping[str, Array]
    dead: Tensor
    iterates: Iterates
    cache: dict[str, object]
    batch_rows: tuple[int, ...] = ()
    entry_error: Callable[[], float] | None = None

    @property
    def model(self) -> nn.Module:
        """The network, on loan."""
        return self.objective.model

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the block, in its order."""
        return [self.named[name] for name in self.block.parameters]

    def places(self) -> dict[str, Tensor]:
        """Where each parameter of the block stands in its flattened vector: indices by name."""
        sizes = [parameter.numel() for parameter in self.parameters]
        device = self.parameters[0].device
        return {
            name: torch.arange(end - size, end, device=device)
            for name, size, end in zip(self.block.parameters, sizes, accumulate(sizes), strict=True)
        }


@dataclass(frozen=True)
class Built:
    """Coordinates of a block, and what a reader must know about them.

    Attributes:
        coordinates: P.
        source: What they were made from: ``state``, ``iterates``, ``minibatches``, ``hessian``,
            ``activations``, or None.
        optimizer_class: Whose M it is, or None.
        zero_state: Parameters of the block whose second moment is zero.
        off_diagonality: ``before`` and ``after`` a rotation, or None.
        decoupled: Weight decay acts on z (AdamW); None leaves it to the checkpoint's optimizer.
        notes: For the table.
        diagonal_bound: No diagonal P leaves a smaller kappa than this; None where nothing sharper
            is known than :func:`hessdiag.conditioning.diagonal.diagonal_floor`.
    """

    coordinates: Coordinates
    source: str | None = None
    optimizer_class: str | None = None
    zero_state: int = 0
    off_diagonality: dict[str, float] | None = None
    decoupled: bool | None = None
    notes: tuple[str, ...] = ()
    diagonal_bound: float | None = None


def check_finite(built: Built, like: Tensor) -> None:
    """Refuse coordinates that are not finite.

    Raises:
        ArithmeticError: They are not.
    """
    ones = torch.ones_like(like)
    coordinates = built.coordinates
    sides = (coordinates.apply(ones), coordinates.transposed(ones), coordinates.inverse(ones))
    if not all(bool(torch.isfinite(side).all()) for side in sides):
        raise ArithmeticError(
            "the preconditioner leaves the range of floating point; "
            "multiply the loss by a constant that brings its gradients near 1"
        )


Maker = Callable[[Scene], Built]
"""Makes the coordinates of a block, or raises :class:`NotApplicable`."""
