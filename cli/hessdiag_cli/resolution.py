"""The checkpoint and the task that a command line names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hessdiag.errors import OptionError

if TYPE_CHECKING:
    from hessdiag.checkpoint import Checkpoint
    from hessdiag.resolve import Resolution


def find_task(
    checkpoint: Checkpoint,
    reference: str | None,
    arguments: Sequence[str],
    data: Path | None = None,
) -> Resolution:
    """The task for a checkpoint by the documented order; no user code runs yet.

    Raises:
        TaskError: There is none; the message says what the file is and what would work.
    """
    from hessdiag.resolve import resolve

    return resolve(
        reference,
        cwd=Path.cwd(),
        environ=os.environ,
        checkpoint=checkpoint,
        task_args=parse_arguments(arguments),
        data=data,
    )


def look_for_task(
    checkpoint: Checkpoint,
    reference: str | None,
    arguments: Sequence[str],
    data: Path | None = None,
) -> Resolution | None:
    """As :func:`find_task`; None when there is none."""
    from hessdiag.resolve import find

    return find(
        reference,
        cwd=Path.cwd(),
        environ=os.environ,
        checkpoint=checkpoint,
        task_args=parse_arguments(arguments),
        data=data,
    )


def default_output(checkpoint: Path, shard: str | None = None) -> Path:
    """The run file of a checkpoint where no ``-o`` is given: in the working directory.

    A directory gives its whole name, dots and all; an index of shards what is before its suffixes.
    Each ``shard``, ``I/N``, of an analysis has a file of its own.
    """
    tail = ".h5" if shard is None else f".shard-{shard.replace('/', '-of-')}.h5"
    try:
        if checkpoint.is_dir():
            return Path(f"{checkpoint.resolve().name}{tail}")
    except OSError:  # reading it will say what is wrong
        pass
    name = checkpoint.name
    stem = name.split(".")[0] if name.endswith(".index.json") else checkpoint.stem
    return Path(f"{stem}{tail}")


def parse_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """``key=value`` pairs as a mapping.

    Raises:
        OptionError: A pair has no ``=``, or no name.
    """
    parsed = {}
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator or not key.isidentifier():
            raise OptionError(f"--task-arg {argument!r} is not key=value, such as width=64")
        parsed[key] = value
    return parsed
