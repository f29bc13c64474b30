"""Means and variances of a layer's inputs as each of its neurons weighs them: by its curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hessdiag.activations import Inputs, Layer, visit_inputs
from hessdiag.neurons import MOST_NUMBERS, ZERO, neuron_curvature
from hessdiag.variants.scene import NotApplicable, Scene
from hessdiag.variants.statistics import ROUNDED_TERMS


@dataclass(frozen=True)
class Weighted:
    """Statistics of the inputs of each neuron, weighted with S ≥ 0.

    Attributes:
        mean: (outputs, features), float64; 0 for neurons without weights.
        scale: Standard deviations; 1 where that is 0, and for neurons without weights.
        refused: Number of neurons whose S has negative entries, so that it weighs nothing.
    """

    mean: Tensor
    scale: Tensor
    refused: int


def weighted_moments(scene: Scene, layer: Layer) -> Weighted:
    """The statistics of one layer, computed once per network.

    Raises:
        NotApplicable: S is not diagonal, is negative somewhere for every neuron, or is too large.
    Cost:
        One backward pass per neuron and batch, and one more pass over the data;
        O(samples · outputs · features) flops, samples · outputs numbers.
    """
    key = f"curvature-weighted statistics of {layer.name}"
    if key not in scene.cache:
        try:
            scene.cache[key] = _measure(scene, layer)
        except NotApplicable as reason:
            scene.cache[key] = str(reason)
    found = scene.cache[key]
    if isinstance(found, str):
        raise NotApplicable(found)
    return cast("Weighted", found)


def _measure(scene: Scene, layer: Layer) -> Weighted:
    numbers = layer.outputs * scene.objective.batches.rows
    if numbers > MOST_NUMBERS:
        raise NotApplicable(
            f"its curvature has {numbers:.1g} entries, over the {MOST_NUMBERS:.0g} that are held; "
            "take fewer with --max-examples, or use bnp"
        )
    curvature = neuron_curvature(scene.objective, layer)
    eps = torch.finfo(curvature.dtype).eps
    curvature = curvature.double()
    floor = ZERO * eps * curvature.abs().amax(dim=1, keepdim=True)
    negative = (curvature < -floor).any(dim=1)
    if bool(negative.all()):
        raise NotApplicable("S has negative entries for every neuron: it weighs nothing; use bnp")
    curvature = curvature.clamp_min(0)
    curvature[negative] = 0
    running = _Running(curvature, layer.features)
    visit_inputs(scene.objective, [layer], lambda _, inputs: running.add(inputs))
    scale = (running.squares / running.total.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    size = (running.mean.square() + scale.square()).sqrt()
    scale[scale <= ROUNDED_TERMS * eps * size] = 1
    return Weighted(running.mean, scale, int(negative.sum()))


class _Running:
    """Weighted means and squared deviations, batch by batch, as :class:`Moments` takes them."""

    def __init__(self, curvature: Tensor, features: int) -> None:
        self.curvature = curvature
        self.position = 0
        outputs = len(curvature)
        self.total = curvature.new_zeros(outputs, 1)
        self.mean = curvature.new_zeros(outputs, features)
        self.squares = curvature.new_zeros(outputs, features)

    def add(self, inputs: Inputs) -> None:
        rows = inputs.rows.double()
        weights = self.curvature[:, self.position : self.position + len(rows)]
        self.position += len(rows)
        for neuron, weight in enumerate(weights):
            new, seen = weight.sum(), self.total[neuron].clone()
            if not new > 0:
                continue
            mean = weight @ rows / new
            drift = mean - self.mean[neuron]
            self.total[neuron] += new
            self.mean[neuron] += drift * (new / (seen + new))
            self.squares[neuron] += weight @ (rows - mean).square()
            self.squares[neuron] += drift.square() * (seen * new / (seen + new))
