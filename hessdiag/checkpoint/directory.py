"""Directories: those of Hugging Face and of its Trainer, and what else a directory may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hessdiag.checkpoint import refusals
from hessdiag.checkpoint.contents import Checkpoint, is_optimizer
from hessdiag.checkpoint.json_file import read_object
from hessdiag.checkpoint.sharded import read_sharded
from hessdiag.checkpoint.torch_file import load
from hessdiag.errors import CheckpointError

FORMAT = "Hugging Face directory"
CONFIG = "config.json"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers looks for them."""

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
LISTED = 6


def read_directory(path: Path, read_file: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Read a directory of ``save_pretrained``, or one that the Trainer left.

    Its ``training_args.bin`` is a pickle, and never loaded.

    Args:
        path: The directory.
        read_file: Reads one file of weights.

    Raises:
        CheckpointError: It holds no weights under the usual names, or they cannot be read; the
            message says what the directory is and what to give instead.
    """
    if not path.name or path.name == "..":
        path = path.resolve()  # the name is what tables and the run file are called
    there = [name for name in WEIGHTS if (path / name).is_file()]
    if not there:
        raise CheckpointError(_why_not(path))
    name, *others = there
    if name.endswith(".index.json"):
        read = read_sharded(path / name, read_file)
    else:
        read = read_file(path / name)
    notices = list(read.notices)
    if others:
        notices.append(f"the weights are those in {name}; {', '.join(others)} beside it not used")
    config = read_object(path / CONFIG) if (path / CONFIG).exists() else None
    return replace(
        read,
        path=path,
        format=FORMAT if config is not None or (path / STATE).is_file() else "directory of weights",
        optimizer=_optimizer(path / OPTIMIZER, notices),
        task=None,
        step=_step(path / STATE, notices),
        config=config,
        notices=notices,
    )


def _optimizer(path: Path, notices: list[str]) -> dict[str, Any] | None:
    """The optimizer's state, if it is there and can be read without running anything."""
    if not path.is_file():
        return None
    try:
        found = load(path, trust=False)
    except CheckpointError as error:
        notices.append(f"the optimizer's state is not used: {error}")
        return None
    if not is_optimizer(found):
        notices.append(f"{path.name} holds no optimizer.state_dict(); it is not used")
        return None
    return dict(found)


def _step(path: Path, notices: list[str]) -> int | None:
    if not path.is_file():
        return None
    try:
        step = read_object(path).get("global_step")
    except CheckpointError as error:
        notices.append(f"the step is not known: {error}")
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _why_not(path: Path) -> str:
    """What a directory without weights under the usual names is, and what to give instead."""
    names = sorted(entry.name for entry in path.iterdir())
    if ".metadata" in names:
        return refusals.distributed(path)
    inside = [name for name in names if (path / name / ".metadata").is_file()]
    if inside:
        return refusals.distributed(path / inside[0])
    if "adapter_config.json" in names:
        return refusals.adapter(path)
    steps = [n for n in names if any((path / n / weights).is_file() for weights in WEIGHTS)]
    if steps:
        return refusals.checkpoints_inside(path, _cut(steps))
    files = [name for name in names if name.endswith(SUFFIXES)]
    if files:
        return (
            f"{path} is a directory without weights under a usual name ({', '.join(WEIGHTS)}); "
            f"give the file itself: {', '.join(str(path / name) for name in _cut(files))}"
        )
    what = "a Hugging Face directory" if CONFIG in names else "a directory"
    return (
        f"{path} is {what} without weights: none of {', '.join(WEIGHTS)} is there; "
        "give the path of a checkpoint file, or of a directory that holds one of these"
    )


def _cut(names: list[str]) -> list[str]:
    return [*names[:LISTED], *(["…"] if len(names) > LISTED else [])]
