"""Where the vectors of a Krylov space are kept, and in how many digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessdiag_probes.types import Vector

CONVERTED = 1 << 22
"""Numbers of a narrow basis that are widened at a time."""


@dataclass(frozen=True, slots=True)
class Share:
    """The entries ``first`` to ``last - 1`` of every vector: what one of several processes keeps.

    All processes make the same calls with the same vectors, and get the same results.

    Attributes:
        first: Of this process.
        last: One past the end.
        reduce: ``tensor -> its sum over the processes``, the same bits on all of them.
        gather: ``this process's entries of a vector -> the whole vector``.
    """

    first: int
    last: int
    reduce: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Storage:
    """How a basis is kept; None each means as the vectors themselves are.

    Attributes:
        device: "cpu" for vectors whose own device lacks the memory.
        dtype: ``torch.float32`` halves the memory of float64 vectors. Each basis vector is then a
            rounded one, and what the rounding does to a result is measured, not assumed.
        share: What this process keeps of every vector.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    share: Share | None = None


AS_IT_IS = Storage()


@dataclass(slots=True)
class Basis:
    """Vectors ``q_1`` to ``q_k`` in some storage, nearly orthonormal, ``Qᵀ`` by rows.

    Attributes:
        like: An empty vector in the dtype and on the device of those that go in and come out.
        size: ``n``.
        rows: What is kept, ``(capacity, n)`` or this process's part of it.
        share: This process's part, or None for all.
        count: ``k``.
    """

    like: Tensor
    size: int
    rows: Tensor
    share: Share | None
    count: int = field(default=0)

    @classmethod
    def empty(cls, capacity: int, like: Vector, storage: Storage = AS_IT_IS) -> Basis:
        """Room for ``capacity`` vectors like ``like``.

        Raises:
            ValueError: The storage holds no such vectors.
        """
        share, size = storage.share, like.numel()
        if share is not None and not 0 <= share.first <= share.last <= size:
            raise ValueError(
                f"the share {share.first}..{share.last} is no part of vectors of {size} numbers"
            )
        dtype = like.dtype if storage.dtype is None else storage.dtype
        if not dtype.is_floating_point or dtype.itemsize < torch.float32.itemsize:
            raise ValueError(f"a basis in {dtype}; keep it in float64 or float32")
        device = like.device if storage.device is None else torch.device(storage.device)
        width = size if share is None else share.last - share.first
        kept = torch.empty(capacity, width, dtype=dtype, device=device)
        return cls(like=like.new_empty(0), size=size, rows=kept, share=share)

    def __len__(self) -> int:
        return self.count

    @property
    def narrow(self) -> bool:
        """Whether vectors lose digits when they are kept."""
        return self.rows.dtype.itemsize < self.like.dtype.itemsize

    @property
    def eps(self) -> float:
        """Unit roundoff of the vectors as they are kept."""
        wide = max(torch.finfo(kind).eps for kind in (self.rows.dtype, self.like.dtype))
        return float(wide)

    @property
    def on_device(self) -> bool:
        """Whether all of it lies where the vectors do, in their dtype: plain products will do."""
        kept = self.rows
        same = kept.device == self.like.device and kept.dtype == self.like.dtype
        return same and self.share is None

    def append(self, vector: Vector) -> None:
        """Keep one vector more, rounded where the storage is narrow."""
        self.rows[self.count] = self._mine(vector)
        self.count += 1

    def vector(self, index: int) -> Vector:
        """``q_(index + 1)`` as it is kept."""
        return self._whole(self.rows[index])

    def coefficients(self, vector: Vector) -> Tensor:
        """``Qᵀ v``, shape ``(k,)``, in the dtype and on the device of ``v``."""
        kept = self.rows[: self.count]
        if self.on_device:
            return kept @ vector
        mine = self._mine(vector, dtype=self.like.dtype)
        if kept.dtype == mine.dtype:
            found = kept @ mine
        else:
            found = torch.zeros(self.count, dtype=mine.dtype, device=mine.device)
            for part in self._parts():
                found += kept[:, part].to(mine.dtype) @ mine[part]
        found = found.to(self.like.device)
        return found if self.share is None else self.share.reduce(found)

    def combination(self, coefficients: Tensor) -> Vector:
        """``Q c`` for ``c`` of shape ``(k,)``, or of ``(k, m)`` for ``m`` columns at once."""
        kept = self.rows[: self.count]
        if self.on_device:
            return kept.T @ coefficients
        inside = coefficients.to(device=kept.device, dtype=self.like.dtype)
        if kept.dtype == inside.dtype:
            return self._whole(kept.T @ inside)
        made = inside.new_empty(kept.shape[1], *inside.shape[1:])
        for part in self._parts():
            made[part] = kept[:, part].to(inside.dtype).T @ inside
        return self._whole(made)

    def dense(self) -> Tensor:
        """``Qᵀ``, shape ``(k, n)``, in the dtype and on the device of the vectors.

        Cost:
            As kept, no copy; in any other storage the memory that it was to save.
        """
        if self.on_device:
            return self.rows[: self.count]
        if self.count == 0:
            return self.like.new_empty(0, self.size)
        return torch.stack([self.vector(index) for index in range(self.count)])

    def drop(self, count: int) -> None:
        """Forget all vectors but the first ``count``."""
        self.count = min(self.count, count)

    def _mine(self, vector: Vector, dtype: torch.dtype | None = None) -> Tensor:
        """This process's part of a vector, where and as it is kept."""
        part = vector if self.share is None else vector[self.share.first : self.share.last]
        return part.to(device=self.rows.device, dtype=self.rows.dtype if dtype is None else dtype)

    def _whole(self, part: Tensor) -> Tensor:
        """A vector again from this process's part of it."""
        mine = part.to(device=self.like.device, dtype=self.like.dtype)
        if self.share is None:
            return mine
        if mine.ndim == 1:
            return self.share.gather(mine)
        return torch.stack([self.share.gather(column) for column in mine.T], dim=1)

    def _parts(self) -> list[slice]:
        width = self.rows.shape[1]
        step = max(CONVERTED // max(self.count, 1), 1)
        return [slice(start, start + step) for start in range(0, width, step)]
