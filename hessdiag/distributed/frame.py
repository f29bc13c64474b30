"""What every collective of a group begins with: the same number of numbers, whatever it is about.

A rank that failed, or went another way, can so always be heard: all ranks first sum one *frame*
of a fixed length, which holds what each is at and the head of the vector; what does not fit
follows only if all agree.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag_probes.types import Vector

HEAD = 1024
"""Numbers of a vector that its frame carries: most of them need no second collective."""
SLOTS = 5  # numbers of each rank: state, operation, checksum, value, clock
WORKING, FAILED = 0.0, 1.0
EXACT = 2**53  # integers below are exact in float64
COLUMNS = 4096  # of a vector that is hashed
STRIDE = 0x1E3779B97F4A7C15  # times the place of a number, an odd weight of its own


@dataclass(frozen=True)
class Frame:
    """What the ranks said, (size,) each.

    Attributes:
        state: ``WORKING`` or ``FAILED``.
        operation: What each is at, hashed.
        checksum: Of its argument, 0 where there is none.
        value: A number of each.
        late: Whether the time was up on rank 0.
        head: The sum of the heads of the vectors, (HEAD,).
    """

    state: list[float]
    operation: list[float]
    checksum: list[float]
    value: list[float]
    late: bool
    head: Tensor

    @property
    def failed(self) -> list[int]:
        """Ranks that failed."""
        return [rank for rank, state in enumerate(self.state) if state != WORKING]


def packed(
    rank: int,
    size: int,
    *,
    state: float,
    operation: float,
    checksum: float,
    value: float,
    late: bool,
    head: Tensor | None,
    device: torch.device,
) -> Tensor:
    """The numbers that one rank adds to the frame, (SLOTS size + HEAD,), float64."""
    numbers = torch.zeros(SLOTS * size + HEAD, dtype=torch.float64, device=device)
    own = torch.tensor(
        [state, operation, checksum, value, float(late)], dtype=torch.float64, device=device
    )
    numbers[SLOTS * rank : SLOTS * (rank + 1)] = own
    if head is not None:
        numbers[SLOTS * size : SLOTS * size + head.numel()] = head
    return numbers


def unpacked(numbers: Tensor, size: int) -> Frame:
    """The frame from the sum of the ranks' numbers."""
    slots = numbers[: SLOTS * size].view(size, SLOTS).T.tolist()
    state, operation, checksum, value, late = slots
    return Frame(state, operation, checksum, value, bool(late[0]), numbers[SLOTS * size :])


def operation_code(*what: object) -> float:
    """A number for what a rank is at; other words, another number."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    return float(int.from_bytes(digest[:8], "big") % EXACT)


def checksum(vector: Vector) -> float:
    """A hash of a vector's bits, order included, that float64 holds exactly.

    Laid out in rows, every column is summed as integers, and every row as numbers: no bit that
    differs and no two numbers that changed places are missed, nor are signs, which whole columns
    of integers may lose.

    Cost:
        Two sums over n numbers, and one look at the device.
    """
    flat = vector.detach().contiguous()
    whole = flat.numel() // COLUMNS * COLUMNS
    bits = flat.view(torch.int64 if flat.dtype == torch.float64 else torch.int32)
    parts = [bits[whole:].to(torch.int64)]
    if whole:
        parts.append(bits[:whole].view(-1, COLUMNS).sum(dim=0, dtype=torch.int64))
        rows = flat[:whole].view(-1, COLUMNS).sum(dim=1)
        parts.append(rows.view(bits.dtype).to(torch.int64))
    found = torch.cat(parts)
    places = torch.arange(1, found.numel() + 1, dtype=torch.int64, device=found.device)
    mixed = (found ^ (found >> 29) ^ places) * ((places * STRIDE) | 1)
    return float(int((mixed ^ (mixed >> 32)).sum()) % EXACT)
