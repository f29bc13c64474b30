"""Small networks on real handwritten digits, so that every command has something to work on."""

from __future__ import annotations

from hessdiag.demos.handwriting import digits
from hessdiag.demos.tasks import DEMOS, demo_task
from hessdiag.demos.training import Trained, train

__all__ = ["DEMOS", "Trained", "demo_task", "digits", "train"]
