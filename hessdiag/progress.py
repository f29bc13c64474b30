"""What a long analysis reports while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Progress: ``done`` of ``total`` products of ``block``, or only a ``message``."""

    block: str = ""
    index: int = 0
    count: int = 0
    done: int = 0
    total: int = 0
    message: str = ""


Report = Callable[[Event], None]
