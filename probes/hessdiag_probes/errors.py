"""What the estimators raise beside ``ValueError``: numbers that cannot be worked with."""

from __future__ import annotations


class Breakdown(ArithmeticError):
    """An operator, a matrix or a start vector holds numbers that no estimate can be built on."""
