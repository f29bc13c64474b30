"""One run out of several: whose row is taken, and what is told of where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from hessdiag.errors import StoreError
from hessdiag.merging.sources import Source
from hessdiag.resume import now
from hessdiag.run import BlockResult, HiddenResult, Provenance, Run, VariantResult, row_label
from hessdiag.shard import blocks_of
from hessdiag.variants.grammar import parse_variant

AGREED = 1e-9
"""Of ‖H‖: what a row that two runs hold may differ by, on two machines."""
COMPARED = ("lambda_max", "lambda_min", "frobenius", "trace")
Cells = Mapping[tuple[str, str], tuple[Source, VariantResult]]
"""By (block, variant): which run its row is taken from, and the row."""


def joined(sources: Sequence[Source]) -> Run:
    """The run that ``sources``, which belong together, make up.

    Raises:
        StoreError: Two runs hold a row, and it differs.
    """
    first = sources[0]
    variants = tuple(dict.fromkeys(chain.from_iterable(s.run.variants for s in sources)))
    cells = _cells(sources)
    blocks = []
    for name in blocks_of(first.run):
        parameters = next(s.run[name].parameters for s in sources if _holds(s, name))
        own = {v: cells[name, v][1] for v in variants if (name, v) in cells}
        blocks.append(BlockResult(name, parameters, own))
    return Run(
        blocks=tuple(blocks),
        variants=variants,
        provenance=Provenance(
            config=_config(sources, variants),
            environment=_environment(sources, cells),
            fingerprint=_fingerprint(sources, variants),
            warnings=list(
                dict.fromkeys(chain.from_iterable(s.run.provenance.warnings for s in sources))
            ),
        ),
        created_at=now(),
        hessdiag_version=first.run.hessdiag_version,
        hidden=_hidden(sources, variants),
        cosines=next((s.run.cosines for s in sources if s.run.cosines), {}),
    )


def _holds(source: Source, block: str) -> bool:
    return any(own.name == block for own in source.run.blocks)


def _cells(sources: Sequence[Source]) -> Cells:
    """Every row once, from a run in which it did not fail where there is one.

    Raises:
        StoreError: Two runs hold a row, and it differs.
    """
    cells: dict[tuple[str, str], tuple[Source, VariantResult]] = {}
    for source in sources:
        for block in source.run.blocks:
            for variant, result in block.variants.items():
                key = (block.name, variant)
                known = cells.get(key)
                if known is None or (key in source.settled and key not in known[0].settled):
                    cells[key] = (source, result)
                elif key in source.settled and not _agree(known[1], result):
                    raise StoreError(
                        f"{row_label(*key)} is not the same in {known[0].path} and {source.path}, "
                        "so their variants cannot stand side by side; analyse one of them again"
                    )
    return cells


def _agree(ours: VariantResult, theirs: VariantResult) -> bool:
    """Whether two rows tell the same, up to the rounding of two machines."""
    if ours["skipped"] is not None or theirs["skipped"] is not None:
        return bool(ours["skipped"] == theirs["skipped"])
    pairs = [(ours[name].value, theirs[name].value) for name in COMPARED]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    height = max((abs(a) for a, _ in known), default=0.0)
    return all((a is None) == (b is None) for a, b in pairs) and all(
        math.isclose(a, b, rel_tol=AGREED, abs_tol=AGREED * height) for a, b in known
    )


def _hidden(
    sources: Sequence[Source], variants: Sequence[str]
) -> dict[str, tuple[HiddenResult, ...]]:
    found: dict[str, tuple[HiddenResult, ...]] = {}
    for variant in variants:
        layers: dict[int, HiddenResult] = {}
        for source in sources:
            for layer in source.run.hidden.get(variant, ()):
                layers.setdefault(layer.index, layer)
        if layers:
            found[variant] = tuple(layers[index] for index in sorted(layers))
    return found


def _config(sources: Sequence[Source], variants: Sequence[str]) -> dict[str, Any]:
    """The options of an unsharded analysis that would leave the same to do."""
    configs = [source.run.provenance.config for source in sources]
    config = configs[0] | {"shard": None, "variants": list(variants)}
    # A row that was cut short is done again by whoever allows more than the least of them.
    limits = [c["max_seconds"] for c in configs if c.get("max_seconds") is not None]
    config["max_seconds"] = min(limits, default=None)
    # What memory did not allow is tried again with another budget.
    budgets = [s.run.provenance.config.get("memory_budget") for s in sources if s.record("limited")]
    config["memory_budget"] = budgets[0] if budgets else configs[0].get("memory_budget")
    return config


def _fingerprint(sources: Sequence[Source], variants: Sequence[str]) -> dict[str, Any]:
    """Of the unsharded analysis under all the variants."""
    merged: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    for source in sources:
        merged = source.fingerprint | merged
        memory = (source.fingerprint.get("memory") or {}) | memory
    return merged | {"shard": None, "variants": list(variants), "memory": memory}


def _environment(sources: Sequence[Source], cells: Cells) -> dict[str, Any]:
    """What is told by row, from whoever computed it; the machine of each shard under ``shards``."""
    merged: dict[str, Any] = {}
    for source in sources:
        for name, value in source.run.provenance.environment.items():
            known = merged.setdefault(name, value)
            if isinstance(known, dict) and isinstance(value, dict):
                merged[name] = value | known
    rows = {row_label(*key): (source, key) for key, (source, _) in cells.items()}
    for name in ("engine", "seconds"):
        taken = {label: (source.record(name) or {}) for label, (source, _) in rows.items()}
        merged[name] = {label: told[label] for label, told in taken.items() if label in told}
    told = list(dict.fromkeys(chain.from_iterable(s.record("failed") or () for s in sources)))
    merged["failed"] = [
        label
        for label in told
        if label not in rows or label in (rows[label][0].record("failed") or ())
    ]
    limited = {
        parse_variant(variant).network
        for (block, variant), (source, _) in cells.items()
        if (block, variant) not in source.settled
    }
    networks = chain.from_iterable(s.record("limited") or () for s in sources)
    merged["limited"] = [name for name in dict.fromkeys(networks) if name in limited]
    merged["shards"] = [*chain.from_iterable(map(_origins, sources))]
    return merged


def _origins(source: Source) -> list[dict[str, Any]]:
    """Which runs a run was made of, and on what each was computed."""
    known = source.record("shards")
    if known:
        return list(known)
    environment = source.run.provenance.environment
    by_row = {"engine", "seconds", "hidden", "symmetry_products", "blocks", "optimizer"}
    return [
        {
            "file": source.path.name,
            "shard": None if source.shard is None else str(source.shard),
            "variants": list(source.run.variants),
            "created_at": source.run.created_at,
            "blocks": [block.name for block in source.run.blocks],
            **{name: value for name, value in environment.items() if name not in by_row},
        }
    ]
