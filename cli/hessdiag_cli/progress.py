"""Progress on stderr: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hessdiag.plain import printable, printable_lines

if TYPE_CHECKING:
    from hessdiag.progress import Event

PLAIN_EVERY = 10.0  # seconds


@contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[Event], None]]:
    """A function to report events to, for as long as the work runs."""
    if quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _Lines()


@contextmanager
def _bar() -> Iterator[Callable[[Event], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("products"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        shown: dict[str, TaskID] = {}

        def report(event: Event) -> None:
            if event.message:
                display.console.print(printable_lines(event.message), markup=False, highlight=False)
                return
            if event.block not in shown:
                for previous in shown.values():
                    display.update(previous, visible=False)
                label = f"row {event.index}/{event.count}  {printable(event.block)}"
                shown[event.block] = display.add_task(label, total=event.total)
            display.update(shown[event.block], completed=event.done)

        yield report


class _Lines:
    """A line when a block begins, when it ends, and every ten seconds between."""

    def __init__(self) -> None:
        self.block = ""
        self.started = 0.0
        self.printed = 0.0

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if event.message:
            self._print(printable_lines(event.message), now)
            return
        if event.block != self.block:
            self.block, self.started, self.printed = event.block, now, now
            self._print(self._line(event), now)
        elif event.done >= event.total or now - self.printed >= PLAIN_EVERY:
            spent = now - self.started
            left = spent * (event.total - event.done) / max(event.done, 1)
            tail = f", {left:.0f} s left" if left >= 1 else ""
            self._print(self._line(event) + tail, now)

    def _line(self, event: Event) -> str:
        where = f"row {event.index}/{event.count} {printable(event.block)}"
        return f"{where}: {event.done} of {event.total} products"

    def _print(self, text: str, now: float) -> None:
        self.printed = now
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
