"""Normalisations put in before layers whose input is a hidden variable."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from hessdiag.activations import Layer, visit_inputs
from hessdiag.curvature.objective import Objective
from hessdiag.variants.edits import Edits
from hessdiag.variants.scene import NotApplicable
from hessdiag.variants.statistics import Moments
from hessdiag.variants.tracing import Trace

BySample = Literal["ln", "gn", "rms"]
EPS = 1e-5
"""Under the root of ``ln`` and ``gn``: the default of torch's layers."""

MOST_GROUPS = 32
"""Of ``gn``: the number that its paper recommends."""


@dataclass(frozen=True)
class Features:
    """Of each feature of a layer's input, over the dataset; (features,) each.

    Of a convolution a feature is a channel, over all of its patches, padding included.

    Attributes:
        mean: μ.
        variance: σ², biased.
        constant: Where σ is rounding; the scale is 1 there.
    """

    mean: Tensor
    variance: Tensor
    constant: Tensor

    @property
    def scale(self) -> Tensor:
        """σ, or 1 where the feature is constant."""
        return _root(self.variance, self.constant)


def places(trace: Trace, *, compensated: bool) -> tuple[list[Layer], list[str]]:
    """The layers that take a normalised input, and notes on those left alone.

    They are the layers whose input depends on parameters. Where the weights compensate for
    statistics over the data (``compensated``), a layer must have a bias, weights of its own and
    one call in a forward pass; otherwise a Linear layer needs more than one feature.

    Raises:
        NotApplicable: There is none.
    """
    if not any(trace.passages[layer.module].calls for layer in trace.layers.values()):
        raise NotApplicable(
            "the loss calls no Linear or convolution layer of the model; let it run this model"
        )
    found: list[Layer] = []
    alone: dict[str, list[str]] = defaultdict(list)
    for layer in trace.layers.values():
        passage = trace.passages[layer.module]
        if not passage.calls:
            alone["never called as a module"].append(layer.name)
        elif passage.given is None or not passage.hidden:
            continue
        elif compensated and layer.shared:
            alone["shares its weights"].append(layer.name)
        elif compensated and layer.bias is None:
            alone["no bias to take up a mean"].append(layer.name)
        elif compensated and passage.calls > 1:
            alone["called more than once in a forward pass"].append(layer.name)
        elif not compensated and layer.kind == "linear" and layer.features == 1:
            alone["a single feature"].append(layer.name)
        else:
            found.append(layer)
    notes = [f"left alone: {', '.join(names)} ({reason})" for reason, names in alone.items()]
    if not found:
        raise NotApplicable(
            "; ".join(["no layer can be normalised before", *notes])
            if notes
            else "every Linear and convolution layer sees the data itself, so that there is no "
            "hidden variable to normalise; take standardize or bnp"
        )
    return found, notes


def statistics(objective: Objective, layers: Sequence[Layer]) -> dict[str, Features]:
    """Means and variances of the layers' inputs over the whole dataset, by layer.

    Cost:
        One forward pass.
    """
    moments = {layer.name: Moments.empty(layer) for layer in layers}
    visit_inputs(objective, layers, lambda layer, inputs: moments[layer.name].add(layer, inputs))
    found: dict[str, Features] = {}
    for layer in layers:
        here = moments[layer.name]
        mean, variance = (
            moment.flatten().to(layer.tensor) for moment in (here.mean, here.variance)
        )
        found[layer.name] = Features(mean, variance, here.constant.flatten())
    return found


def about_constant(given: Mapping[str, Features]) -> list[str]:
    """Notes on features that are only centred."""
    counts = ((name, here.constant) for name, here in given.items() if here.constant.any())
    return [
        f"{int(constant.sum())} of {constant.numel()} inputs of {name} are constant and keep "
        "scale 1"
        for name, constant in counts
    ]


def insert_batch(
    layers: Sequence[Layer], given: Mapping[str, Features], edits: Edits, *, detached: bool
) -> None:
    """Standardise the layers' inputs, with ``W diag σ`` and ``b + W μ`` in their place.

    The function stays. A convolution's input is padded first, so that the padding is among the
    statistics and is normalised too; afterwards it pads no more.

    Args:
        layers: Each with a bias and weights of its own.
        given: Their statistics over the dataset.
        edits: Takes the changes.
        detached: Use ``given`` as constants. Otherwise every call computes the statistics of the
            batch it is given and is differentiated through them.
    Source:
        Ye, eqs. (21) to (23), with γ = 1 and β = 0; maths.md 4.4.
    """
    for layer in layers:
        here = given[layer.name]
        edits.replace_input(layer.module, _standardised(layer, here, detached))
        module: Any = layer.module
        weight, groups = module.weight.data, layer.groups
        by_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        scale = here.scale.view(groups, 1, -1, 1)
        mean = here.mean.view(groups, 1, -1, 1)
        edits.set_data(module.weight, (by_group * scale).reshape(weight.shape))
        edits.set_data(module.bias, module.bias.data + (by_group * mean).sum((2, 3)).view(-1))
        if layer.kind == "conv":
            flat = len(module.kernel_size)
            edits.set_attribute(module, "padding", (0,) * flat)
            edits.set_attribute(module, "_reversed_padding_repeated_twice", [0] * (2 * flat))


def insert_by_sample(layers: Sequence[Layer], kind: BySample, edits: Edits) -> list[str]:
    """Normalise the layers' inputs within each sample; the weights stay, the function does not.

    ``ln`` takes all features of a position of a Linear layer's input, and all channels and
    places of a convolution's (as ``GroupNorm(1)``); ``rms`` the same, without centring; ``gn``
    groups of features or channels, :func:`group_count` of them.

    Returns:
        Notes for the table.
    """
    single: list[str] = []
    for layer in layers:
        channels = layer.groups * layer.tensor.shape[1]
        groups = group_count(channels) if kind == "gn" else 1
        if kind == "gn" and groups == 1:
            single.append(layer.name)
        edits.replace_input(layer.module, _by_sample(layer, kind, groups))
    if not single:
        return []
    return [f"gn has a single group, and is ln, at {', '.join(single)}"]


def group_count(features: int) -> int:
    """Groups of ``gn``: the largest divisor up to 32 that leaves two features a group, else 1."""
    fits = (g for g in range(MOST_GROUPS, 0, -1) if features % g == 0 and features // g >= 2)
    return next(fits, 1)


def _moments(layer: Layer, padded: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each feature over what the weights meet in ``padded``."""
    if layer.kind == "linear":
        flat = padded.reshape(-1, padded.shape[-1])
        mean = flat.mean(0)
        return mean, (flat - mean).square().mean(0)
    meetings = _meetings(layer, padded)
    spatial = meetings.ndim
    flat = padded.reshape(-1, *padded.shape[-spatial - 1 :])
    over = tuple(range(2, 2 + spatial))
    mean = (flat * meetings).sum(over).mean(0)
    centred = flat - mean.view(-1, *[1] * spatial)
    return mean, (centred.square() * meetings).sum(over).mean(0)


def _meetings(layer: Layer, padded: Tensor) -> Tensor:
    """How often each place of a padded map is in a patch, as a share of all such meetings."""
    module: Any = layer.module
    axes = []
    sizes = padded.shape[-len(module.kernel_size) :]
    for size, kernel, stride, dilation in zip(
        sizes, module.kernel_size, module.stride, module.dilation, strict=True
    ):
        outputs = (size - dilation * (kernel - 1) - 1) // stride + 1
        at = stride * torch.arange(outputs)[:, None] + dilation * torch.arange(kernel)
        counts = torch.bincount(at.flatten(), minlength=size)
        axes.append((counts / counts.sum(dtype=torch.float64)).to(padded))
    found = axes[0]
    for axis in axes[1:]:
        found = found[:, None] * axis
    return found


def _standardised(layer: Layer, given: Features, detached: bool) -> Callable[[Tensor], Tensor]:
    module: Any = layer.module
    trailing = 0 if layer.kind == "linear" else len(module.kernel_size)
    pads = list(module._reversed_padding_repeated_twice) if trailing else []
    mode = "constant" if not trailing or module.padding_mode == "zeros" else module.padding_mode

    def change(value: Tensor) -> Tensor:
        padded = functional.pad(value, pads, mode=mode) if any(pads) else value
        mean, scale = given.mean, given.scale
        if not detached:
            mean, variance = _moments(layer, padded)
            scale = _root(variance, given.constant)
        shape = (-1, *[1] * trailing)
        return (padded - mean.view(shape)) / scale.view(shape)

    return change


def _root(variance: Tensor, constant: Tensor) -> Tensor:
    return torch.where(constant, torch.ones_like(variance), variance).sqrt()


def _by_sample(layer: Layer, kind: BySample, groups: int) -> Callable[[Tensor], Tensor]:
    module: Any = layer.module
    trailing = 1 if layer.kind == "linear" else 1 + len(module.kernel_size)

    def change(value: Tensor) -> Tensor:
        split = value.reshape(*value.shape[:-trailing], groups, -1)
        if kind == "rms":
            eps = torch.finfo(value.dtype).eps
        else:
            eps = EPS
            split = split - split.mean(-1, keepdim=True)
        size = split.square().mean(-1, keepdim=True)
        return (split / (size + eps).sqrt()).reshape(value.shape)

    return change
