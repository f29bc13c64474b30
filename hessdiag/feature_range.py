"""The range of each feature of a layer's inputs, and what a change does to it."""

from __future__ import annotations

import torch
from torch import Tensor


class Range:
    """The least and the largest entry of each feature; (features,) each, on the CPU."""

    def __init__(self) -> None:
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """More inputs, (positions, features), one at least."""
        low, high = rows.aminmax(dim=0)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    @property
    def finite(self) -> bool:
        """Whether all entries are."""
        return bool(self.low.isfinite().all() and self.high.isfinite().all())

    @property
    def low(self) -> Tensor:
        """The least."""
        return _known(self._low)

    @property
    def high(self) -> Tensor:
        """The largest."""
        return _known(self._high)

    @property
    def peak(self) -> Tensor:
        """The largest magnitude."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def constant(self, tolerance: float) -> Tensor:
        """Which features vary by no more than ``tolerance`` of their peak."""
        return self.high - self.low <= tolerance * self.peak


def stretch(given: Range, changed: Range) -> Tensor:
    """By how much an affine change stretches each feature, (features,); 0 where it is constant."""
    before, after = given.high - given.low, changed.high - changed.low
    return torch.where(before > 0, after / before, torch.zeros_like(before))


def _known(value: Tensor | None) -> Tensor:
    return torch.zeros(0, dtype=torch.float64) if value is None else value.cpu()
