"""Symmetries of the loss in a block: why some of its eigenvalues are zero, or arbitrary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hessdiag.activations import Layer, find_layers
from hessdiag.errors import SelfCheckFailed
from hessdiag.invariance import Probe, probed, scale_invariant
from hessdiag.names import clean_name, named_parameters
from hessdiag.variants.scene import Scene
from hessdiag.variants.tracing import BATCH_NORMS, NORMS
from hessdiag_probes.types import Vector

INSTANCE_NORMS = nn.modules.instancenorm._InstanceNorm
BATCHED = (BATCH_NORMS, INSTANCE_NORMS)
"""They subtract each channel's own mean, and with it a bias."""
CENTRED = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Σ (h - beta) / gamma of a layer normalisation's output, relative to the sum of the sizes."""
KEYS = {"k", "key", "keys", "k_proj", "key_proj", "to_k", "wk", "k_lin", "linear_k", "lin_k"}

_ORDER = "order of the layers"
_CENTRED = "layers after layer normalisation"


def find_symmetries(
    scene: Scene, gradient: Vector | None = None, tolerance: float | None = None
) -> list[str]:
    """The symmetries of the block that maths.md 4.5 lists, each confirmed by products.

    Args:
        scene: Of the block, at the parameters where the symmetries are sought.
        gradient: Of the loss without weight decay, (n,); None computes it.
        tolerance: What ``H v`` of a unit vector may be by rounding alone; None estimates it.
    Returns:
        One short sentence each, the same for the same network; empty where there are none, or
        where the loss has no double backward.
    Cost:
        Two gradients and two forward passes at most, and two products for each symmetry whose
        first-order part holds: none for a block without any.
    Source:
        maths.md 4.5.
    """
    found: list[str] = []
    try:
        with probed(scene, gradient, tolerance) as probe:
            found += [
                f"scale-invariant: {' + '.join(groups.names)} ({_counted(len(groups.places))})"
                for groups in scale_invariant(probe)
            ]
            found += _shifts(probe)
            found += _rescalings(probe)
            found += _null_vectors(probe)
            found += _zero_rows(probe)
    except SelfCheckFailed:
        return []
    return found


def _counted(groups: int) -> str:
    return f"{groups} group{'s' if groups != 1 else ''}"


def _layers(scene: Scene) -> Iterator[Layer]:
    """The layers whose weights are in the block and are nobody else's."""
    for layer in find_layers(scene.model).values():
        if layer.weight in scene.block.parameters and not layer.shared:
            yield layer


def _shifts(probe: Probe) -> list[str]:
    """The same vector added to the weights of all outputs, which a softmax does not see."""
    scene, found = probe.scene, []
    places = probe.places
    for layer in _layers(scene):
        if layer.groups > 1:
            continue
        rows = places[layer.weight].reshape(layer.outputs, -1)
        if layer.bias in places:
            rows = torch.cat([rows, places[layer.bias][:, None]], dim=1)
        direction = torch.zeros_like(probe.position)
        direction[rows] = probe.coefficients(rows.shape[1], f"shift of {layer.name}").expand_as(
            rows
        )
        if probe.level(direction) and probe.maps(direction):
            after = next(iter(_order(scene).norms_after(layer.module)), None)
            found.append(f"shift before {after}: {layer.name}" if after else "softmax shift")
    return found


def _rescalings(probe: Probe) -> list[str]:
    """Weights into a unit times c, those out of it by c: a ReLU between passes that on."""
    scene, found = probe.scene, []
    places = probe.places
    order = _order(scene)
    layers = {layer.module: layer for layer in _layers(scene)}
    for before, after in zip(order.modules, order.modules[1:], strict=False):
        inner, outer = _unit_places(scene, places, before), layers.get(after)
        if inner is None or outer is None or not len(inner):
            continue
        units = len(inner)
        width = outer.tensor.shape[1]
        fits = width == units if outer.kind == "conv" else width % units == 0
        if not fits or outer.groups > 1 or before is after:
            continue
        leaving = places[outer.weight].reshape(outer.outputs, units, -1)
        leaving = leaving.transpose(0, 1).reshape(units, -1)
        if not probe.balanced(inner, leaving):
            continue
        each = probe.coefficients(units, f"rescaling of {order.names[before]}")[:, None]
        sign = torch.zeros_like(probe.position)
        sign[inner], sign[leaving] = each.expand_as(inner), -each.expand_as(leaving)
        if probe.maps(sign * probe.position, -sign * probe.gradient):
            kind = "ReLU rescaling" if before in layers else "rescaling"
            found.append(f"{kind}: {order.names[before]} – {order.names[after]}")
    return found


def _unit_places(scene: Scene, places: dict[str, Tensor], module: nn.Module) -> Tensor | None:
    """The parameters that make each output of ``module``, (units, parameters of one)."""
    names = _order(scene).parameters.get(module)
    if not names or any(name not in places for name in names):
        return None
    weight = scene.named[names[0]]
    return torch.cat([places[name].reshape(weight.shape[0], -1) for name in names], dim=1)


def _null_vectors(probe: Probe) -> list[str]:
    """After LayerNorm: w += c / gamma, b -= c Σ beta / gamma leaves a neuron's output alone."""
    scene, places, count = probe.scene, probe.places, 0
    for consumer in _centred(scene):
        if consumer.weight not in places:
            continue
        norm = consumer.norm
        stretch = _affine_of(norm)[0].to(probe.position).reciprocal()
        shift = float((_affine_of(norm)[1].to(probe.position) * stretch).sum())
        rows = places[consumer.weight].reshape(-1, len(stretch))[: consumer.rows]
        each = probe.coefficients(len(rows), f"null vectors of {consumer.weight}")
        direction = torch.zeros_like(probe.position)
        direction[rows] = each[:, None] * stretch
        if consumer.bias in places:
            direction[places[consumer.bias][: consumer.rows]] = -each * shift
        elif shift != 0:
            continue
        if probe.level(direction) and probe.maps(direction):
            count += len(rows)
    return [f"LayerNorm null vectors: {count}"] if count else []


def _zero_rows(probe: Probe) -> list[str]:
    """Parameters without any effect: by name where the reason is known, else counted."""
    scene = probe.scene
    drift = probe.tolerance * float(probe.position.norm())
    flat = probe.gradient.abs() <= probe.small * probe.gradient.abs().amax() + drift
    dead = scene.dead.to(flat.device) & flat
    places = probe.places
    found: list[str] = []
    reason: str | None
    for name, where in places.items():
        head, is_bias, _ = name.rpartition("bias")
        weight = places.get(f"{head}weight")
        if not is_bias:
            continue
        reason, rows = "key bias", _middle_third(dead, where, weight)
        if rows is None and weight is not None and _only_bias(dead, where, weight):
            reason, rows = _reason_without_effect(scene, name), where
        if reason is not None and rows is not None:
            found.append(f"{reason}: {name}")
            dead[rows] = False
    count = int(dead.sum())
    return [*found, f"dead: {count} row{'s' if count != 1 else ''}"] if count else found


def _only_bias(dead: Tensor, bias: Tensor, weight: Tensor) -> bool:
    """Whether biases have no effect where their weights have one."""
    return bool(dead[bias].all()) and not bool(dead[weight].all())


def _middle_third(dead: Tensor, bias: Tensor, weight: Tensor | None) -> Tensor | None:
    """The keys' part of a bias of queries, keys and values, where that alone has no effect."""
    third, left = divmod(len(bias), 3)
    if left or weight is None or len(weight) % len(bias):
        return None
    parts = bias.reshape(3, third)
    if not _only_bias(dead, parts[1], weight.reshape(3, -1)[1]):
        return None
    return None if bool(dead[parts[[0, 2]]].all()) else parts[1]


def _reason_without_effect(scene: Scene, bias: str) -> str | None:
    """Why the rows of a bias are zero while those of its weight are not."""
    owner = bias.removesuffix(".bias")
    if owner.rpartition(".")[2].lower() in KEYS:
        return "key bias"
    order = _order(scene)
    module = next((m for m, name in order.names.items() if name == owner), None)
    if module not in order.modules:
        return None
    after = order.modules[order.modules.index(module) + 1 :]
    return f"bias before {_kind(after[0])}" if after and isinstance(after[0], BATCHED) else None


@dataclass(frozen=True)
class _Order:
    """The layers and normalisations of the network in the order of their (last) calls.

    Attributes:
        modules: In that order.
        names: Of the modules.
        parameters: First names of weight and bias, where the module has these.
    """

    modules: list[nn.Module]
    names: dict[nn.Module, str]
    parameters: dict[nn.Module, list[str]]

    def norms_after(self, module: nn.Module) -> list[str]:
        """The kinds of the normalisations that are called after ``module``, in order."""
        if module not in self.modules:  # torch's attention uses the weights of out_proj itself
            owners = [m for m in self.modules if module in m.children()]
            if not owners:
                return []
            module = owners[0]
        after = self.modules[self.modules.index(module) + 1 :]
        return [_kind(m) for m in after if isinstance(m, (*NORMS, INSTANCE_NORMS))]


def _kind(module: nn.Module) -> str:
    return type(module).__name__.rstrip("123d")


def _order(scene: Scene) -> _Order:
    """Found on the first batch, once per network."""
    if _ORDER in scene.cache:
        return cast("_Order", scene.cache[_ORDER])
    kinds = (*NORMS, INSTANCE_NORMS, nn.MultiheadAttention)
    layers = {layer.module for layer in find_layers(scene.model).values()}
    names = {
        module: clean_name(name)
        for name, module in scene.model.named_modules()
        if module in layers or isinstance(module, kinds)
    }
    first = {id(parameter): name for name, parameter in named_parameters(scene.model)}
    seen: list[nn.Module] = []
    with ExitStack() as stack:
        for module in names:
            handle = module.register_forward_pre_hook(lambda module, _args: seen.append(module))
            stack.callback(handle.remove)
        scene.objective.evaluate(scene.objective.batches.items[0])
    modules = list(dict.fromkeys(reversed(seen)))[::-1]
    parameters = {
        module: [
            first[id(p)]
            for p in (module._parameters.get("weight"), module._parameters.get("bias"))
            if p is not None
        ]
        for module in names
        if module._parameters.get("weight") is not None
    }
    scene.cache[_ORDER] = _Order(modules, names, parameters)
    return cast("_Order", scene.cache[_ORDER])


@dataclass(frozen=True)
class _Centred:
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


def _centred(scene: Scene) -> list[_Centred]:
    """Found by Σ (h - beta) / gamma = 0 in every sample, in one pass over the data per network."""
    if _CENTRED in scene.cache:
        return cast("list[_Centred]", scene.cache[_CENTRED])
    norms = [m for m in scene.model.modules() if isinstance(m, nn.LayerNorm)]
    norms = [m for m in norms if len(m.normalized_shape) == 1 and bool(_affine_of(m)[0].all())]
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
        _Centred(possible[name][0], name, reader.bias, rows[name])
        for name, reader in readers.items()
        if possible[name] and rows.get(name)
    ]
    scene.cache[_CENTRED] = found
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


def _affine_of(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Gamma and beta; 1 and 0 where it has none."""
    gamma, beta = norm._parameters.get("weight"), norm._parameters.get("bias")
    size = norm.normalized_shape[0]
    like = torch.ones(size, dtype=torch.float64) if gamma is None else gamma.detach()
    return like, torch.zeros_like(like) if beta is None else beta.detach()


def _is_centred(value: Tensor, norm: nn.LayerNorm) -> bool:
    gamma, beta = (moment.to(value) for moment in _affine_of(norm))
    normal = (value - beta) / gamma
    total, size = normal.sum(dim=-1).abs(), normal.abs().sum(dim=-1)
    return bool((total <= CENTRED[value.dtype] * (size + 1e-30)).all())
