"""Numbers and objects carried by torch.distributed, and who of the ranks is still there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hessdiag.distributed.joined import Lost
from hessdiag.errors import HessdiagError, OutOfResources

T = TypeVar("T")
PATIENCE = 1.0  # seconds until a process that ends is seen to have ended
LEFT = "hessdiag left"  # key of the store, by rank


@dataclass(frozen=True)
class Peer:
    """Where a rank runs."""

    host: str
    process: int


CURRENT: list[TorchTransport] = []
"""Of the group that this process is in, if any: whom a signal handler can still ask."""


class TorchTransport:
    """A process group of torch.distributed: gloo on the CPU, NCCL on CUDA.

    Attributes:
        rank: Of this process.
        size: Number of processes.
        device: Where the numbers that it carries live.
        name: Of the backend.
        peers: All ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.name = str(dist.get_backend(group))
        on_gpu = "nccl" in self.name
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else _CPU
        self.peers: list[Peer] = self.gather(Peer(socket.gethostname(), os.getpid()))
        CURRENT[:] = [self]

    def add(self, numbers: Tensor) -> None:
        """One all-reduce; every rank gets the bits that one of them summed."""
        _carried(lambda: dist.all_reduce(numbers, group=self.group))

    def gather(self, item: Any) -> list[Any]:
        """The items of all ranks."""
        found: list[Any] = [None] * self.size
        _carried(lambda: dist.all_gather_object(found, item, group=self.group))
        return found

    def from_first(self, item: Any) -> Any:
        """The item of rank 0."""
        held = [item]
        source = dist.get_global_rank(self.group, 0)
        _carried(lambda: dist.broadcast_object_list(held, src=source, group=self.group))
        return held[0]

    def lost(self) -> HessdiagError:
        """Who is gone, as far as this machine can tell."""
        until = time.monotonic() + PATIENCE
        while not (found := self.gone()) and time.monotonic() < until:
            time.sleep(0.02)
        return self.lost_error(found)

    def leave(self) -> None:
        """Leave word that this rank ends of its own accord."""
        with suppress(Exception):  # the store may be gone with the rank that held it
            _store().set(f"{LEFT}/{self.rank}", "1")

    def close(self) -> None:
        """Free the group, once no rank needs another any more."""
        CURRENT.clear()
        dist.destroy_process_group(self.group)

    def gone(self) -> dict[int, bool]:
        """Ranks that have ended, or left word that they do; True where they left none.

        Those on other machines cannot be seen to end.
        """
        host, found = self.peers[self.rank].host, {}
        for rank, peer in enumerate(self.peers):
            ended = peer.host == host and not is_running(peer.process)
            left = self._left(rank)
            if rank != self.rank and (ended or left):
                found[rank] = not left
        return found

    def lost_error(self, gone: Mapping[int, bool]) -> OutOfResources:
        """What the user is told when ranks do not answer, of which these have ended."""
        lost = [rank for rank, killed in gone.items() if killed]
        own = self.peers[self.rank].host
        elsewhere = sorted({peer.host for peer in self.peers} - {own})
        if lost:
            who = f"{_named(lost)} lost (killed, or out of memory?)"
        elif gone:
            who = f"{_named(list(gone))} stopped"
        else:
            who = " on ".join(["a rank was lost", *filter(None, [", ".join(elsewhere)])])
        return OutOfResources(
            f"{who}, so the analysis ends; the same command, with any number of processes, resumes"
        )

    def speaks(self) -> bool:
        """Whether this rank tells the user of a lost one: the first of those that are left here."""
        host = self.peers[self.rank].host
        below = {rank for rank in range(self.rank) if self.peers[rank].host == host}
        return below <= self.gone().keys()

    def _left(self, rank: int) -> bool:
        with suppress(Exception):
            return bool(_store().check([f"{LEFT}/{rank}"]))
        return False

    def sharing(self, device: str) -> int:
        """Ranks on this machine share its memory; each has a GPU of its own."""
        if device == "cuda":
            return 1
        own = self.peers[self.rank].host
        return sum(peer.host == own for peer in self.peers)


_CPU = torch.device("cpu")


def _carried(carry: Callable[[], T]) -> T:
    try:
        return carry()
    except (RuntimeError, OSError, EOFError) as error:  # what the backends raise has no type
        raise Lost(str(error)) from error


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _named(ranks: Sequence[int]) -> str:
    names = " and ".join(f"rank {rank}" for rank in ranks)
    return f"{names} {'was' if len(ranks) == 1 else 'were'}"


def is_running(process: int) -> bool:
    """Whether a process of this machine still runs; one that nobody has reaped yet does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # no such file system; or it went a moment ago
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
