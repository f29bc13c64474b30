"""What a checkpoint holds once it is read: weights, optimizer state, and what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from hessdiag.errors import CheckpointError

WEIGHT_KEYS = (
    "model_state_dict",
    "state_dict",
    "model",
    "model_state",
    "network",
    "net",
    "module",
    "weights",
)
OPTIMIZER_KEYS = (
    "optimizer_state_dict",
    "optimizer",
    "optimizer_state",
    "optim_state_dict",
    "optim",
    "opt",
    "opt_state_dict",
    "optimizers",
    "optimizer_states",
)
STEP_KEYS = ("step", "global_step", "iteration", "steps")
EXTRA_STATE = "_extra_state"
LIGHTNING = "pytorch-lightning_version"
"""The key that every checkpoint of Lightning's Trainer has."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the CPU, in the names that its file uses.

    Attributes:
        path: The file, or the directory.
        format: What the file is, in words for a person.
        weights: Every tensor of the network's state dict, by its name in the file.
        optimizer: The optimizer's raw ``state_dict()``, where there is one.
        task: The reference under ``hessdiag.task`` in the file; it is a stranger's word.
        step: Training steps done, where the file says.
        config: The ``config.json`` of a Hugging Face directory; it is a stranger's word.
        embedded: The network may be one part of what the file holds (Lightning).
        notices: What a user should know about how the file was read.
    """

    path: Path
    format: str
    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None = None
    task: str | None = None
    step: int | None = None
    config: dict[str, Any] | None = None
    embedded: bool = False
    notices: list[str] = field(default_factory=list)


def interpret(loaded: object, path: Path, container: str) -> Checkpoint:
    """Find the weights and the optimizer's state in what a torch file held.

    Args:
        loaded: The unpickled object, on the CPU.
        path: Its file, for messages.
        container: How the file was stored, in brackets after the format's name.

    Raises:
        CheckpointError: There is no network's state in it, or more than one.
    """
    if isinstance(loaded, nn.Module):
        notices: list[str] = []
        weights = _tensors(loaded.state_dict(), notices)
        return Checkpoint(path, f"pickled module ({container})", weights, notices=notices)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}, not the weights of a network; "
            "save model.state_dict() with torch.save"
        )
    if is_optimizer(loaded):
        raise CheckpointError(
            f"{path} holds an optimizer's state and no weights; save "
            '{"model": model.state_dict(), "optimizer": optimizer.state_dict()} with torch.save'
        )
    notices = []
    lightning = LIGHTNING in loaded
    key = (
        _lightning_key(loaded, path, notices) if lightning else _weights_key(loaded, path, notices)
    )
    if key is None:
        state: Mapping[Any, Any] = {k: v for k, v in loaded.items() if k != "hessdiag"}
        weights, name = _tensors(state, notices), "state dict"
    else:
        held = loaded[key]
        weights = _tensors(held.state_dict() if isinstance(held, nn.Module) else held, notices)
        name = "Lightning checkpoint" if lightning else "training checkpoint"
    if not weights:
        raise CheckpointError(
            f"{path} holds no weights (keys: {listed(loaded)}); "
            "save model.state_dict() with torch.save"
        )
    hollow = [name for name, tensor in weights.items() if tensor.is_meta]
    if hollow:
        raise CheckpointError(
            f"{path} holds tensors on the meta device, which have no values ({listed(hollow)}); "
            "save the state_dict() of a model that was given its weights"
        )
    return Checkpoint(
        path,
        f"{name} ({container})",
        weights,
        optimizer=_optimizer(loaded, notices) if key is not None else None,
        task=_task(loaded),
        step=_step(loaded),
        embedded=lightning,
        notices=notices,
    )


def _weights_key(loaded: Mapping[Any, Any], path: Path, notices: list[str]) -> Any:
    """The key of the network's state in a training dict; None if this is a state dict itself."""
    inner = [k for k, v in loaded.items() if isinstance(v, nn.Module) or _is_state_dict(v)]
    known = [k for k in WEIGHT_KEYS if k in inner]
    if not inner or (not known and any(isinstance(v, Tensor) for v in loaded.values())):
        return None
    if not known and len(inner) > 1:
        raise CheckpointError(
            f"{path} holds several networks ({', '.join(map(str, inner))}) and none under a usual "
            f"name ({', '.join(WEIGHT_KEYS[:3])}, …); save the one to diagnose on its own"
        )
    key = known[0] if known else inner[0]
    others = [str(k) for k in inner if k != key]
    if others or not known:
        unused = f"; it also holds {', '.join(others)}, not used" if others else ""
        notices.append(f"the weights are those under {str(key)!r} in the file{unused}")
    return key


def _lightning_key(loaded: Mapping[Any, Any], path: Path, notices: list[str]) -> str:
    """The key of the LightningModule's state, averaged if the WeightAveraging callback ran."""
    if not _is_state_dict(loaded.get("state_dict")):
        raise CheckpointError(
            f"{path} is a Lightning checkpoint without weights (keys: {listed(loaded)}); "
            "save it again with trainer.save_checkpoint(FILE)"
        )
    if "current_model_state" in loaded:
        notices.append("the weights are the running average that Lightning's WeightAveraging kept")
    return "state_dict"


def _is_state_dict(value: object) -> bool:
    """Flat, named, and at least one tensor: not an optimizer's state, which nests."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(v, Tensor | np.ndarray) for v in value.values())
        and not ("state" in value and "param_groups" in value)
    )


def is_optimizer(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether this has the form of a torch optimizer's ``state_dict()``."""
    if not isinstance(value, Mapping):
        return False
    groups = value.get("param_groups")
    return (
        isinstance(value.get("state"), Mapping)
        and isinstance(groups, list)
        and all(isinstance(group, Mapping) and _has_members(group) for group in groups)
    )


def _has_members(group: Mapping[Any, Any]) -> bool:
    members = group.get("params")
    return isinstance(members, list | tuple) and all(isinstance(m, int | str) for m in members)


def _tensors(state: Mapping[Any, Any], notices: list[str]) -> dict[str, Tensor]:
    """The tensors of a state dict; the rest is named in a notice."""
    weights: dict[str, Tensor] = {}
    dropped: list[str] = []
    for name, value in state.items():
        if str(name).rsplit(".", 1)[-1] == EXTRA_STATE:
            dropped.append(str(name))
        elif isinstance(value, Tensor) and not value.is_nested:
            weights[str(name)] = value.detach()
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            weights[str(name)] = torch.from_numpy(value)
        else:
            dropped.append(str(name))
    if dropped and weights:
        notices.append(
            f"left out {len(dropped)} entries of the file that are no weights: {listed(dropped)}"
        )
    return weights


def _optimizer(loaded: Mapping[Any, Any], notices: list[str]) -> dict[str, Any] | None:
    for key in OPTIMIZER_KEYS:
        held = loaded.get(key)
        found = [held] if isinstance(held, Mapping) else held
        if not isinstance(found, list | tuple) or not found:
            continue
        if len(found) > 1:
            notices.append(f"{key!r} holds {len(found)} optimizers; their state is not used")
        elif is_optimizer(found[0]):
            return dict(found[0])
        else:
            notices.append(f"{key!r} holds no optimizer.state_dict(); it is not used")
    return None


def _task(loaded: Mapping[Any, Any]) -> str | None:
    own = loaded.get("hessdiag")
    task = own.get("task") if isinstance(own, Mapping) else None
    return task if isinstance(task, str) else None


def _step(loaded: Mapping[Any, Any]) -> int | None:
    for key in STEP_KEYS:
        value = loaded.get(key)
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
            value = value.item()
        if isinstance(value, int | np.integer) and not isinstance(value, bool):
            return int(value) if abs(int(value)) < 1 << 63 else None
    return None


def listed(names: Iterable[object], limit: int = 8) -> str:
    """The first names in a row, for a message."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:limit]) + (", …" if len(shown) > limit else "")
