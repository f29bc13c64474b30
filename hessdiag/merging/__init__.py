"""Several runs of one analysis to one: its shards, and its variants where they were run apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from hessdiag.errors import StoreError
from hessdiag.merging.checks import check_same_analysis, complete
from hessdiag.merging.joined import joined
from hessdiag.merging.sources import Source, check_place, named_once, opened
from hessdiag.run import Run

__all__ = ["check_place", "merge_runs", "merged"]


def merge_runs(paths: Sequence[str | Path]) -> Run:
    """The run that one analysis of all blocks under all variants would have given.

    Args:
        paths: All shards of an analysis, in any order; or runs of it, sharded or not, that
            differ in their variants only.
    Returns:
        Rows in the order of an unsharded run. Its fingerprint is that of such a run, so that
        ``analyze`` takes it for its own; ``shards`` of its environment tells where each came
        from.
    Raises:
        StoreError: A run is missing, unfinished or damaged, is there twice, or is of another
            analysis; the message names it, the field and the remedy.
    """
    return merged([opened(path) for path in named_once([Path(path) for path in paths])])


def merged(sources: Sequence[Source]) -> Run:
    """As :func:`merge_runs`, of runs that are in memory."""
    replayed = [source for source in sources if "batches" in source.fingerprint]
    for one, *others in filter(None, (sources, replayed)):
        for other in others:
            check_same_analysis(one, other)
    groups: dict[tuple[str, ...], list[Source]] = {}
    for source in sources:
        groups.setdefault(source.run.variants, []).append(source)
    ordered = [*chain.from_iterable(map(complete, groups.values()))]
    if len(ordered) == 1 and ordered[0].shard is None:
        raise StoreError(f"{ordered[0].path} holds all blocks already; there is nothing to merge")
    return joined(ordered)
