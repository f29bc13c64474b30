"""The networks of a run, one after the other: the checkpoint's own, then the changed ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from hessdiag.backoff import fitting
from hessdiag.blocks import WHOLE, Block
from hessdiag.curvature.objective import Objective
from hessdiag.data import join, row_count
from hessdiag.errors import OutOfResources, StoreError
from hessdiag.explained import Explained
from hessdiag.failures import FAILURES, why
from hessdiag.names import layer_of
from hessdiag.network import Network
from hessdiag.progress import Event
from hessdiag.rows import Rows, Stage
from hessdiag.selfcheck import run_selfchecks
from hessdiag.shard import parse_shard
from hessdiag.sharding import Share
from hessdiag.task import Units
from hessdiag.variants.grammar import ORIGINAL, OTHER_FUNCTIONS, RAW, Variant, parse_variant
from hessdiag.variants.networks import Changed, changed_network
from hessdiag.variants.scene import NotApplicable, NotEnoughMemory


def compute_stages(
    rows: Rows,
    network: Network,
    share: Share,
    explained: Explained,
    units: Units,
) -> list[str]:
    """Every row of a run, or of one shard of it.

    Args:
        rows: Takes them.
        network: The checkpoint's own, prepared.
        share: Of its blocks, those to compute.
        explained: Takes H_e under every variant.
        units: Of the task, which weigh its batches.
    Returns:
        Warnings for the whole run.
    """
    options = network.options
    groups: dict[str, list[Variant]] = {ORIGINAL: []}
    for name in options.variants or (RAW,):
        variant = parse_variant(name)
        groups.setdefault(variant.network, []).append(variant)
    warnings: list[str] = []
    if options.shard is not None:
        own, every = len(share.blocks), len(explained.blocks)
        network.report(Event(message=parse_shard(options.shard).sentence(own, every)))
    if not share.blocks:
        return warnings
    for name, variants in groups.items():
        bare_first = sorted(variants, key=lambda variant: variant.coordinates != RAW)
        if name == ORIGINAL:
            rows.compute(Stage(network, share.blocks, bare_first))
            warnings += _explained(explained, network, bare_first, "the network", rows.failed)
        else:
            warnings += _changed(rows, network, share, bare_first, explained, units)
    return warnings


def _changed(
    rows: Rows,
    network: Network,
    share: Share,
    variants: Sequence[Variant],
    explained: Explained,
    units: Units,
) -> list[str]:
    """The rows of a changed network."""
    name, options = variants[0].network, network.options
    blocks = share.blocks
    same = name not in OTHER_FUNCTIONS
    try:
        with changed_network(name, network.objective, options, units=units) as changed:
            other = Network(changed.objective, options, network.report, changed=True)
            every = [_own_block(block, changed, network, other) for block in explained.blocks]
            names = [n for block in every if block.skipped is None for n in block.parameters]
            checks = run_selfchecks(
                fitting(other),
                other.select(list(dict.fromkeys(names))),
                curvature=options.curvature,
                seed=options.seed,
                engine=options.engine,
            )
            halves = _halves(network, changed)
            other.prepare(changed.objective.value(), checks, halves)
            other.deadline = network.deadline
            if len(changed.objective.batches.items) < len(network.objective.batches.items):
                items = network.objective.batches.items
                other.batch_rows = tuple(row_count(batch) for batch in items)
            own = [block for block in every if share.owns(block)]
            rows.compute(Stage(other, own, variants, same_function=same, notes=changed.notes))
            told = _explained(explained, other, variants, name, rows.failed, changed.changed)
            return [*(f"{name}: {notice}" for notice in checks.notices), *told]
    except NotEnoughMemory as reason:
        rows.skip(blocks, variants, str(reason), dtype=options.dtype, same_function=same)
        rows.limited.append(name)
    except NotApplicable as reason:
        rows.skip(blocks, variants, str(reason), dtype=options.dtype, same_function=same)
    except (StoreError, OutOfResources):
        raise  # of the journal: no row failed
    except FAILURES as error:
        failure = why(network.told(error, name))
        rows.skip(blocks, variants, failure, dtype=options.dtype, same_function=same, failed=True)
    return []


def _explained(
    explained: Explained,
    network: Network,
    variants: Sequence[Variant],
    name: str,
    failed: list[str],
    changed: Collection[str] | None = None,
) -> list[str]:
    """Explain the layers; what fails there is a warning, and costs no row its numbers."""
    try:
        explained.add(network, variants, changed)
    except Exception as error:  # it explains the rows, and may cost none of them
        failed.append(f"H_e of {name}")
        told = network.told(error, f"H_e of {name}")
        return [f"H_e of {name} is not complete: {why(told)}"]
    return []


def _halves(network: Network, changed: Changed) -> list[Objective]:
    """Both halves of the data, each in one batch where the change joined all into one."""
    joined = len(changed.objective.batches.items) < len(network.objective.batches.items)
    found = []
    for half in network.halves:
        batches = half.batches
        if joined and len(batches.items) > 1:
            batches = replace(batches, items=(join(batches.items),), shares=(1.0,))
        found.append(replace(half, loss=changed.objective.loss, batches=batches))
    return found


def _own_block(block: Block, changed: Changed, network: Network, other: Network) -> Block:
    """A block of the changed network: without what is gone, with a bias that was put in."""
    if block.skipped is not None:
        return block
    made = [name for name in other.named if name not in network.named]
    names: list[str] = []
    for name in block.parameters:
        names += [] if name in changed.gone else [name]
        layer = layer_of(name)
        names += [new for new in made if layer_of(new) == layer and new not in names]
    if not names:
        reasons = dict.fromkeys(changed.gone[name] for name in block.parameters)
        return replace(block, parameters=(), size=0, skipped="; ".join(reasons))
    if block.name == WHOLE:
        names = [name for name in other.named if name in names]
    size = sum(other.named[name].numel() for name in names)
    return replace(block, parameters=tuple(names), size=size)
