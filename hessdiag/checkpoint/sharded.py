"""Weights in several files, put together by the index beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from torch import Tensor

from hessdiag.checkpoint.contents import Checkpoint, listed
from hessdiag.checkpoint.json_file import read_object
from hessdiag.errors import CheckpointError

INDEX = ".index.json"
LISTED = 6


def is_index(path: Path) -> bool:
    """Whether a file is the index of sharded weights, by its name."""
    return path.name.endswith(INDEX)


def read_sharded(path: Path, read_file: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Read every shard that an index names, each tensor from the shard that it names for it.

    Args:
        path: The ``*.safetensors.index.json`` or ``*.bin.index.json``.
        read_file: Reads one shard.

    Raises:
        CheckpointError: The index is none, a shard is missing, cannot be read or lies outside of
            the folder, or a tensor is not where the index says.
    """
    weight_map = _weight_map(path)
    by_shard: defaultdict[str, list[str]] = defaultdict(list)
    for name, shard in weight_map.items():
        by_shard[shard].append(name)
    missing = [shard for shard in by_shard if not _inside(path, shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} names shards that are not there ({len(missing)} of {len(by_shard)}): "
            f"{listed(missing, LISTED)}; copy them into {path.parent}"
        )
    weights: dict[str, Tensor] = {}
    unlisted: dict[str, Tensor] = {}
    formats: dict[str, None] = {}
    for shard, names in by_shard.items():
        held = read_file(_inside(path, shard))
        formats[held.format] = None
        absent = [name for name in names if name not in held.weights]
        if absent:
            raise CheckpointError(
                f"{path} says that {shard} holds {listed(absent, LISTED)} ({len(absent)} of "
                f"{len(names)}), and it does not; copy the shards and the index again"
            )
        weights |= {name: held.weights[name] for name in names}
        for name in held.weights.keys() - weight_map.keys():
            if name in unlisted:
                raise CheckpointError(
                    f"two shards of {path} hold {name}, which the index does not name; "
                    "save the model again"
                )
            unlisted[name] = held.weights[name]
    notices = []
    if unlisted:
        notices.append(
            f"{len(unlisted)} tensors of the shards are not in the index, and are taken, too: "
            f"{listed(sorted(unlisted), LISTED)}"
        )
        weights |= {name: unlisted[name] for name in sorted(unlisted)}
    ordered = {name: weights[name] for name in (*weight_map, *sorted(unlisted))}
    kind = f"{' and '.join(formats)} in {len(by_shard)} shard{'s' * (len(by_shard) != 1)}"
    return Checkpoint(path, kind, ordered, notices=notices)


def _weight_map(path: Path) -> dict[str, str]:
    found = read_object(path).get("weight_map")
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(shard, str) for shard in found.values())
    ):
        raise CheckpointError(
            f"{path} is no index of shards: it needs a weight_map of tensor names and files; "
            "give a file of weights, or its directory"
        )
    return found


def _inside(path: Path, shard: str) -> Path:
    """The shard's path; its name must not lead out of the index's folder.

    A link inside is followed: the hub's cache keeps the files elsewhere.
    """
    climbs = ".." in (*PurePosixPath(shard).parts, *PureWindowsPath(shard).parts)
    rooted = PurePosixPath(shard).is_absolute() or PureWindowsPath(shard).anchor
    if climbs or rooted or not shard.strip() or "\0" in shard:
        raise CheckpointError(
            f"{path} names the shard {shard!r}, which is not inside its own folder; nothing was "
            "read. Take the model from whom you trust"
        )
    return path.parent / shard
