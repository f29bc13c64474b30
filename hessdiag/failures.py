"""What may end a row without ending the analysis, and how it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hessdiag.errors import HessdiagError, OutOfTime, is_out_of_memory

# What a block may die of without taking the others along.
FAILURES = (HessdiagError, ArithmeticError, ValueError, RuntimeError, MemoryError)


def why(error: BaseException) -> str:
    """Why a row has no numbers, on one line."""
    if isinstance(error, OutOfTime):
        return str(error)
    if is_out_of_memory(error):
        return "failed: out of memory; lower --exact-limit or --memory-budget"
    kind = "" if isinstance(error, HessdiagError) else f"{type(error).__name__}: "
    return " ".join(f"failed: {kind}{error}".split())


@contextmanager
def batch_work() -> Iterator[None]:
    """Mark memory that runs out here: it is that of a batch's graph, and smaller batches help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            error.of_batches = True  # type: ignore[union-attr]
        raise


def lacks_batch_memory(error: BaseException) -> bool:
    """Whether memory ran out in :func:`batch_work`."""
    return is_out_of_memory(error) and getattr(error, "of_batches", False)
