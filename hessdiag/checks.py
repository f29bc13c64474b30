"""What the self-checks found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One check's outcome: passed when ``value <= limit``."""

    value: float
    limit: float
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class SelfChecks:
    """All of them, always reported.

    ``slope`` (of the loss along the gradient's claim), ``symmetry``, ``difference`` and
    ``repeatability`` are relative errors; ``hidden_casts`` maps each place that leaves the working
    precision to the narrower type.
    """

    slope: Check
    symmetry: Check
    difference: Check
    repeatability: Check
    hidden_casts: dict[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries for the provenance."""
        return asdict(self) | {"notices": list(self.notices)}
