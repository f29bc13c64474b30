"""What is stored of an analysis by several processes: rank 0 reads and writes, the others hear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from hessdiag.distributed.group import Group
from hessdiag.finished import FinishedRows
from hessdiag.resume import Begun
from hessdiag.run import Run
from hessdiag.store.journal import Journal
from hessdiag.store.parts import Finished


class SharedJournal(Journal):
    """The journal of a group: rank 0's own, and what the others know of it.

    Attributes:
        group: Whose it is.
        own: The journal; None but on rank 0.
    """

    def __init__(self, group: Group, own: Journal | None, finished: FinishedRows) -> None:
        self.group = group
        self.own = own
        self.finished = dict(finished)

    def add(self, done: Finished) -> None:
        """Keep one finished (block, variant)."""
        self.group.first(lambda: self._there().add(done))
        self.finished[done.block.name, done.variant] = done

    def keep_matrix(self, matrix: NDArray[Any]) -> None:
        """Keep the matrix of the whole network."""
        self.group.first(lambda: self._there().keep_matrix(matrix))

    def load_matrix(self, size: int) -> NDArray[Any] | None:
        """The matrix of the whole network, or None."""
        return self.group.first(lambda: self._there().load_matrix(size))

    def finish(self, run: Run, *, force: bool, keep_matrix: bool) -> list[str]:
        """Write the run."""
        return self.group.first(
            lambda: self._there().finish(run, force=force, keep_matrix=keep_matrix)
        )

    def kept(self) -> str | None:
        """What an interrupted user must know; of rank 0 alone."""
        return None if self.own is None else self.own.kept()

    def release(self) -> None:
        """Free the lock, which rank 0 holds."""
        if self.own is not None:
            self.own.release()

    def _there(self) -> Journal:
        if self.own is None:
            raise RuntimeError("only rank 0 writes")
        return self.own


def begin_together(group: Group, begin: Callable[[], Begun]) -> Begun:
    """Where the analysis starts, as rank 0 finds it."""
    if group.size == 1:
        return begin()
    found: list[Begun] = []

    def look() -> tuple[Run | None, FinishedRows, bool, bool]:
        begun = begin()
        found.append(begun)
        return begun.run, begun.finished, begun.journal is not None, begun.replace

    run, finished, writes, replace = group.first(look)
    own = found[0].journal if found else None
    journal = SharedJournal(group, own, finished) if writes else None
    return Begun(run, finished, journal, replace)
