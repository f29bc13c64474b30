"""What makes two runs the same: hashes of everything that changes a number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.checkpoint.optimizer import OptimizerState
from hessdiag.curvature.loan import bare
from hessdiag.data import Batches, leaves, tensor_bytes
from hessdiag.names import named_parameters
from hessdiag.options import Options, exact_limit
from hessdiag.task import Task
from hessdiag.variants.grammar import REPLAYED, parse_variant

# Options that change no number; device enters by its type, iterates and reference by what they
# hold, and a row that max_seconds cut short says so in its notes.
NEUTRAL = {"engine", "memory_budget", "device", "max_seconds", "iterates", "reference"}


def make_fingerprint(
    task: Task,
    weights: str,
    batches: Batches,
    optimizer: OptimizerState | None,
    loss: float,
    device_type: str,
    options: Options,
    constrained: Mapping[str, Any],
) -> dict[str, Any]:
    """Hashes of weights, optimizer state, data and structure, and the options by name.

    The memory budget is neutral but for what it does not allow, which ``constrained`` lists.
    """
    model = bare(task.model)
    fields: dict[str, Any] = {
        "weights": weights,
        "optimizer": _hash_optimizer(optimizer),
        "data": batches.digest,
        "structure": hashlib.sha256(_structure(model).encode()).hexdigest(),
        "loss": loss,
        "mode": task.mode,
        "device_type": device_type,
        "memory": dict(constrained),
    }
    for name in Options.__dataclass_fields__:
        if name not in NEUTRAL:
            value = getattr(options, name)
            fields[name] = list(value) if isinstance(value, tuple) else value
    if options.engine == "difference":
        # The other engines agree to rounding; its products do not.
        fields["engine"] = options.engine
    if any(parse_variant(name).coordinates in REPLAYED for name in options.variants or ()):
        fields["batches"] = _hash_in_order(batches)
    fields["exact_limit"] = exact_limit(options, device_type)
    return fields


def _hash_in_order(batches: Batches) -> str:
    """Of the batches one after the other: replayed gradients depend on how the data are cut."""
    digest = hashlib.sha256()
    for batch in batches.items:
        for tensor in leaves(batch):
            digest.update(json.dumps([list(tensor.shape), str(tensor.dtype)]).encode())
            digest.update(tensor_bytes(tensor))
        digest.update(b"end of batch")
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """One hash of named tensors: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _hash_optimizer(optimizer: OptimizerState | None) -> str | None:
    if optimizer is None:
        return None
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{parameter} {key}"] = torch.as_tensor(value)
    # Class and groups decide how weight decay acts even where the state cannot be used.
    about = [optimizer.groups, optimizer.class_name, optimizer.group_of, optimizer.unmappable]
    told = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256((hash_tensors(tensors) + told).encode()).hexdigest()


def _structure(model: nn.Module) -> str:
    shapes = [(name, tuple(p.shape)) for name, p in named_parameters(model)]
    return f"{model!r}\n{shapes}"
