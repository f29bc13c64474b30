"""What may end a row without ending the analysis, and how it is told."""

from __future__ import annotations

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
