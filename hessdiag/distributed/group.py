"""The processes of one analysis: which of them does what, and how their parts become one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from hessdiag.errors import HessdiagError
from hessdiag_probes.types import Vector

T = TypeVar("T")


class Ended(BaseException):
    """The group cannot go on; nothing on the way out may take it for the failure of a row.

    Attributes:
        error: What the user is told.
    """

    def __init__(self, error: HessdiagError) -> None:
        super().__init__(str(error))
        self.error = error


class Group(Protocol):
    """The processes (ranks) that share the data of an analysis; each runs the same program.

    Every method but the properties, :meth:`share_of` and :meth:`record` is a collective: all
    ranks must call it at the same place of the program. Where they do not, all of them end with
    an error.
    """

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def summed(self, part: Callable[[], Vector], argument: Vector | None = None) -> Vector:
        """The sum over all ranks of what ``part`` returns on each; the same bits on every rank.

        Args:
            part: This rank's share of the work; it talks to no other rank.
            argument: What it is a function of, which must be the same on every rank; or None.
        Raises:
            Exception: ``part`` raised on some rank; every rank then raises the same.
            Ended: A rank was lost, or its argument differs by more than rounding.
        """
        ...

    def agreed(self, value: float, choose: Callable[[Sequence[float]], float] = min) -> float:
        """One of the ranks' values, by default the least, the same on all of them.

        For every decision that rests on a clock or on free memory, and that the number of
        products depends on.
        """
        ...

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on rank 0, which alone does it; what it raises, all ranks raise."""
        ...

    def told(self, error: Exception, where: str) -> Exception:
        """What a failure that is about to be swallowed at ``where`` is on every rank.

        A failure that all ranks know of already is returned as it is. One of this rank alone
        ends, on all others, what they are at; there it arrives at the handler of the same name.

        Args:
            error: That was caught.
            where: The handler.
        Raises:
            Exception: The failure belongs to a handler further out.
        """
        ...

    def late(self, deadline: float | None) -> bool:
        """Whether ``deadline``, of ``time.monotonic()``, has passed on rank 0."""
        ...

    def same(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on where a fact is another one on some rank.

        Raises:
            InputError: The message names facts and ranks.
        """
        ...

    def share_of(self, memory: int, *, device: str) -> int:
        """How much of the free memory of a device falls to this rank."""
        ...

    def record(self) -> dict[str, Any] | None:
        """For the provenance; None of one process."""
        ...


class Alone:
    """One process: it does everything, and talks to nobody."""

    rank = 0
    size = 1

    def summed(self, part: Callable[[], Vector], argument: Vector | None = None) -> Vector:
        """What ``part`` returns."""
        del argument
        return part()

    def agreed(self, value: float, choose: Callable[[Sequence[float]], float] = min) -> float:
        """``value``."""
        return choose((value,))

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns."""
        return work()

    def told(self, error: Exception, where: str) -> Exception:
        """``error``."""
        del where
        return error

    def late(self, deadline: float | None) -> bool:
        """Whether ``deadline`` has passed."""
        return deadline is not None and time.monotonic() >= deadline

    def same(self, facts: Mapping[str, Any]) -> None:
        """Nothing can differ."""

    def share_of(self, memory: int, *, device: str) -> int:
        """All of it."""
        del device
        return memory

    def record(self) -> dict[str, Any] | None:
        """Nothing."""
        return None
