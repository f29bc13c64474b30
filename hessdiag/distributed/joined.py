"""Several processes as one: the protocol, on top of whatever carries numbers between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hessdiag.distributed.failures import Failure, is_known, make_known
from hessdiag.distributed.frame import (
    FAILED,
    HEAD,
    WORKING,
    Frame,
    checksum,
    operation_code,
    packed,
    unpacked,
)
from hessdiag.distributed.group import Ended
from hessdiag.errors import Diverged, HessdiagError, InputError
from hessdiag_probes.types import Vector

T = TypeVar("T")
DRIFT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Differences between the ranks' arguments that are rounding, relative to the largest entry."""


class Lost(Exception):
    """A transport cannot reach some rank."""


class Transport(Protocol):
    """What carries numbers and objects between the ranks.

    Attributes:
        rank: Of this process.
        size: Number of processes.
        device: Where the numbers that it carries live.
        name: For the record.
    """

    rank: int
    size: int
    device: torch.device
    name: str

    def add(self, numbers: Tensor) -> None:
        """Put the sum over all ranks in the place of the numbers, the same bits everywhere."""
        ...

    def gather(self, item: Any) -> list[Any]:
        """The items of all ranks."""
        ...

    def from_first(self, item: Any) -> Any:
        """The item of rank 0."""
        ...

    def lost(self) -> HessdiagError:
        """What the user is told when some rank cannot be reached."""
        ...

    def sharing(self, device: str) -> int:
        """How many ranks share the memory of this rank's device."""
        ...


class Joined:
    """The group of the ranks of a transport; see :class:`hessdiag.distributed.group.Group`.

    Attributes:
        drifted: Sums whose arguments differed by rounding from rank to rank.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.rank = transport.rank
        self.size = transport.size
        self.drifted = 0
        self._ended: Ended | None = None
        self._deadline: float | None = None
        self._late = False
        self._heard = False  # whether a frame came since the clock was last asked for

    def summed(self, part: Callable[[], Vector], argument: Vector | None = None) -> Vector:
        """The sum of the ranks' parts, in float64; the same bits on every rank."""
        self._check()
        mine: Vector | None = None
        failure: Exception | None = None
        try:
            mine = part()
        except Exception as error:
            failure = error
        with _plain():
            if mine is None:
                frame = self._frame("failed", failure=failure)
                raise self._failure(frame, failure, where=None)
            wide = mine.detach().to(self.transport.device, torch.float64, copy=True)
            about = 0.0 if argument is None else checksum(argument)
            frame = self._frame("sum", wide.numel(), head=wide[:HEAD], about=about)
            if frame.failed:
                raise self._failure(frame, None, where=None)
            if argument is not None and len(set(frame.checksum)) > 1:
                self._check_drift(argument, frame)
            if wide.numel() > HEAD:
                self._carry(lambda: self.transport.add(wide[HEAD:]))
            wide[:HEAD] = frame.head[: wide.numel()]
            return wide.to(mine.device, mine.dtype)

    def agreed(self, value: float, choose: Callable[[Sequence[float]], float] = min) -> float:
        """One of the ranks' values, the same on all of them."""
        with _plain():
            return choose(self._met("agree", value=float(value)).value)

    def late(self, deadline: float | None) -> bool:
        """Whether the deadline has passed on rank 0.

        The last collective said so already, if there was one since this was asked last.
        """
        if deadline is None:
            return False
        if deadline != self._deadline:
            self._deadline, self._heard = deadline, False
        if not self._heard:
            with _plain():
                self._met("clock")
        self._heard = False
        return self._late

    def first(self, work: Callable[[], T]) -> T:
        """What rank 0 makes of ``work``."""
        self._check()
        result: Any = None
        failure: Exception | None = None
        if self.rank == 0:
            try:
                result = work()
            except Exception as error:
                failure = error
        with _plain():
            if failure is not None:
                raise self._failure(self._frame("failed", failure=failure), failure, where=None)
            frame = self._frame("first")
            if frame.failed:
                raise self._failure(frame, None, where=None)
            carried: T = self._carry(lambda: self.transport.from_first(result))
            return result if self.rank == 0 else carried

    def told(self, error: Exception, where: str) -> Exception:
        """What the failure is on every rank; raised where another handler is meant."""
        if not is_known(error):
            with _plain():
                error = self._failure(self._frame("failed", failure=error), error, where=where)
        meant = getattr(error, "where", None)
        if meant not in (None, where):
            raise error
        return error

    def same(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on where a fact is another one on some rank."""
        with _plain():
            self._met("compare")
            every = self._carry(lambda: self.transport.gather(dict(facts)))
        differing = {
            name: [rank for rank in range(self.size) if every[rank].get(name) != fact]
            for name, fact in every[0].items()
        }
        found = [f"{name} on {_ranks(ranks)}" for name, ranks in differing.items() if ranks]
        if found:
            raise make_known(
                InputError(
                    f"the processes do not analyse the same thing: unlike rank 0 is the "
                    f"{'; the '.join(found)}. Give every process the same files and the same "
                    "command, and a task whose data do not depend on the process"
                )
            )

    def end(self) -> None:
        """Wait for all ranks, so that none leaves while another still needs it."""
        with _plain():
            self._met("end")

    def share_of(self, memory: int, *, device: str) -> int:
        """Its part of the device's memory."""
        return memory // self.transport.sharing(device)

    def record(self) -> dict[str, Any] | None:
        """For the provenance."""
        return {
            "world_size": self.size,
            "backend": self.transport.name,
            "drifted_products": self.drifted,
        }

    def _met(self, operation: str, *, value: float = 0.0) -> Frame:
        """A frame in which nobody failed."""
        frame = self._frame(operation, value=value)
        if frame.failed:
            raise self._failure(frame, None, where=None)
        return frame

    def _check(self) -> None:
        if self._ended is not None:
            raise self._ended

    def _frame(
        self,
        operation: str,
        length: int = 0,
        *,
        head: Tensor | None = None,
        about: float = 0.0,
        value: float = 0.0,
        failure: Exception | None = None,
    ) -> Frame:
        """Say what this rank is at, and hear the others.

        Raises:
            Ended: A rank is lost, or is at something else.
        """
        self._check()
        now_late = self._deadline is not None and time.monotonic() >= self._deadline
        numbers = packed(
            self.rank,
            self.size,
            state=WORKING if failure is None else FAILED,
            operation=operation_code(operation, length),
            checksum=about,
            value=value,
            late=now_late,
            head=head,
            device=self.transport.device,
        )
        self._carry(lambda: self.transport.add(numbers))
        frame = unpacked(numbers, self.size)
        self._late, self._heard = frame.late, True
        if not frame.failed and len(set(frame.operation)) > 1:
            raise self._end(_another_way(frame))
        return frame

    def _failure(self, frame: Frame, own: Exception | None, *, where: str | None) -> Exception:
        """The failure that all ranks take for their own: the first one's."""
        mine = None if own is None else Failure.of(own, where)
        every = self._carry(lambda: self.transport.gather(mine))
        teller = frame.failed[0]
        failure: Failure = every[teller]
        error = failure.error(None if len(frame.failed) == self.size else teller)
        error.__cause__ = own
        return error

    def _check_drift(self, argument: Vector, frame: Frame) -> None:
        """Let rounding pass, and nothing else.

        Raises:
            Ended: Arguments differ by more.
        """
        self.drifted += 1
        wide = argument.detach().to(self.transport.device, torch.float64, copy=True)
        same = wide if self.rank == 0 else torch.zeros_like(wide)
        same = same.clone()
        self._carry(lambda: self.transport.add(same))
        scale = float(same.abs().max())
        apart = float((wide - same).abs().max()) / scale if scale > 0 else float(wide.any())
        drifts = self._met("drift", value=apart).value
        limit = DRIFT[argument.dtype]
        wrong = [rank for rank, drift in enumerate(drifts) if not drift <= limit]
        if wrong:
            raise self._end(_diverged(wrong, max(drifts)))

    def _carry(self, carry: Callable[[], T]) -> T:
        self._check()
        try:
            return carry()
        except Lost as error:
            raise self._end(self.transport.lost()) from error

    def _end(self, error: HessdiagError) -> Ended:
        self._ended = Ended(error)
        return self._ended


def _plain() -> AbstractContextManager[Any]:
    """Collectives are no part of what is being watched or rounded."""
    return _disable_current_modes()


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _another_way(frame: Frame) -> Diverged:
    most = max(frame.operation, key=frame.operation.count)
    others = [rank for rank, code in enumerate(frame.operation) if code != most]
    return Diverged(
        f"the processes took different ways: {_ranks(others)} did not do what the others did, "
        "so their parts do not belong together. The model, the task or a package behaves "
        "differently there; use the same machines, versions and files for all ranks, or analyse "
        "with one process"
    )


def _diverged(ranks: Sequence[int], drift: float) -> Diverged:
    return Diverged(
        f"the processes diverged: what {_ranks(ranks)} multiplied differs from rank 0's by "
        f"{drift:.1e} relative, so the sum would be a wrong number. Something there is not "
        "deterministic or not the same (model code that draws random numbers, other versions, "
        "another kind of device); use the same for all ranks, or analyse with one process"
    )
