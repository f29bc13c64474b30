"""Whether the checkpoint's optimizer lets weight decay act beside M."""

from __future__ import annotations

from hessdiag.checkpoint.optimizer import OptimizerState


def trained_decoupled(optimizer: OptimizerState | None) -> bool:
    """Whether its decay is no part of the gradient: AdamW's; False where none is known."""
    if optimizer is None:
        return False
    flagged = any(group.get("decoupled_weight_decay") for group in optimizer.groups)
    return optimizer.class_name == "AdamW" or flagged
