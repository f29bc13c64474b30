"""What a block does without when memory is short, one step after the other."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar, cast

import torch
from torch import nn

from hessdiag.blocks import Block
from hessdiag.curvature.objective import Objective
from hessdiag.data import row_count
from hessdiag.errors import is_out_of_memory
from hessdiag.failures import FAILURES, lacks_batch_memory
from hessdiag.microbatches import cut, most_rows, rows_that_fit, whole, why_not_cut
from hessdiag.network import Network
from hessdiag.opened import Opened
from hessdiag.progress import Event
from hessdiag.relief import Relief
from hessdiag.run import VariantResult

T = TypeVar("T")

FROM_SCRATCH = ("recompute", "difference")
"""Engines that keep nothing between products."""
MATRIX_FREE = ("lanczos", "power")
"""Methods of rows that were not assembled."""
NOT_ASSEMBLED = "out of memory: the block is not assembled; its numbers are bounds from products"


def first_relief(network: Network, block: Block) -> Relief:
    """What a block does without from the start: batches whose graphs exceed the memory budget.

    Measured on a few rows of the largest batch, for all parameters at once; only where those do
    not fit, for the block's own.
    """
    everything = list(network.named.values())
    names = [network.named[name] for name in block.parameters]
    if _rows(network, "all parameters", everything) is None:
        return Relief()
    rows = _rows(network, block.name, names)
    if rows is None:
        return Relief()
    given = network.options.memory_budget is not None
    limit = "--memory-budget" if given else "memory"
    told = _cut_note(network, rows, f" to fit {limit}")
    return Relief(rows=rows, notes=(f"memory: {told}",))


def fitting(network: Network) -> Objective:
    """The objective for work on all parameters at once, its batches as small as memory asks."""
    rows = _rows(network, "all parameters", list(network.named.values()))
    if rows is None:
        return network.given
    network.report(Event(message=f"self-checks: {_cut_note(network, rows)}"))
    return _cut(network, rows)


def _cut(network: Network, rows: int) -> Objective:
    """The objective with batches of at most ``rows`` rows; found once."""
    key = f"batches of {rows} rows"
    if key not in network.cache:
        network.cache[key] = cut(network.given, rows)
    return cast("Objective", network.cache[key])


def _rows(network: Network, name: str, parameters: Sequence[nn.Parameter]) -> int | None:
    """The most rows of a batch that fit; None where whole ones do, or must."""
    key = f"rows that fit, {name}"
    if key not in network.cache:
        free, options = network.free_memory(), network.options
        try:
            fit = rows_that_fit(network.objective, parameters, options.curvature, free)
        except FAILURES:  # the row itself tells what is wrong
            fit = most_rows(network.objective)
        agreed = int(network.objective.group.agreed(float(fit)))
        uncut = agreed >= most_rows(network.objective) or why_not_cut(network.objective)
        network.cache[key] = None if uncut else agreed
    found = network.cache[key]
    return found if isinstance(found, int) else None


def next_relief(network: Network, error: Exception, *, exact: bool) -> Relief | None:
    """What to do without next, once memory ran out; None where nothing is left.

    Args:
        network: With what it does without already.
        error: As all ranks know it.
        exact: The block is to be assembled and solved.
    """
    if not is_out_of_memory(error):
        return None
    now = network.relief
    group = network.objective.group
    in_batches = bool(group.agreed(float(lacks_batch_memory(error))))
    steps = [_recomputed, _halved] if in_batches else [_recomputed]
    for step in [*steps, _not_assembled if exact else _smaller_basis]:
        found = step(network, now)
        if found is not None:
            return found
    return None


def may_shrink(network: Network) -> bool:
    """Whether a batch that lacks memory leaves something to try."""
    now = network.relief
    return any(step(network, now) is not None for step in (_recomputed, _halved))


def _recomputed(network: Network, now: Relief) -> Relief | None:
    if now.recompute or network.options.engine in FROM_SCRATCH:
        return None
    told = "out of memory: no graphs are kept, so that products take longer"
    return replace(now, recompute=True, notes=(*now.notes, told))


def _halved(network: Network, now: Relief) -> Relief | None:
    rows = most_rows(network.objective)
    if rows < 2 or why_not_cut(network.given) is not None:
        return None
    half = -(-rows // 2)
    if most_rows(_cut(network, half)) >= rows:
        return None  # the largest must stay whole
    notes = tuple(note for note in now.notes if "are cut into" not in note)
    told = f"out of memory: {_cut_note(network, half)}"
    return replace(now, rows=half, notes=(*notes, told))


def _not_assembled(_: Network, now: Relief) -> Relief | None:
    if now.matrix_free:
        return None
    return replace(now, matrix_free=True, notes=(*now.notes, NOT_ASSEMBLED))


def _smaller_basis(network: Network, now: Relief) -> Relief | None:
    step: Literal["float32", "power"] = "float32" if now.basis is None else "power"
    if now.basis == "power" or network.options.eigensolver == "power":
        return None
    if step == "float32" and network.dtype == torch.float32:
        step = "power"
    told = {
        "float32": "out of memory: the Krylov basis is kept in float32, on the host where the "
        "device has its own memory, and the rounding is in the bounds",
        "power": "out of memory: power iteration, which keeps no Krylov basis, finds the ends",
    }
    notes = tuple(note for note in now.notes if note != told["float32"])
    return replace(now, basis=step, notes=(*notes, told[step]))


def _cut_note(network: Network, rows: int, aim: str = "") -> str:
    uncut = whole(_cut(network, rows), rows)
    sizes = [row_count(b) for b in network.given.batches.items if not any(b is u for u in uncut)]
    most = max(sizes, default=0)
    why = "a batch's loss is not the mean over its rows"
    if most <= rows:
        return (
            f"batches of up to {most_rows(network.given)} rows stay whole, where there is "
            f"memory for {rows}: {why}"
        )
    told = f"batches of up to {most} rows are cut into {-(-most // rows)} micro-batches{aim}"
    stay = "1 batch stays" if len(uncut) == 1 else f"{len(uncut)} batches stay"
    return f"{told}; {stay} whole, for {why}" if uncut else told


def begin_with(network: Network, block: Block, own: VariantResult | None) -> None:
    """Let a network do without what the block cannot have.

    Args:
        network: On loan.
        block: Whose rows come next.
        own: Its own row, where that was finished before: what it was computed without, the other
            rows are, too.
    """
    relief = first_relief(network, block)
    if own is not None and own["method"] in MATRIX_FREE and network.is_exact(block):
        relief = replace(relief, matrix_free=True, notes=(*relief.notes, NOT_ASSEMBLED))
    relieve(network, relief)


def patiently(opened: Opened, label: str, compute: Callable[[], T]) -> T:
    """What ``compute`` returns, with less and less that takes memory.

    Args:
        opened: The block; it is opened anew before each attempt but the first.
        label: Of the row.
        compute: The row.
    Raises:
        Exception: As ``compute`` does; out of memory where nothing is left to do without.
    """
    network = opened.network
    while True:
        opened.may_shrink = may_shrink(network)
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            told = network.told(error, label)
            relief = next_relief(network, told, exact=opened.exact)
            if relief is None:
                raise told from None
            released(error)
        relieve(network, relief)
        opened.reopen()


def relieve(network: Network, relief: Relief) -> None:
    """Let a network do without something from now on, and say so."""
    for note in relief.notes:
        if note not in network.relief.notes:
            network.report(Event(message=note))
    network.relief = relief
    network.objective = network.given
    if relief.rows is not None:
        network.objective = _cut(network, relief.rows)


def released(error: BaseException) -> None:
    """Let go of all that the failed work held."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
