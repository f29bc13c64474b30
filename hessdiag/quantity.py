"""A number and its certificate: the one type that carries results from the probes to the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

Status = Literal[
    "exact", "interval", "lower-bound", "upper-bound", "estimate", "unresolved", "zero"
]
STATUSES: tuple[Status, ...] = (
    "exact",
    "interval",
    "lower-bound",
    "upper-bound",
    "estimate",
    "unresolved",
    "zero",
)

ROUNDING = 1e-15  # relative, of a few operations in float64


class QuantityJson(TypedDict):
    """The JSON form of a :class:`Quantity`."""

    value: float | None
    low: float | None
    high: float | None
    status: Status | None
    confidence: float | None


@dataclass(frozen=True, slots=True)
class Quantity:
    """``value`` with the interval ``[low, high]`` that its ``status`` certifies.

    ==============  =============================================================
    status          meaning
    ==============  =============================================================
    ``exact``       all eigenvalues were computed; low and high bound the rounding
    ``interval``    two-sided, at ``confidence``
    ``lower-bound`` the truth is at least ``low``; ``high`` is None
    ``upper-bound`` the truth is at most ``high``; ``low`` is None
    ``estimate``    statistical; low and high are None where no interval exists
    ``unresolved``  could not be determined; ``value`` is None
    ``zero``        undefined because the operator is zero; ``value`` is None
    None            the quantity does not exist here
    ==============  =============================================================

    ``confidence`` is 1.0 for deterministic bounds. No field is ever NaN or infinite.
    """

    value: float | None
    low: float | None
    high: float | None
    status: Status | None
    confidence: float | None

    @classmethod
    def exact(cls, value: float, low: float | None = None, high: float | None = None) -> Quantity:
        """A computed value with its rounding bound (the value itself when none is given)."""
        low = value if low is None else low
        high = value if high is None else high
        if not (math.isfinite(value) and math.isfinite(low) and math.isfinite(high)):
            return cls.unresolved()
        return cls(value, min(low, value), max(high, value), "exact", 1.0)

    @classmethod
    def interval(cls, value: float, low: float, high: float, confidence: float) -> Quantity:
        """A two-sided interval at ``confidence``."""
        if not (math.isfinite(value) and math.isfinite(low) and math.isfinite(high)):
            return cls.unresolved()
        return cls(value, min(low, value), max(high, value), "interval", confidence)

    @classmethod
    def lower_bound(cls, low: float, confidence: float = 1.0) -> Quantity:
        """The truth is at least ``low``."""
        if not math.isfinite(low):
            return cls.unresolved()
        return cls(low, low, None, "lower-bound", confidence)

    @classmethod
    def upper_bound(cls, high: float, confidence: float = 1.0) -> Quantity:
        """The truth is at most ``high``."""
        if not math.isfinite(high):
            return cls.unresolved()
        return cls(high, None, high, "upper-bound", confidence)

    @classmethod
    def estimate(
        cls,
        value: float,
        low: float | None = None,
        high: float | None = None,
        confidence: float | None = None,
    ) -> Quantity:
        """A statistical estimate; without an interval it ranks but certifies nothing."""
        if not math.isfinite(value):
            return cls.unresolved()
        if not all(math.isfinite(bound) for bound in (low, high) if bound is not None):
            return cls(value, None, None, "estimate", None)
        return cls(value, low, high, "estimate", confidence)

    @classmethod
    def unresolved(cls) -> Quantity:
        """The method could not determine the quantity; the reason stands in the notes."""
        return cls(None, None, None, "unresolved", None)

    @classmethod
    def zero(cls) -> Quantity:
        """The operator is zero, so the quantity has no value."""
        return cls(None, None, None, "zero", None)

    @classmethod
    def absent(cls) -> Quantity:
        """The quantity does not exist for this block."""
        return cls(None, None, None, None, None)

    def increasing(self, function: Callable[[float], float], *, most: float = math.inf) -> Quantity:
        """The quantity under an increasing, nonnegative ``function`` that never exceeds ``most``.

        The certificate carries over, widened by what rounding does to the function itself.
        """

        def image(number: float | None, factor: float) -> float | None:
            return None if number is None else min(function(number) * factor, most)

        return replace(
            self,
            value=image(self.value, 1.0),
            low=image(self.low, 1.0 - ROUNDING),
            high=image(self.high, 1.0 + ROUNDING),
        )

    def without_exactness(self) -> Quantity:
        """The same bounds, claimed as an interval only."""
        return replace(self, status="interval") if self.status == "exact" else self

    def to_json(self) -> QuantityJson:
        """The five fields, in the order of the contract."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "status": self.status,
            "confidence": self.confidence,
        }
