"""Ranks of an analysis without processes: one at a time, or as threads that wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from hessdiag.distributed import Alone
from hessdiag.distributed.group import Ended
from hessdiag.distributed.joined import Joined, Lost
from hessdiag.errors import OutOfResources


class Apart(Alone):
    """One of several ranks, which hears nothing of the others: its sums are its own parts."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


class InTurn(Alone):
    """All ranks, one after the other: a sum is over what each of them has as its part."""

    def __init__(self, size: int) -> None:
        self.rank = 0
        self.size = size

    def summed(self, part, argument=None):
        del argument
        parts = []
        for rank in range(self.size):
            self.rank = rank
            parts.append(part())
        self.rank = 0
        return sum(parts)


class Meeting:
    """Where threads meet: each waits until all have brought their item of this round."""

    def __init__(self, size: int, seconds: float = 10.0) -> None:
        self.size = size
        self.seconds = seconds
        self.rounds: list[dict[int, Any]] = []
        self.at = [0] * size
        self.left: set[int] = set()
        self.news = threading.Condition()

    def exchange(self, rank: int, item: Any) -> list[Any]:
        """The items of all, by rank.

        Raises:
            Lost: One has left and will not bring any.
        """
        with self.news:
            number = self.at[rank]
            self.at[rank] += 1
            if number == len(self.rounds):
                self.rounds.append({})
            brought = self.rounds[number]
            brought[rank] = item
            self.news.notify_all()
            complete = self.news.wait_for(
                lambda: len(brought) == self.size or self.left - brought.keys(), self.seconds
            )
            if not complete or len(brought) < self.size:
                raise Lost("a thread did not come")
            return [brought[each] for each in range(self.size)]

    def leave(self, rank: int) -> None:
        """Bring nothing any more."""
        with self.news:
            self.left.add(rank)
            self.news.notify_all()


class Threads:
    """A transport between the threads of one process."""

    device = torch.device("cpu")
    name = "threads"

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting = meeting
        self.rank = rank
        self.size = meeting.size
        self.added: list[int] = []

    def add(self, numbers):
        """Sum in the order of the ranks, and remember how many numbers there were."""
        self.added.append(numbers.numel())
        found = self.meeting.exchange(self.rank, numbers.clone())
        assert len({tensor.shape for tensor in found}) == 1, "collectives do not fit together"
        numbers.copy_(sum(found))

    def gather(self, item):
        return self.meeting.exchange(self.rank, item)

    def from_first(self, item):
        return self.meeting.exchange(self.rank, item)[0]

    def lost(self):
        return OutOfResources("a rank was lost")

    def sharing(self, device):
        return 1 if device == "cuda" else self.size


def together(size: int, program: Callable[[Joined], Any]) -> list[Any]:
    """What the program returns, or raises, on each rank."""
    meeting = Meeting(size)
    outcomes: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = program(Joined(Threads(meeting, rank)))
        except Ended as ended:
            outcomes[rank] = ended.error
        except Exception as error:
            outcomes[rank] = error
        finally:
            meeting.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
