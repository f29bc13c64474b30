"""K-FAC's M: the inverse of a Kronecker product for each Linear and convolution layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from hessdiag.activations import Layer, find_layers
from hessdiag.variants.coordinates import Diagonal, Kronecker
from hessdiag.variants.held import held_gradients
from hessdiag.variants.kronecker_factors import Collected, Factors, Moment, collect
from hessdiag.variants.off_diagonality import measured
from hessdiag.variants.parts import (
    SIDE_LIMIT,
    Factor,
    Part,
    assemble,
    damped,
    listed,
    matrix_shape,
    power,
    rotation,
)
from hessdiag.variants.scene import Built, NotApplicable, Scene

DAMPING = 1e-6
"""λ, as a share of the mean eigenvalue of G ⊗ A."""

_KEY = "kronecker factors"


def kfac(scene: Scene) -> Built:
    """``M = (G + γ I)⁻¹ ⊗ (A + α I)⁻¹`` for each Linear and convolution layer of the block.

    A is the second moment of the layer's inputs (patches of a convolution) with a 1 for the bias,
    over positions; G that of the Gauss–Newton matrix at its outputs, summed over positions and
    averaged over samples, exact up to 128 outputs per sample, else the gradients' second moment.
    Weight and bias are one matrix [W b]; a block with one of them takes its part of A. λ is
    split by the factors' mean eigenvalues (Martens and Grosse's π), so that each is damped by
    √λ of its own. A side of more than :data:`SIDE_LIMIT` counts as its mean eigenvalue. What is
    in no such layer keeps the identity.

    Raises:
        NotApplicable: No parameter of the block is in a layer that K-FAC is defined for, or none
            of those has curvature.
    Cost:
        A pass over the data with a backward pass per output; an eigendecomposition per factor.
    Source:
        Martens, Grosse (2015), Grosse, Martens (2016); maths.md 3.2.
    """
    owners, without = _owners(scene)
    collected = _collected(scene, [layer for layer, _ in owners.values()])
    parts: list[Part] = []
    several: list[str] = []
    large: list[str] = []
    for layer, names in owners.values():
        factors = collected.layers[layer.name]
        part = _part(scene, layer, names, factors)
        if part is None:
            why = "its forward is not called" if not factors.calls else "no curvature reaches it"
            without.setdefault(why, []).extend(names)
            continue
        parts.append(part)
        several += [layer.name] * (factors.calls > 1)
        large += [layer.name] * (any(m.matrix is None for m in (factors.inputs, factors.outputs)))
    if not parts:
        raise _refusal(without)
    left_out = [name for names in without.values() for name in names]
    parts += [_identity(scene, name) for name in left_out]
    notes = [_how(collected.empirical)]
    if several:
        notes.append(f"each call counts as a further position: {listed(several)}")
    if large:
        notes.append(
            f"sides of more than {SIDE_LIMIT} count as their mean eigenvalue: {listed(large)}"
        )
    notes += [f"M is the identity for {listed(n)}: {why}" for why, n in without.items()]
    rotated = measured(scene, parts, _gradients(scene))
    return Built(
        assemble(scene, parts),
        source="activations",
        optimizer_class="K-FAC",
        off_diagonality=rotated.plain,
        notes=(*notes, *rotated.notes),
    )


def _refusal(without: Mapping[str, list[str]]) -> NotApplicable:
    reasons = "; ".join(f"{listed(names)}: {why}" for why, names in without.items())
    return NotApplicable(
        f"K-FAC is defined for Linear and convolution layers that curvature reaches ({reasons})"
    )


def _how(empirical: str | None) -> str:
    outputs = (
        "G exact Gauss–Newton"
        if empirical is None
        else f"G from the gradients of the loss ({empirical})"
    )
    return f"K-FAC: {outputs}; λ = {DAMPING:g} of the mean eigenvalue of G ⊗ A, split by π"


def _gradients(scene: Scene) -> tuple[Mapping[str, Tensor], ...]:
    """For the off-diagonality only: M does not need them."""
    try:
        return tuple(held_gradients(scene).each)
    except NotApplicable:
        return ()


def _owners(scene: Scene) -> tuple[dict[str, tuple[Layer, list[str]]], dict[str, list[str]]]:
    """The block's parameters by the layer that they belong to, and the others by why not."""
    layer_of: dict[str, Layer] = {}
    for layer in find_layers(scene.model).values():
        for name in (layer.weight, layer.bias):
            if name is not None:
                layer_of.setdefault(name, layer)
    owners: dict[str, tuple[Layer, list[str]]] = {}
    without: dict[str, list[str]] = {}
    for name in scene.block.parameters:
        owner = layer_of.get(name)
        if owner is None:
            without.setdefault("not of a Linear or convolution layer", []).append(name)
        elif owner.shared:
            without.setdefault("shared with another module", []).append(name)
        elif owner.tensor.numel() == 0:
            without.setdefault("of a layer without weights", []).append(name)
        elif owner.groups > 1:
            without.setdefault("a convolution with groups", []).append(name)
        else:
            owners.setdefault(owner.name, (owner, []))[1].append(name)
    return owners, without


def _collected(scene: Scene, layers: list[Layer]) -> Collected:
    """From the cache, or by a pass over the data."""
    known = cast("dict[str, Collected]", scene.cache.setdefault(_KEY, {}))
    missing = [layer for layer in layers if layer.name not in known]
    if missing:
        found = collect(scene, missing)
        known.update({layer.name: found for layer in missing})
    made = [known[layer.name] for layer in layers]
    empirical = next((each.empirical for each in made if each.empirical is not None), None)
    return Collected(
        {layer.name: known[layer.name].layers[layer.name] for layer in layers}, empirical
    )


def _part(scene: Scene, layer: Layer, names: list[str], factors: Factors) -> Part | None:
    """``[W b]`` of a layer, or the one of them that the block holds; None without curvature."""
    ordered = tuple(
        name for name in (layer.weight, layer.bias) if name is not None and name in names
    )
    like = scene.named[ordered[0]]
    if layer.weight in names:
        apart = layer.bias is not None and layer.bias not in names
        inputs = factors.inputs.without_last() if apart else factors.inputs
    else:
        inputs = Moment(1, torch.ones(1, 1, dtype=torch.float64, device=like.device), 1.0)
    if inputs.mean == 0 or factors.outputs.mean == 0:
        return None
    shape = layer.outputs, inputs.size
    left, right = _damped(factors.outputs), _damped(inputs)
    sides: tuple[Factor | None, Factor | None]
    if isinstance(left, Factor):
        sides = (left, right) if isinstance(right, Factor) else (left.times(right), None)
    elif isinstance(right, Factor):
        sides = None, right.times(left)
    else:
        scales = torch.full((shape[0] * shape[1],), (left * right) ** -0.5)
        return Part(ordered, layer.outputs, Diagonal(scales.to(like)), None)
    return Part(
        ordered,
        layer.outputs,
        Kronecker(power(sides[0], -0.5), power(sides[1], -0.5), *shape),
        Kronecker(rotation(sides[0]), rotation(sides[1]), *shape),
    )


def _damped(moment: Moment) -> Factor | float:
    """A side with its share of λ, or its mean eigenvalue where that stands for it."""
    shift = DAMPING**0.5 * moment.mean
    return moment.mean + shift if moment.matrix is None else damped(moment.matrix, shift)


def _identity(scene: Scene, name: str) -> Part:
    rows, columns = matrix_shape(scene.named[name])
    return Part((name,), rows, Kronecker(None, None, rows, columns), None)
