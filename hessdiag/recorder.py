"""Write the checkpoints along a training, for ``--iterates``, and leave the training as it is."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn

from hessdiag.curvature.loan import bare
from hessdiag.errors import OptionError, OutOfResources, StoreError
from hessdiag.store.atomic import replace_file

FILE = re.compile(r"step-(\d+)\.pt")


class Recorder:
    """Keeps the network and its optimizer after every so many steps of a training.

    ::

        with hessdiag.Recorder(model, optimizer, "iterates", every=100):
            for batch in data:
                ...
                optimizer.step()

    It records from now on, like an open file, to the end of the ``with`` or to :meth:`close`. A
    hook after ``optimizer.step()`` counts the steps, so nothing else is to be called; steps that
    a ``GradScaler`` skips do not count. The files ``iterates/step-000100.pt`` hold ``model``,
    ``optimizer`` and ``step``; ``hessdiag analyze`` reads each of them, and all of them as
    ``--iterates 'iterates/*.pt'``. A file is whole or not there.

    Parameters, optimizer state and random numbers are those of the same training without it, bit
    for bit. Under torch.distributed the process of rank 0 writes, and the model must be whole
    there (DDP, not FSDP). When a file cannot be written, the error comes out of
    ``optimizer.step()`` after the step is done: who catches it can go on.

    Attributes:
        steps: Done so far.
        written: The files of this recorder.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        directory: str | Path,
        *,
        every: int,
        start: int = 0,
    ) -> None:
        """Begin to record.

        Args:
            model: Its state dict is stored, without the wrappers of ``torch.compile`` and DDP.
            optimizer: Its state is stored, and its steps are counted.
            directory: Made when it is not there.
            every: Steps from one file to the next.
            start: Steps done before, where a training goes on.
        Raises:
            OptionError: ``every`` is no whole number of at least 1, or ``start`` none of at least
                0; ``model`` is no network, or ``optimizer`` no optimizer of torch.
            StoreError: ``directory`` cannot be made, or holds files of later steps than
                ``start``, which belong to another training.
        """
        _check_class("model", model, nn.Module, "torch.nn.Module")
        _check_class("optimizer", optimizer, torch.optim.Optimizer, "torch.optim.Optimizer")
        _check_whole("every", every, 1)
        _check_whole("start", start, 0)
        self.model = model
        self.optimizer = optimizer
        self.directory = Path(directory)
        self.every = every
        self.steps = start
        self.written: list[Path] = []
        if _is_first():
            self._claim()
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def close(self) -> None:
        """Record no more; what is written stays."""
        self._hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Recorder {str(self.directory)!r}, {len(self.written)} of {self.steps} steps>"

    def _claim(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            names = [path.name for path in self.directory.iterdir()]
        except OSError as error:
            raise StoreError(
                f"{self.directory} cannot be used as a folder ({error.strerror or error}); give "
                "the Recorder another directory"
            ) from error
        later = sorted(n for n in names if (m := FILE.fullmatch(n)) and int(m[1]) > self.steps)
        if later:
            raise StoreError(
                f"{self.directory} holds {later[0]}, but this training is at step {self.steps}, "
                "so two trainings would mix; give the Recorder another directory, remove the "
                "later files, or tell the steps done before as start=…"
            )

    def _after_step(self, *_: object) -> None:
        self.steps += 1
        if self.steps % self.every == 0 and _is_first():
            self._write()

    def _write(self) -> None:
        content = {
            "model": bare(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.steps,
        }
        # In memory first: torch.save reports a full disk as a plain RuntimeError.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        path = self.directory / f"step-{self.steps:06d}.pt"
        try:
            with buffer.getbuffer() as stored:
                replace_file(path, stored)
        except (OutOfResources, StoreError) as error:
            raise type(error)(
                f"the Recorder cannot write {path} ({_reason(error)}); training is intact, and "
                f"step {self.steps} is done: make room or give another directory, and go on"
            ) from error.__cause__
        self.written.append(path)


def _check_class(name: str, value: object, kind: type, known_as: str) -> None:
    if not isinstance(value, kind):
        raise OptionError(
            f"{name} is of class {type(value).__name__}; it must be a {known_as}: "
            "Recorder(model, optimizer, directory, every=...)"
        )


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name} is {value!r}; it must be a whole number >= {least}")


def _reason(error: BaseException) -> str:
    cause = error.__cause__
    return (cause.strerror if isinstance(cause, OSError) else None) or str(cause or error)


def _is_first() -> bool:
    """Whether this process writes: alone, or of rank 0."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )
