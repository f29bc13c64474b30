"""What may be merged: runs of one analysis, every shard once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hessdiag.errors import StoreError
from hessdiag.merging.sources import Source, command
from hessdiag.shard import Shard, blocks_of
from hessdiag.store.identity import differing

JOINED = {"shard", "variants", "memory"}
"""Fields of the fingerprint by which runs that are joined differ."""
HINTS = {
    "seed": "the numbers of each seed are an estimate of their own, so runs of several seeds stay "
    "files of their own: compare them with `hessdiag diff`",
    "device_type": "run all shards on one kind of device: give --device",
    "blocks": "give all runs the same --blocks",
}
"""By field, what to do; for all others the runs are of different analyses."""


def check_same_analysis(first: Source, other: Source) -> None:
    """Refuse a run that no analysis has in common with the first.

    Raises:
        StoreError: The message names what differs.
    """
    ours, theirs = first.fingerprint, other.fingerprint
    found = differing(ours, theirs)
    # Of variants that replay gradients only, the order of the batches is told.
    apart = set() if "batches" in ours and "batches" in theirs else {"batches"}
    names = sorted(set(found) - JOINED - apart)
    if first.run.hessdiag_version != other.run.hessdiag_version:
        names.append("hessdiag_version")
    if not names:
        return
    hints = [HINTS[name] for name in names if name in HINTS]
    raise StoreError(
        f"{other.path} is not of the analysis of {first.path}: {', '.join(names)} "
        f"{'differs' if len(names) == 1 else 'differ'}; "
        + (hints[0] if hints else "merge joins the shards, and the variants, of one analysis")
    )


def complete(group: Sequence[Source]) -> list[Source]:
    """The runs of one list of variants, by shard.

    Raises:
        StoreError: One is missing, or there twice.
    """
    first = group[0]
    for other in group[1:]:
        if first.shard is None or other.shard is None:
            raise StoreError(
                f"{(other if other.shard is None else first).path} holds all blocks, and "
                f"{(first if other.shard is None else other).path} the same ones again; "
                "merge the shards of one analysis, or name the run of all blocks alone"
            )
        if first.shard.count != other.shard.count:
            raise StoreError(
                f"{first.path} is shard {first.shard}, {other.path} is shard {other.shard}: two "
                "ways to split the analysis; name the shards of one of them"
            )
    if first.shard is None:
        return [first]
    found: dict[int, Source] = {}
    for source in group:
        number = source.shard.number if source.shard else 0
        if number in found:
            raise StoreError(
                f"shard {source.shard} is there twice, {found[number].path} and {source.path}; "
                "name one of them"
            )
        found[number] = source
    _check_all_there(first, found)
    return [found[number] for number in sorted(found)]


def _check_all_there(first: Source, found: Mapping[int, Source]) -> None:
    count = first.shard.count if first.shard else 1
    missing = [number for number in range(1, count + 1) if number not in found]
    if missing:
        named = ", ".join(f"{number}/{count}" for number in missing[:8])
        named += f", … ({len(missing)} in all)" if len(missing) > 8 else ""
        one = len(missing) == 1
        raise StoreError(
            f"the shard{'s' * (not one)} {named} {'is' if one else 'are'} missing; "
            f"{'make it by' if one else 'make each like the first:'} "
            f"{command(first.run, Shard(missing[0], count))}"
        )
    wanted = blocks_of(first.run)
    held = sorted(block.name for source in found.values() for block in source.run.blocks)
    if held != sorted(wanted) or any(blocks_of(s.run) != wanted for s in found.values()):
        lost = sorted(set(wanted) - set(held))
        raise StoreError(
            "the shards do not make up the analysis: "
            f"{f'no shard has {lost[0]!r}' if lost else 'a block is in two of them'}; "
            "analyse them again with one release of hessdiag"
        )
