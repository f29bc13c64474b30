"""Batches cut into smaller ones of the same mean, where memory is short."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hessdiag.curvature.engines import BUILD, graph_bytes
from hessdiag.curvature.loan import has_batch_statistics
from hessdiag.curvature.objective import SAME, Objective
from hessdiag.data import Batches, is_stack, row_count, take
from hessdiag.distributed import Alone
from hessdiag.distributed.pieces import divided
from hessdiag.options import Curvature

MEASURED_ROWS = 4
"""A graph's bytes are measured on so many rows and on twice as many, and grow in proportion."""


def most_rows(objective: Objective) -> int:
    """Of the largest batch."""
    return max(row_count(batch) for batch in objective.batches.items)


def why_not_cut(objective: Objective) -> str | None:
    """Why its batches must stay whole; None where they may be cut.

    Cost:
        The losses and gradients of a few rows.
    """
    if has_batch_statistics(objective.model):
        return "BatchNorm takes its statistics over a batch"
    if objective.units is None or not all(is_stack(b) for b in objective.batches.items):
        return "not every tensor of a batch has a row per example"
    if not _is_mean_over_rows(objective):
        return "a batch's loss is not the mean over its rows"
    return None


def cut(objective: Objective, rows: int) -> Objective:
    """The same objective with batches of at most ``rows`` rows; weights are exact.

    A part counts by its own units in its batch's; one without any is left out.
    """
    items: list[Any] = []
    shares: list[float] = []
    for batch, share in objective:
        parts = -(-row_count(batch) // rows)
        if parts == 1:
            items.append(batch)
            shares.append(share)
            continue
        for own in divided([batch], [share], parts, objective.units).pieces:
            items += [piece.batch for piece in own]
            shares += [piece.share for piece in own]
    return replace(objective, batches=_with(objective.batches, items, shares))


def rows_that_fit(
    objective: Objective, parameters: Sequence[nn.Parameter], curvature: Curvature, free: int
) -> int:
    """The most rows of a batch whose graph takes at most ``free`` bytes; at least 1.

    Cost:
        A forward and a backward of a few rows, twice.
    """
    rows = most_rows(objective)
    if not all(is_stack(batch) for batch in objective.batches.items):
        return rows
    largest = max(objective.batches.items, key=row_count)
    few = min(MEASURED_ROWS, rows)
    low = _bytes(objective, take(largest, slice(0, few)), parameters, curvature)
    if few == rows:
        return rows
    more = min(2 * few, rows)
    high = _bytes(objective, take(largest, slice(0, more)), parameters, curvature)
    slope = max(high - low, 0) / (more - few)
    if low + slope * (rows - few) <= free or slope == 0:
        return rows
    return max(math.floor(few + (free - low) / slope), 1)


def _bytes(
    objective: Objective, batch: Any, parameters: Sequence[nn.Parameter], curvature: Curvature
) -> int:
    alone = replace(objective, batches=_with(objective.batches, [batch], [1.0]), group=Alone())
    return graph_bytes(alone, parameters, BUILD[curvature])


def _is_mean_over_rows(objective: Objective) -> bool:
    """Whether the halves of a few rows have their loss and their gradient."""
    largest = max(objective.batches.items, key=row_count)
    few = take(largest, slice(0, min(2 * MEASURED_ROWS, row_count(largest))))
    units = objective.units
    if units is None or row_count(largest) < 2:
        return units is not None
    if float(units(few)) <= 0:  # none of these rows counts
        few = largest
    whole = replace(objective, batches=_with(objective.batches, [few], [1.0]), group=Alone())
    parts = cut(whole, -(-row_count(few) // 2))
    parameters = [p for p in objective.model.parameters() if p.dtype in SAME]
    limit = SAME[parameters[0].dtype]
    sizes = [
        replace(parts, batches=_with(parts.batches, [batch], [share])) for batch, share in parts
    ]
    losses, slopes = [p.value() for p in sizes], [p.gradient(parameters) for p in sizes]
    scale = sum(abs(loss) for loss in losses)
    slope = sum(float(part.norm()) for part in slopes)
    apart = float((parts.gradient(parameters) - whole.gradient(parameters)).norm())
    return abs(parts.value() - whole.value()) <= limit * scale and apart <= limit * slope


def _with(batches: Batches, items: Sequence[Any], shares: Sequence[float]) -> Batches:
    return replace(batches, items=tuple(items), shares=tuple(shares))
