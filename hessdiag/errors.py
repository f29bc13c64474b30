"""Everything hessdiag raises on purpose, in one tree.

A message says what is wrong, what was expected and what to do. The library never exits;
``hessdiag_cli.__main__`` maps this tree to exit codes.
"""

from __future__ import annotations


class HessdiagError(Exception):
    """Base of all errors that hessdiag raises on purpose."""


class InputError(HessdiagError):
    """A usage, configuration or input that cannot be used."""


class OptionError(InputError, ValueError):
    """An option of ``analyze`` has a value that makes no sense."""


class TaskError(InputError):
    """No task was found, or the task that was found cannot be used."""


class CheckpointError(InputError):
    """A checkpoint cannot be read, or does not fit the task's model."""


class UnsafeCheckpoint(CheckpointError):
    """A checkpoint would run code when it is loaded."""


class SelfCheckFailed(InputError):
    """The products of this model cannot be trusted; the message names the module if it is known."""


class Diverged(SelfCheckFailed):
    """The processes of one analysis do not compute the same thing, so their sum means nothing."""


class StoreError(InputError):
    """A run file cannot be read, or must not be overwritten."""


class UnknownSchema(StoreError):
    """A run file was written by a release with another schema version."""


class MissingExtra(InputError):
    """An optional dependency is needed and not installed."""


class OutOfResources(HessdiagError):
    """Memory or disk ran out; finished work is kept where there is any."""


class OutOfTime(HessdiagError):
    """The time that the user allowed is over, and nothing is certified yet."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: on the CPU torch says so in words only."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    )
