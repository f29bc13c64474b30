"""Checkpoints: one reader per format, names matched to a model, optimizer state by parameter."""

from __future__ import annotations

from hessdiag.checkpoint.contents import Checkpoint
from hessdiag.checkpoint.names import Matched, match_weights
from hessdiag.checkpoint.optimizer import OptimizerState, map_optimizer
from hessdiag.checkpoint.read import read_checkpoint

__all__ = [
    "Checkpoint",
    "Matched",
    "OptimizerState",
    "map_optimizer",
    "match_weights",
    "read_checkpoint",
]
