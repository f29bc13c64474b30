"""Symmetries of the loss in a block: why some of its eigenvalues are zero, or arbitrary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from hessdiag.activations import Layer, find_layers
from hessdiag.centred import Centred, affine_of, centred_inputs
from hessdiag.errors import SelfCheckFailed
from hessdiag.invariance import MOST_PRODUCTS, TESTED, Claim, Probe, probed, scale_invariant
from hessdiag.names import clean_name, named_parameters
from hessdiag.variants.scene import Scene
from hessdiag.variants.tracing import BATCH_NORMS, NORMS
from hessdiag_probes.types import Vector

INSTANCE_NORMS = nn.modules.instancenorm._InstanceNorm
BATCHED = (BATCH_NORMS, INSTANCE_NORMS)
"""They subtract each channel's own mean, and with it a bias."""
KEYS = {"k", "key", "keys", "k_proj", "key_proj", "to_k", "wk", "k_lin", "linear_k", "lin_k"}

_ORDER = "order of the layers"


@dataclass(frozen=True)
class Symmetries:
    """What was found in a block, and what that cost.

    Attributes:
        found: One short sentence each, the same for the same network; empty where there are
            none, or where the loss has no double backward. The last one tells what was not tested.
        products: Hessian products that it took.
        untested: Candidates that products or time did not reach.
    """

    found: list[str]
    products: int
    untested: int


def find_symmetries(
    scene: Scene,
    gradient: Vector | None = None,
    tolerance: float | None = None,
    *,
    late: Callable[[], bool] | None = None,
) -> Symmetries:
    """The symmetries of the block that maths.md 4.5 lists, each confirmed by products.

    Args:
        scene: Of the block, at the parameters where the symmetries are sought.
        gradient: Of the loss without weight decay, (n,); None computes it.
        tolerance: What ``H v`` of a unit vector may be by rounding alone; None estimates it.
        late: Whether the time is up, asked before each test; None for never.
    Returns:
        They, and the products that they took.
    Cost:
        Two gradients and two forward passes at most. Two products for each kind of symmetry
        whose first-order part holds anywhere in the block, more where the sum of its candidates
        fails, 24 at most; one of ``scene.product`` for the tolerance.
    Source:
        maths.md 4.5.
    """
    found: list[str] = []
    try:
        with probed(scene, gradient, tolerance, late=late) as probe:
            for index, kind in enumerate(_KINDS):
                # What fails of one kind must not use up the others' share.
                later = len(_KINDS) - 1 - index
                probe.most = MOST_PRODUCTS - TESTED * later
                found += kind(probe)
            found += _zero_rows(probe)
    except SelfCheckFailed:
        return Symmetries([], 0, 0)
    if probe.untested:
        limit = "--max-seconds" if late is not None and late() else f"{MOST_PRODUCTS} products"
        found.append(f"not tested: {probe.untested} of {probe.asked} candidates ({limit})")
    estimated = 1 if tolerance is None and scene.matrix is None else 0
    return Symmetries(found, probe.products + estimated, probe.untested)


def _scales(probe: Probe) -> list[str]:
    return [
        f"scale-invariant: {' + '.join(groups.names)} ({_counted(len(groups.places))})"
        for groups in scale_invariant(probe)
    ]


def _counted(groups: int) -> str:
    return f"{groups} group{'s' if groups != 1 else ''}"


def _layers(scene: Scene) -> Iterator[Layer]:
    """The layers whose weights are in the block and are nobody else's."""
    for layer in find_layers(scene.model).values():
        if layer.weight in scene.block.parameters and not layer.shared:
            yield layer


def _holding(probe: Probe, candidates: dict[str, Claim]) -> list[str]:
    """Those of the candidates that hold, by name."""
    verdicts = probe.settle(list(candidates.values()))
    return [name for name, holds in zip(candidates, verdicts, strict=True) if holds]


def _shifts(probe: Probe) -> list[str]:
    """The same vector added to the weights of all outputs, which a softmax does not see."""
    places = probe.places
    layers: dict[str, Layer] = {}
    candidates: dict[str, Claim] = {}
    for layer in _layers(probe.scene):
        if layer.groups > 1:
            continue
        rows = places[layer.weight].reshape(layer.outputs, -1)
        if layer.bias in places:
            rows = torch.cat([rows, places[layer.bias][:, None]], dim=1)
        each = probe.coefficients(rows.shape[1], f"shift of {layer.name}")
        claim = Claim(rows.flatten(), each.repeat(len(rows)))
        if probe.level(claim):
            layers[layer.name], candidates[layer.name] = layer, claim
    found = []
    for name in _holding(probe, candidates):
        after = next(iter(_order(probe.scene).norms_after(layers[name].module)), None)
        found.append(f"shift before {after}: {name}" if after else "softmax shift")
    return found


def _rescalings(probe: Probe) -> list[str]:
    """Weights into a unit times c, those out of it by c: a ReLU between passes that on."""
    scene, places = probe.scene, probe.places
    candidates: dict[str, Claim] = {}
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
        where = torch.cat([inner.flatten(), leaving.flatten()])
        sign = torch.cat([each.expand_as(inner).flatten(), -each.expand_as(leaving).flatten()])
        kind = "ReLU rescaling" if before in layers else "rescaling"
        candidates[f"{kind}: {order.names[before]} – {order.names[after]}"] = Claim(
            where, sign * probe.position[where], -sign * probe.gradient[where]
        )
    return _holding(probe, candidates)


def _unit_places(scene: Scene, places: dict[str, Tensor], module: nn.Module) -> Tensor | None:
    """The parameters that make each output of ``module``, (units, parameters of one)."""
    names = _order(scene).parameters.get(module)
    if not names or any(name not in places for name in names):
        return None
    weight = scene.named[names[0]]
    return torch.cat([places[name].reshape(weight.shape[0], -1) for name in names], dim=1)


def _null_vectors(probe: Probe) -> list[str]:
    """After LayerNorm: w += c / gamma, b -= c Σ beta / gamma leaves a neuron's output alone."""
    scene, places = probe.scene, probe.places
    neurons: dict[str, int] = {}
    candidates: dict[str, Claim] = {}
    for consumer in centred_inputs(scene):
        if consumer.weight not in places:
            continue
        norm = consumer.norm
        stretch = affine_of(norm)[0].to(probe.position).reciprocal()
        shift = float((affine_of(norm)[1].to(probe.position) * stretch).sum())
        rows = places[consumer.weight].reshape(-1, len(stretch))[: consumer.rows]
        each = probe.coefficients(len(rows), f"null vectors of {consumer.weight}")
        where, direction = rows.flatten(), (each[:, None] * stretch).flatten()
        if consumer.bias in places:
            where = torch.cat([where, places[consumer.bias][: consumer.rows]])
            direction = torch.cat([direction, -each * shift])
        elif shift != 0:
            continue
        claim = Claim(where, direction)
        if probe.level(claim) and not _moves_with_norm(probe, consumer, each, claim):
            neurons[consumer.weight], candidates[consumer.weight] = len(rows), claim
    count = sum(neurons[weight] for weight in _holding(probe, candidates))
    return [f"LayerNorm null vectors: {count}"] if count else []


def _moves_with_norm(probe: Probe, consumer: Centred, each: Vector, claim: Claim) -> bool:
    """Whether ``H d`` cannot vanish, because the block holds γ and β, on which d depends.

    The loss is level along d(γ, β) everywhere, so that H d = -(∂d/∂γ, ∂d/∂β)ᵀ g there.
    """
    names = _order(probe.scene).parameters.get(consumer.norm, [])
    held = [name in probe.places for name in (*names, "", "")[:2]]
    gamma, beta = (moment.to(probe.position) for moment in affine_of(consumer.norm))
    rows = probe.places[consumer.weight].reshape(-1, len(gamma))[: consumer.rows]
    by_weight, by_bias = each @ probe.gradient[rows], torch.zeros_like(gamma[0])
    if consumer.bias in probe.places:
        by_bias = each @ probe.gradient[probe.places[consumer.bias][: consumer.rows]]
    image = torch.stack([(by_bias * beta - by_weight) / gamma.square(), -by_bias / gamma])
    left = float(image[torch.tensor(held, device=image.device)].norm())
    return left > probe.negligible * float(claim.direction.norm())


_KINDS = (_scales, _shifts, _rescalings, _null_vectors)


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
