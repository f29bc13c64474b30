"""Several processes on one terminal: rank 0 speaks, and another only when rank 0 is gone."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessdiag.launched import launched, launched_rank

PATIENCE = 10.0  # seconds that a mute rank waits for rank 0
BY_SIGNAL = (130, 143)

if TYPE_CHECKING:
    from hessdiag.distributed import Group
    from hessdiag.distributed.torch_transport import TorchTransport


def mute_others() -> None:
    """Let rank 0 alone write to the terminal; the others would repeat it."""
    if launched_rank() > 0:
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - to the end
        sys.stdout = sys.stderr = nowhere


@contextmanager
def together(device: str) -> Iterator[Group | None]:
    """The group of the processes that torchrun started; None of one that was started alone."""
    if not launched():
        yield None
        return
    from hessdiag.distributed.launch import joined

    with joined(device) as group:
        yield group


def lost_meanwhile() -> Exception | None:
    """The loss of other ranks, when torchrun ends this one for it; None where all are there."""
    transport = _transport()
    if transport is None:
        return None
    gone = transport.gone()
    return transport.lost_error(gone) if any(gone.values()) else None


def speak_for_the_lost() -> None:
    """Give this rank its stderr back, where no rank before it is left to tell what happened."""
    transport = _transport()
    if launched_rank() > 0 and transport is not None and transport.speaks():
        sys.stderr = sys.__stderr__


def let_the_first_speak(code: int) -> None:
    """Before a rank that is mute ends with an error, let rank 0 tell of it.

    As soon as one process has failed, torchrun terminates the others; so it does this one when
    rank 0 has failed, too, and then there is nothing more to wait for.
    """
    if launched_rank() > 0 and code not in (0, *BY_SIGNAL) and hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.sigtimedwait({signal.SIGTERM}, PATIENCE)


def _transport() -> TorchTransport | None:
    module: Any = sys.modules.get("hessdiag.distributed.torch_transport")
    return module.CURRENT[0] if module is not None and module.CURRENT else None
