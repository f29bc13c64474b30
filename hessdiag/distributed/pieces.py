"""Which rows of the data each rank has: parts of equal size, cut where the loss allows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hessdiag.data import is_stack, row_count, take, transform

Units = Callable[[Any], float]
EVEN = 1.2  # parts of whole batches so much apart are told


@dataclass(frozen=True)
class Piece:
    """A batch, or some rows of one.

    Attributes:
        batch: With its rows alone.
        share: Of the mean over the dataset.
        rows: Number of rows.
        index: Of the batch.
    """

    batch: Any
    share: float
    rows: int
    index: int


@dataclass(frozen=True)
class Division:
    """The pieces of each rank.

    Attributes:
        pieces: By rank, in the order of the data.
        cut: Indices of the batches that were cut.
        reason: Why they were not, where that leaves ranks with unequal parts; empty otherwise.
    """

    pieces: tuple[tuple[Piece, ...], ...]
    cut: tuple[int, ...] = ()
    reason: str = ""

    @property
    def rows(self) -> list[int]:
        """Of each rank."""
        return [sum(piece.rows for piece in own) for own in self.pieces]


def dealt(items: Sequence[Any], shares: Sequence[float], ranks: int, reason: str) -> Division:
    """Whole batches, the largest first, each to the rank that has least; and why they are whole."""
    whole = [
        Piece(batch, share, row_count(batch), index)
        for index, (batch, share) in enumerate(zip(items, shares, strict=True))
    ]
    owned: list[list[Piece]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for piece in sorted(whole, key=lambda piece: -piece.rows):
        rank = min(range(ranks), key=loads.__getitem__)
        owned[rank].append(piece)
        loads[rank] += piece.rows
    pieces = tuple(tuple(sorted(own, key=lambda piece: piece.index)) for own in owned)
    even = max(loads) <= EVEN * min(loads)
    return Division(pieces, reason="" if even else reason)


def divided(
    items: Sequence[Any], shares: Sequence[float], ranks: int, units: Units | None
) -> Division:
    """Consecutive rows, as many for each rank as for any other but one; batches are cut.

    A piece counts by its own units in its batch's: a mean of means would be another number.

    Args:
        items: The batches.
        shares: Of each in the mean over the dataset.
        ranks: Number of parts.
        units: What a batch's mean is taken over; None where that is not known.
    """
    rows = [row_count(batch) for batch in items]
    total = sum(rows)
    if units is None or not all(is_stack(batch) for batch in items):
        return dealt(items, shares, ranks, "not every tensor of a batch has a row per example")
    ends = [total * rank // ranks for rank in range(1, ranks + 1)]
    parts: list[list[Piece]] = [[] for _ in range(ranks)]
    cut: list[int] = []
    for index, (batch, size) in enumerate(zip(items, rows, strict=True)):
        start = sum(rows[:index])
        inside = [
            (rank, max(low - start, 0), min(high - start, size))
            for rank, (low, high) in enumerate(pairwise([0, *ends]))
            if max(low - start, 0) < min(high - start, size)
        ]
        if len(inside) <= 1:
            for rank, _, _ in inside:
                parts[rank].append(Piece(batch, shares[index], size, index))
            continue
        cut.append(index)
        taken = [(rank, _rows(batch, first, last)) for rank, first, last in inside]
        counts = [float(units(piece)) for _, piece in taken]
        for (rank, piece), count in zip(taken, counts, strict=True):
            if count > 0:
                share = shares[index] * count / sum(counts)
                parts[rank].append(Piece(piece, share, row_count(piece), index))
    return Division(tuple(map(tuple, parts)), cut=tuple(cut))


def _rows(batch: Any, first: int, last: int) -> Any:
    """Some rows, on the storage of all, and leaves as those are."""
    return transform(
        take(batch, slice(first, last)),
        lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad),
    )
