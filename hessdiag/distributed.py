"""The processes of one analysis: which of them does what, and how their parts become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hessdiag_probes.types import Vector


class Group(Protocol):
    """The processes (ranks) that share the data of an analysis; each runs the same program."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def summed(self, part: Callable[[], Vector], argument: Vector | None) -> Vector:
        """The sum over all ranks of what ``part`` returns on each; the same bits on every rank.

        Args:
            part: This rank's share of the work; it talks to no other rank.
            argument: What it is a function of, which must be the same on every rank; or None.
        """
        ...


class Alone:
    """One process: it does everything, and talks to nobody."""

    rank = 0
    size = 1

    def summed(self, part: Callable[[], Vector], argument: Vector | None = None) -> Vector:
        """What ``part`` returns."""
        del argument
        return part()
