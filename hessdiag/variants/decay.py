"""Whether the checkpoint's optimizer lets weight decay act beside M."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hessdiag.variants.grammar import OPTIMIZERS, RAW

if TYPE_CHECKING:
    from hessdiag.checkpoint.optimizer import OptimizerState

DECOUPLED = "AdamW"


def trained_decoupled(optimizer: OptimizerState | None) -> bool:
    """Whether its decay is no part of the gradient: AdamW's; False where none is known."""
    if optimizer is None:
        return False
    flagged = any(group.get("decoupled_weight_decay") for group in optimizer.groups)
    return optimizer.class_name == DECOUPLED or flagged


def named_decoupled(coordinates: str, trained_by: str | None) -> bool:
    """The same of a variant's coordinates, as far as names tell: all that a stored run holds.

    Args:
        coordinates: An optimizer decays as its name says, any other as the checkpoint's class.
        trained_by: That class, where it is known.
    """
    if coordinates in OPTIMIZERS:
        return coordinates == DECOUPLED.lower()
    return coordinates != RAW and trained_by == DECOUPLED
