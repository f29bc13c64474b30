"""The rows of a stored run that a new analysis takes as they are."""

from __future__ import annotations

from collections.abc import Mapping

from hessdiag.options import Options
from hessdiag.run import BlockResult, Run, row_label
from hessdiag.solve.problem import CUT_SHORT
from hessdiag.store.parts import Finished
from hessdiag.variants.grammar import parse_variant

FinishedRows = Mapping[tuple[str, str], Finished]
"""By (block, variant)."""


def finished_rows(run: Run) -> dict[tuple[str, str], Finished]:
    """The rows of a stored run that need not be computed again; some do not apply."""
    record = run.provenance.environment
    again = set(record.get("failed", ()))
    limited = set(record.get("limited", ()))
    limit = run.provenance.config.get("max_seconds")
    return {
        (block.name, variant): Finished(
            BlockResult(block.name, block.parameters, {variant: result}),
            variant,
            record.get("engine", {}).get(row_label(block.name, variant)),
            record.get("seconds", {}).get(row_label(block.name, variant), 0.0),
            limit,
        )
        for block in run.blocks
        for variant, result in block.variants.items()
        if row_label(block.name, variant) not in again
        and parse_variant(variant).network not in limited
    }


def still_good(done: Finished, options: Options) -> bool:
    """Whether a command with ``options`` may take a row as it is.

    One that ``--max-seconds`` cut short is done again by a command that allows more.
    """
    if CUT_SHORT not in done.result["notes"]:
        return True
    if options.max_seconds is None or done.max_seconds is None:
        return False
    return options.max_seconds <= done.max_seconds


def is_complete(run: Run, options: Options) -> bool:
    """Whether a stored run of the same fingerprint leaves nothing to do."""
    record = run.provenance.environment
    if record.get("failed"):
        return False
    # What memory did not allow is tried again with another budget only.
    budget = run.provenance.config.get("memory_budget")
    if record.get("limited") and options.memory_budget != budget:
        return False
    return all(still_good(done, options) for done in finished_rows(run).values())
