"""Normalisation folded into the parameters: the function stays, its coordinates change.

An affine change of a layer's inputs, ``h -> (h - mu) / s``, is the change ``P = U D`` of its
weights and bias (:class:`hessdiag.variants.affine.Affine`), so that PᵀHP is exactly the Hessian of
the network whose inputs were normalised and whose weights were changed to match.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from hessdiag.activations import Layer, find_layers
from hessdiag.names import clean_name, layer_of
from hessdiag.variants.affine import Affine
from hessdiag.variants.coordinates import Coordinates, Joined, identity
from hessdiag.variants.parts import listed
from hessdiag.variants.scene import Built, NotApplicable, Scene
from hessdiag.variants.statistics import Moments, input_statistics
from hessdiag.variants.tracing import trace
from hessdiag.variants.weighted import weighted_moments

FLOOR_RELATIVE = 1e-2
FLOOR_ABSOLUTE = 1e-4

_INPUT_LAYERS = "input layers"

Normaliser = Callable[[Scene, Layer, Moments], tuple[Affine, str | None]]
"""P of one layer from the moments of its inputs, and what a reader must know."""


def bnp(scene: Scene) -> Built:
    """Batch normalisation preconditioning: the inputs of every layer standardised.

    Cost:
        One forward pass over the data per network.
    Source:
        Lange, Helfrich, Ye, JMLR 23(72); equation 25 of Ye's paper.
    """
    return _normalised(scene, _standard)


def bnp_floor(scene: Scene) -> Built:
    """The same with the paper's floor, ``s² = var + 1e-2 max var + 1e-4``."""
    return _normalised(scene, _floored)


def bnp_s(scene: Scene) -> Built:
    """BNP of every neuron by itself: means and variances weighted with its curvature S ≥ 0.

    The neuron's block of PᵀHP then has equal diagonal entries, and its bias is decoupled.

    Cost:
        One backward pass per neuron and batch, and two passes over the data.
    Source:
        maths.md 4.4.
    """
    if scene.options.curvature == "ggn":
        raise NotApplicable("its weights are the Hessian's own S, not the GGN's; use bnp")
    return _normalised(scene, _weighted)


def standardize(scene: Scene) -> Built:
    """The network's inputs standardised, folded into the layers that read them.

    Cost:
        One forward pass over the data, and one with its graph over the first batch, per network.
    """
    return _normalised(scene, _standard, only=_input_layers(scene))


def minmax(scene: Scene) -> Built:
    """The network's inputs scaled to 0…1, folded into the layers that read them.

    Cost:
        As for :func:`standardize`.
    """
    return _normalised(scene, _ranged, only=_input_layers(scene))


def _standard(_scene: Scene, layer: Layer, moments: Moments) -> tuple[Affine, str | None]:
    constant = moments.constant
    scale = moments.variance.sqrt().masked_fill(constant, 1)
    return _affine(layer, moments.mean, scale), _about_constant(layer, constant)


def _floored(_scene: Scene, layer: Layer, moments: Moments) -> tuple[Affine, str | None]:
    variance = moments.variance
    floor = FLOOR_RELATIVE * variance.max() + FLOOR_ABSOLUTE
    return _affine(layer, moments.mean, (variance + floor).sqrt()), None


def _ranged(_scene: Scene, layer: Layer, moments: Moments) -> tuple[Affine, str | None]:
    constant = moments.constant
    scale = (moments.high - moments.low).masked_fill(constant, 1)
    return _affine(layer, moments.low, scale), _about_constant(layer, constant)


def _weighted(scene: Scene, layer: Layer, _moments: Moments) -> tuple[Affine, str | None]:
    weighted = weighted_moments(scene, layer)
    note = None
    if weighted.refused:
        note = (
            f"{weighted.refused} of {layer.outputs} neurons of {_called(layer)} keep their "
            "coordinates: their S has negative entries"
        )
    return Affine(weighted.mean, weighted.scale, layer.outputs), note


def _affine(layer: Layer, mean: Tensor, scale: Tensor) -> Affine:
    """One mean and scale per channel, repeated over the kernel."""
    kernel = layer.features // mean.shape[1]
    means, scales = (moment.repeat_interleave(kernel, dim=1) for moment in (mean, scale))
    return Affine(means, scales, layer.outputs)


def _about_constant(layer: Layer, constant: Tensor) -> str | None:
    count = int(constant.sum())
    if not count:
        return None
    inputs = f"{count} of {constant.numel()} inputs of {_called(layer)}"
    return f"{inputs} are constant and keep scale 1"


def _called(layer: Layer) -> str:
    """The layer's name, which is empty where the network is one layer."""
    return layer.name or "the network"


def _normalised(scene: Scene, make: Normaliser, *, only: frozenset[str] | None = None) -> Built:
    """P of the block: of its layers where ``make`` has one, the identity elsewhere.

    Args:
        scene: Of the block.
        make: P of a layer; may raise :class:`NotApplicable`.
        only: Names of the layers that may be normalised; None allows all.
    """
    inside = set(scene.block.parameters)
    layers = [
        layer
        for layer in find_layers(scene.model).values()
        if layer.weight in inside or layer.bias in inside
    ]
    refused: dict[str, str] = {}
    made: list[tuple[Layer, Affine]] = []
    notes: list[str] = []
    for layer in layers:
        try:
            moments = _usable(scene, layer, only)
            affine, note = make(scene, layer, moments)
        except NotApplicable as reason:
            refused[layer.name] = str(reason)
            continue
        made.append((layer, affine))
        notes += [note] if note else []
    if not made:
        raise NotApplicable(_why(scene, refused))
    return _built(scene, made, notes)


def _usable(scene: Scene, layer: Layer, only: frozenset[str] | None) -> Moments:
    """The moments of the layer's inputs.

    Raises:
        NotApplicable: They cannot be folded into its weight and bias.
    """
    inside = scene.block.parameters
    if layer.shared:
        raise NotApplicable("its weight or bias is tied to another module's, with other inputs")
    if layer.bias is None:
        raise NotApplicable("it has no bias to take up the mean of its inputs (bias=False)")
    if layer.weight not in inside or layer.bias not in inside:
        one, other = ("weight", "bias") if layer.weight in inside else ("bias", "weight")
        raise NotApplicable(
            f"its {other} is not in the block, being frozen or left out, and P changes the "
            f"{one} and the {other} together"
        )
    if only is not None and layer.name not in only:
        raise NotApplicable("its inputs depend on parameters, so that it is no input layer")
    found = input_statistics(scene)
    if not found.calls[layer.name]:
        raise NotApplicable(
            "its forward is never called, so that its inputs are not seen (torch's attention "
            "uses the weights of out_proj itself)"
        )
    moments = found.moments[layer.name]
    if not moments.finite:
        raise NotApplicable("its inputs are not finite, or their squares are not")
    return moments


def _why(scene: Scene, refused: Mapping[str, str]) -> str:
    """Why no layer of the block qualifies."""
    if not refused:
        modules = {clean_name(name): module for name, module in scene.model.named_modules()}
        owners = [modules.get(layer_of(name), scene.model) for name in scene.block.parameters]
        kinds = listed(type(owner).__name__ for owner in owners)
        if any(isinstance(owner, nn.Embedding) for owner in owners):
            return f"{kinds}: inputs of an Embedding are one-hot, and it has no bias"
        return f"it needs a Linear, Conv1d or Conv2d layer ({kinds} is none)"
    if len(set(refused.values())) == 1 or len(refused) == 1:
        (reason,) = set(refused.values())
        return reason
    return "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])


def _built(scene: Scene, made: list[tuple[Layer, Affine]], notes: list[str]) -> Built:
    places = scene.places()
    parts: list[tuple[Tensor, Coordinates]] = []
    taken: list[str] = []
    for layer, affine in made:
        names = [layer.weight, cast("str", layer.bias)]
        parts.append((torch.cat([places[name] for name in names]), affine))
        taken += names
    if len(made) == 1 and scene.block.parameters == tuple(taken):
        return Built(made[0][1], source="activations", notes=tuple(notes))
    rest = [name for name in scene.block.parameters if name not in taken]
    if rest:
        where = torch.cat([places[name] for name in rest])
        parts.append((where, identity(scene.parameters[0].new_ones(len(where)))))
        notes = [*notes, f"left as they are: {listed(rest)}"]
    return Built(Joined(parts), source="activations", notes=tuple(notes))


def _input_layers(scene: Scene) -> frozenset[str]:
    """Layers that read what no parameter has touched; found once per network."""
    if _INPUT_LAYERS not in scene.cache:
        followed = trace(scene.objective)
        scene.cache[_INPUT_LAYERS] = frozenset(
            name
            for name, layer in followed.layers.items()
            if followed.passages[layer.module].calls and not followed.passages[layer.module].hidden
        )
    return cast("frozenset[str]", scene.cache[_INPUT_LAYERS])
