"""How the processes of an analysis find each other: torchrun's environment, or torch's group."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from hessdiag.distributed.group import Alone, Ended, Group
from hessdiag.distributed.joined import Joined
from hessdiag.distributed.torch_transport import CURRENT, TorchTransport
from hessdiag.errors import InputError
from hessdiag.launched import launched

TIMEOUT = timedelta(minutes=30)
"""How long a rank may be busy on its own: a product of its part, a dense solve, a slow disk."""


@contextmanager
def joined(device: str = "auto", *, timeout: timedelta = TIMEOUT) -> Iterator[Group]:
    """The group of all processes that torchrun started, or that torch.distributed knows.

    A process that was started alone is alone. Every rank must enter, and run the same program
    inside. A failure of one rank ends all of them with the same error.

    Args:
        device: Of the analysis: ``auto``, ``cpu`` or ``cuda``. On CUDA every rank takes the GPU
            of its ``LOCAL_RANK``.
        timeout: How long a rank waits for the others.
    Raises:
        InputError: There are not enough GPUs, or a device with an index was asked for.
        HessdiagError: Whatever ended the group.
    """
    if not (dist.is_available() and (dist.is_initialized() or launched())):
        yield Alone()
        return
    if ":" in device:
        raise InputError(
            f"--device {device} names one GPU and the analysis has several processes; give "
            "--device cuda, and each takes the GPU of its number"
        )
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        _take_gpu()
    backend = "nccl" if on_gpu else "gloo"
    if not dist.is_initialized():
        # Once per process: a second store at the same address would hold the first one's keys.
        dist.init_process_group(backend, timeout=timeout)
        atexit.register(_leave_quietly)
    # A group of our own: collectives of the user's that are under way must not meet ours.
    process_group = dist.new_group(backend=backend, timeout=timeout)
    transport = TorchTransport(process_group)
    group = Joined(transport)
    try:
        yield from _inside(group)
    except Ended as ended:
        # No way to take the others along: what cannot be reached cannot be destroyed, either.
        transport.leave()
        raise _with_notes(ended) from ended
    except Exception:
        transport.close()
        raise
    except BaseException:
        transport.leave()
        raise
    transport.close()


def _leave_quietly() -> None:
    """Destroy what is left at the end of the process; not if ranks are lost, which may hang."""
    if dist.is_initialized() and not CURRENT:
        dist.destroy_process_group()


def _inside(group: Joined) -> Iterator[Group]:
    try:
        yield group
    except Exception as error:
        raise group.told(error, "the analysis") from error
    group.end()


def _with_notes(ended: Ended) -> Exception:
    for note in getattr(ended, "__notes__", []):
        ended.error.add_note(note)
    return ended.error


def _take_gpu() -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device() if count else 0))
    if local >= count:
        raise InputError(
            f"there are {count} GPUs here and process {local} of this machine wants one of its "
            "own; start at most one process per GPU (--nproc-per-node), or give --device cpu"
        )
    with suppress(RuntimeError):
        torch.cuda.set_device(local)
