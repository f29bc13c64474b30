"""Batches cut into smaller ones of the same mean, where memory is short."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.curvature.engines import BUILD, graph_bytes
from hessdiag.curvature.loan import has_batch_statistics
from hessdiag.curvature.objective import Objective
from hessdiag.data import Batches, is_stack, row_count, take
from hessdiag.distributed import Alone
from hessdiag.distributed.pieces import divided
from hessdiag.errors import is_out_of_memory
from hessdiag.options import Curvature

MEASURED_ROWS = 4
"""A graph's bytes are measured on so many rows and on twice as many, and grow in proportion."""


def most_rows(objective: Objective) -> int:
    """Of the largest batch."""
    return max(row_count(batch) for batch in objective.batches.items)


def why_not_cut(objective: Objective) -> str | None:
    """Why none of its batches can be cut; None where they have rows to cut between."""
    if has_batch_statistics(objective.model):
        return "BatchNorm takes its statistics over a batch"
    if objective.units is None or not all(is_stack(b) for b in objective.batches.items):
        return "not every tensor of a batch has a row per example"
    return None


def cut(objective: Objective, rows: int) -> Objective:
    """The same objective with batches of at most ``rows`` rows; weights are exact.

    A part counts by its own units in its batch's; one without any is left out. A batch whose
    parts have not its loss stays whole, whatever its rows; :func:`whole` finds those.

    Cost:
        Twice the loss of all batches that are cut, and of their parts, shared among the ranks;
        gradients of a few of their rows.
    """
    parts: dict[int, list[tuple[Any, float]]] = {}
    for index, (batch, share) in enumerate(objective):
        count = -(-row_count(batch) // rows)
        if count > 1:
            own = divided([batch], [share], count, objective.units).pieces
            parts[index] = [(p.batch, p.share) for piece in own for p in piece]
    for index in _not_sums(objective, parts):
        del parts[index]
    items: list[Any] = []
    shares: list[float] = []
    for index, (batch, share) in enumerate(objective):
        for part, its_share in parts.get(index, [(batch, share)]):
            items.append(part)
            shares.append(its_share)
    return replace(objective, batches=_with(objective.batches, items, shares))


def whole(objective: Objective, rows: int) -> list[Any]:
    """The batches that were too large for ``rows``, and were not cut."""
    return [batch for batch in objective.batches.items if row_count(batch) > rows]


def _not_sums(objective: Objective, parts: Mapping[int, Sequence[tuple[Any, float]]]) -> list[int]:
    """Batches that must stay whole, as all ranks know them; each looks at its share of them."""
    group, indices = objective.group, list(parts)

    def wrong() -> Tensor:
        own = {index: parts[index] for index in indices[group.rank :: group.size]}
        try:
            found = objective.not_sums(own)
            found |= {index for index in own.keys() - found if not _few_agree(objective, index)}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            found = set(own)
        return torch.tensor([float(index in found) for index in indices], dtype=torch.float64)

    if not indices:
        return []
    return [index for index, bad in zip(indices, group.summed(wrong).tolist(), strict=True) if bad]


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


def _few_agree(objective: Objective, index: int) -> bool:
    """Whether a few rows of a batch have the gradient of their halves; no memory is for all."""
    few = take(objective.batches.items[index], slice(0, 2 * MEASURED_ROWS))
    if objective.units is None or float(objective.units(few)) <= 0:
        return True
    halves = divided([few], [1.0], 2, objective.units).pieces
    parts = [(piece.batch, piece.share) for half in halves for piece in half]
    alone = replace(objective, batches=_with(objective.batches, [few], [1.0]))
    return not alone.not_sums({0: parts}, gradients=True)


def _with(batches: Batches, items: Sequence[Any], shares: Sequence[float]) -> Batches:
    return replace(batches, items=tuple(items), shares=tuple(shares))
