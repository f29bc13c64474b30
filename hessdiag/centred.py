"""Which weights read what a layer normalisation has centred."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hessdiag.activations import find_layers
from hessdiag.names import named_parameters
from hessdiag.variants.scene import Scene

CENTRED = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Σ (h - beta) / gamma of a layer normalisation's output, relative to the sum of the sizes."""

_KEY = "layers after layer normalisation"


@dataclass(frozen=True)
class Centred:
    """Weights whose inputs are, on all data, the output of a layer normalisation.

    Attributes:
        norm: Which.
        weight: First name, of (outputs, features).
        bias: First name, or None.
        rows: How many of the outputs, from the first, read it.
    """

    norm: nn.LayerNorm
    weight: str
    bias: str | None
    rows: int


def centred_inputs(scene: Scene) -> list[Centred]:
    """Found by Σ (h - beta) / gamma = 0 in every sample, in one pass over the data per network."""
    if _KEY in scene.cache:
        return cast("list[Centred]", scene.cache[_KEY])
    norms = [m for m in scene.model.modules() if isinstance(m, nn.LayerNorm)]
    norms = [m for m in norms if len(m.normalized_shape) == 1 and bool(affine_of(m)[0].all())]
    readers = {c.weight: c for c in _readers(scene)} if norms else {}
    possible = {
        name: [m for m in norms if m.normalized_shape[0] == scene.named[name].shape[1]]
        for name in readers
    }
    rows: dict[str, int] = {}

    def look(reader: _Reader, value: Tensor, read: int) -> None:
        rows[reader.weight] = min(rows.get(reader.weight, read), read)
        possible[reader.weight] = [m for m in possible[reader.weight] if _is_centred(value, m)]

    with ExitStack() as stack:
        for reader in readers.values():
            stack.callback(reader.watch(look).remove)
        if any(possible.values()):
            for batch, _ in scene.objective:
                scene.objective.evaluate(batch)
    found = [
        Centred(possible[name][0], name, reader.bias, rows[name])
        for name, reader in readers.items()
        if possible[name] and rows.get(name)
    ]
    scene.cache[_KEY] = found
    return found


@dataclass(frozen=True)
class _Reader:
    """A module that multiplies its input with a weight (outputs, features)."""

    module: nn.Module
    weight: str
    bias: str | None

    def watch(self, look: Any) -> Any:
        """Show ``look`` every input, and how many outputs read it."""

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = ("query", "key", "value")
            if isinstance(module, nn.MultiheadAttention):
                given = dict(zip(names, args, strict=False)) | kwargs
                same = all(given[name] is given["query"] for name in names)
                look(self, given["query"].detach(), (3 if same else 1) * module.embed_dim)
            else:
                value = args[0] if args else kwargs["input"]
                look(self, value.detach(), cast("Tensor", module.weight).shape[0])

        return self.module.register_forward_pre_hook(enter, with_kwargs=True)


def _readers(scene: Scene) -> Iterator[_Reader]:
    for layer in find_layers(scene.model).values():
        if layer.kind == "linear" and not layer.shared:
            yield _Reader(layer.module, layer.weight, layer.bias)
    first = {id(parameter): name for name, parameter in named_parameters(scene.model)}
    for module in scene.model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            bias = None if module.in_proj_bias is None else first[id(module.in_proj_bias)]
            yield _Reader(module, first[id(module.in_proj_weight)], bias)


def affine_of(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Gamma and beta; 1 and 0 where it has none."""
    gamma, beta = norm._parameters.get("weight"), norm._parameters.get("bias")
    size = norm.normalized_shape[0]
    like = torch.ones(size, dtype=torch.float64) if gamma is None else gamma.detach()
    return like, torch.zeros_like(like) if beta is None else beta.detach()


def _is_centred(value: Tensor, norm: nn.LayerNorm) -> bool:
    gamma, beta = (moment.to(value) for moment in affine_of(norm))
    normal = (value - beta) / gamma
    total, size = normal.sum(dim=-1).abs(), normal.abs().sum(dim=-1)
    return bool((total <= CENTRED[value.dtype] * (size + 1e-30)).all())
