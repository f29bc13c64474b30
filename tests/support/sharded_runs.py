"""Runs in parts: the shards of a synthetic run, and where two runs differ by more than rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hessdiag.merging.sources import Source
from hessdiag.run import Run, row_label
from hessdiag.store import write_run

COSTS = {"seconds", "products"}
"""What a row took, which is told of the process that computed it."""


def complete_run(run: Run, **fingerprint: Any) -> Run:
    """``run`` with the records that an analysis of all its blocks leaves."""
    labels = [row_label(block.name, v) for block in run.blocks for v in block.variants]
    told = run.provenance
    return replace(
        run,
        provenance=replace(
            told,
            config=told.config
            | {"shard": None, "variants": list(run.variants), "blocks": ["layer"]},
            environment=told.environment
            | {
                "blocks": [block.name for block in run.blocks],
                "engine": {label: f"engine of {label}" for label in labels},
                "seconds": {label: float(k) for k, label in enumerate(labels)},
                "failed": [],
                "limited": [],
            },
            fingerprint=told.fingerprint
            | {"shard": None, "variants": list(run.variants), "memory": {}, "seed": 0}
            | fingerprint,
        ),
    )


def part(run: Run, number: int, count: int, names: Sequence[str], layers: Sequence[str]) -> Run:
    """The shard of ``run`` that holds the blocks ``names`` and H_e of ``layers``."""
    text = f"{number}/{count}"
    told = run.provenance
    own = {row_label(name, v) for name in names for v in run.variants}
    environment = {
        name: {label: value[label] for label in value if label in own}
        if name in {"engine", "seconds"}
        else value
        for name, value in told.environment.items()
    }
    return replace(
        run,
        blocks=tuple(block for block in run.blocks if block.name in names),
        provenance=replace(
            told,
            config=told.config | {"shard": text},
            environment=environment | {"threads": number},
            fingerprint=told.fingerprint | {"shard": text},
            warnings=[*told.warnings, f"of shard {number}"],
        ),
        hidden={
            variant: tuple(found for found in results if found.layer in layers)
            for variant, results in run.hidden.items()
        },
        cosines=run.cosines if "whole" in names else {},
    )


def parts_of(run: Run, parts: Sequence[Sequence[str]], folder: str = "") -> list[Source]:
    """A shard per list of blocks; H_e of a layer goes with its block, or to the last."""
    listed = {name for names in parts for name in names}
    sources = []
    for position, names in enumerate(parts):
        last = position == len(parts) - 1
        layers = [
            found.layer
            for results in run.hidden.values()
            for found in results
            if found.layer in names or (last and found.layer not in listed)
        ]
        path = Path(folder) / f"run.shard-{position + 1}-of-{len(parts)}.h5"
        sources.append(Source(path, part(run, position + 1, len(parts), names, layers)))
    return sources


def write_parts(run: Run, folder: Path, parts: Sequence[Sequence[str]]) -> list[Path]:
    """The shards of :func:`parts_of` as files; their paths, in order."""
    sources = parts_of(run, parts, str(folder))
    for source in sources:
        write_run(source.run, source.path)
    return [source.path for source in sources]


def departures(ours: Run, theirs: Run, tolerance: float, ignored: frozenset[str]) -> list[str]:
    """Where two runs differ by more than ``tolerance``, relative to ‖H‖ or to the array's largest.

    Args:
        ours: A run.
        theirs: Another.
        tolerance: Relative.
        ignored: Keys of the JSON document that are not compared.
    """
    found = list(_differing("", ours.to_dict(), theirs.to_dict(), tolerance, ignored))
    mine, its = _arrays(ours), _arrays(theirs)
    if mine.keys() != its.keys():
        return [*found, f"arrays {sorted(mine.keys() ^ its.keys())}"]
    for name, array in mine.items():
        scale = np.nanmax(np.abs(array), initial=0.0)
        if array.shape != its[name].shape or not np.allclose(
            array, its[name], rtol=0, atol=tolerance * scale, equal_nan=True
        ):
            found.append(name)
    return found


def _differing(where: str, ours: Any, theirs: Any, tolerance: float, ignored: frozenset[str]):
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in {*ours, *theirs} - ignored:
            path = f"{where}/{name}"
            yield from _differing(path, ours.get(name), theirs.get(name), tolerance, ignored)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for position, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differing(f"{where}/{position}", mine, its, tolerance, ignored)
    elif isinstance(ours, float) and isinstance(theirs, float):
        if abs(ours - theirs) > tolerance * max(abs(ours), abs(theirs)):
            yield where
    elif ours != theirs:
        yield where


def _arrays(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {f"cosines/{name}": array for name, array in run.cosines.items()}
    for index, block in enumerate(run.blocks):
        for variant, result in block.variants.items():
            for group, arrays in (("spectra", result.spectrum), ("rows", result.rows)):
                found |= {f"{group}/{variant}/{index}/{n}": a for n, a in arrays.items()}
    for variant, results in run.hidden.items():
        for layer in results:
            for group, arrays in (("hidden", layer.hidden), ("neurons", layer.neurons)):
                found |= {f"{group}/{variant}/{layer.index}/{n}": a for n, a in arrays.items()}
    return {name: np.asarray(array, dtype=np.float64) for name, array in found.items()}
