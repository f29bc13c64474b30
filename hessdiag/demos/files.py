"""Where a demo's checkpoints lie; each file is whole or not there."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hessdiag.errors import OutOfResources, StoreError

CHECKPOINT = "model.pt"
ITERATES = "iterates"
ITERATE_PATTERN = "step-[0-9]*.pt"


def claim(directory: Path, *, force: bool) -> None:
    """Make the directory, and see to it that no checkpoint there is lost unasked.

    Raises:
        StoreError: Checkpoints lie there and ``force`` is false, or it cannot be made.
    """
    model = directory / CHECKPOINT
    found = [model] if os.path.lexists(model) else []
    found += _iterates(directory)
    if found and not force:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise StoreError(
            f"{found[0]}{more} would be overwritten; pass --force (force=True) to replace the "
            "checkpoints there, or choose another directory with -o"
        )
    with _disk_errors(directory):
        (directory / ITERATES).mkdir(parents=True, exist_ok=True)


def write_demo(
    directory: Path, checkpoints: Mapping[int, Mapping[str, Any]]
) -> tuple[Path, tuple[Path, ...]]:
    """Write the iterates by step, drop those of an earlier demo, and ``model.pt`` last.

    Args:
        directory: Claimed before.
        checkpoints: Training dicts by step; the largest step is the final one.
    Returns:
        Paths of the final checkpoint and of the iterates, in the order of their steps.
    Raises:
        StoreError: A file cannot be written.
        OutOfResources: The disk is full.
    """
    steps = sorted(checkpoints)
    paths = tuple(directory / ITERATES / f"step-{step:06d}.pt" for step in steps)
    model = directory / CHECKPOINT
    with _disk_errors(directory):
        for step, path in zip(steps, paths, strict=True):
            _write(path, checkpoints[step])
        for stale in set(_iterates(directory)) - set(paths):
            stale.unlink()
        _write(model, checkpoints[steps[-1]])
    return model, paths


def _iterates(directory: Path) -> list[Path]:
    return sorted((directory / ITERATES).glob(ITERATE_PATTERN))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Save through a temporary file in the same directory.

    The bytes are made in memory: ``torch.save`` puts a file's name into the file, so that equal
    checkpoints would differ, and reports a full disk as a plain RuntimeError.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as stream:
            stream.write(buffer.getvalue())
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfResources(
                f"the disk of {directory} is full; make room and repeat"
            ) from error
        raise StoreError(
            f"cannot write to {error.filename or directory}: {error.strerror}; "
            "choose another directory with -o"
        ) from error
