"""Which module is at fault when a self-check fails."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from hessdiag.curvature.objective import Objective
from hessdiag.data import leaves, tensor_bytes
from hessdiag.names import clean_name, layer_of, named_parameters


def layers_of(
    objective: Objective, chosen: Sequence[nn.Parameter]
) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """The chosen parameters by layer, each with what a message should call it."""
    wanted = {id(p) for p in chosen}
    model = objective.model
    modules = {clean_name(name): module for name, module in model.named_modules()}
    grouped: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named_parameters(model):
        if id(parameter) in wanted:
            grouped.setdefault(layer_of(name), []).append(parameter)
    for layer, parameters in grouped.items():
        module = modules.get(layer)
        kind = type(module).__name__ if module is not None else "parameter"
        if module is not None and _has_weight_norm(module):
            kind = f"{kind.removeprefix('Parametrized')} with weight_norm"
        yield f"module {layer!r} ({kind})", parameters


def _has_weight_norm(module: nn.Module) -> bool:
    hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    inner = [type(child).__name__ for child in module.modules()]
    return "WeightNorm" in hooks or "_WeightNorm" in inner


def find_unrepeatable(objective: Objective) -> str:
    """The innermost module whose output differs between two passes on equal input.

    Cost:
        Two forwards of the first batch, with every module's input and output hashed.
    """
    first, second = _trace(objective), _trace(objective)
    for before, after in zip(first, second, strict=False):
        name, inputs, outputs, label = before
        if name == after[0] and inputs == after[1] and outputs != after[2]:
            return f"{label} gives another output for the same input."
    return "no single module does; look at the loss function itself."


def _trace(objective: Objective) -> list[tuple[str, str, str, str]]:
    calls: list[tuple[str, str, str, str]] = []
    waiting: list[str] = []
    handles = []
    for name, module in objective.model.named_modules():
        label = f"module {clean_name(name)!r} ({type(module).__name__})" if name else "the model"

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            waiting.append(_hash((args, kwargs)))

        def leave(
            _module: nn.Module, _args: Any, output: Any, name: str = name, label: str = label
        ) -> None:
            calls.append((name, waiting.pop(), _hash(output), label))

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        objective.evaluate(objective.batches.items[0])
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _hash(value: Any) -> str:
    digest = hashlib.sha256()
    for tensor in leaves(value):
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
