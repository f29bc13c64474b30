"""Mean, variance and range of what every layer's weights meet, over the dataset, in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hessdiag.activations import Inputs, Layer, find_layers, visit_inputs
from hessdiag.variants.scene import Scene

ROUNDED_TERMS = 1024
"""A constant feature that was summed from a million rounded terms varies by some 1000 eps."""

_KEY = "statistics of the inputs"


@dataclass
class Moments:
    """Of one layer's features over all samples and positions, float64.

    A feature is an input of a Linear layer, or a channel of a convolution, pooled over its
    patches (kernel positions and output positions, padding included). Convolutions with groups
    have one row per group, others one row.

    Attributes:
        count: Of values behind each feature, by row.
        origin: The first value of each feature, (groups, channels), from which all are measured.
        offset: The mean, from there.
        squares: Sum of the squared deviations from the mean.
        low: The smallest value.
        high: The largest.
        eps: Of the dtype that the layer computes in.
    """

    count: list[int]
    origin: Tensor
    offset: Tensor
    squares: Tensor
    low: Tensor
    high: Tensor
    eps: float

    @classmethod
    def empty(cls, layer: Layer) -> Moments:
        """Nothing seen."""
        weight = layer.tensor
        shape = (layer.groups, _channels(layer))
        zeros = torch.zeros(shape, dtype=torch.float64, device=weight.device)
        low, high = zeros + torch.inf, zeros - torch.inf
        eps = torch.finfo(weight.dtype).eps
        return cls([0] * layer.groups, zeros, zeros.clone(), zeros.clone(), low, high, eps)

    def add(self, layer: Layer, inputs: Inputs) -> None:
        """Take in the inputs of one call.

        Source:
            Chan, Golub, LeVeque (1983): deviations are taken from means, never as E x² - (E x)².
        """
        group = inputs.group
        values = inputs.rows.double().reshape(len(inputs.rows), _channels(layer), -1)
        seen, new = self.count[group], values.shape[0] * values.shape[2]
        if new == 0:
            return
        self.low[group] = torch.minimum(self.low[group], values.amin(dim=(0, 2)))
        self.high[group] = torch.maximum(self.high[group], values.amax(dim=(0, 2)))
        if not seen:
            self.origin[group] = values[0, :, 0]
        values = values - self.origin[group][:, None]
        mean = values.mean(dim=(0, 2))
        squares = (values - mean[:, None]).square().sum(dim=(0, 2))
        drift = mean - self.offset[group]
        self.count[group] = seen + new
        self.offset[group] += drift * (new / (seen + new))
        self.squares[group] += squares + drift.square() * (seen * new / (seen + new))

    @property
    def mean(self) -> Tensor:
        """(groups, channels)."""
        return self.origin + self.offset

    @property
    def finite(self) -> bool:
        """Whether all of it is finite."""
        return bool(self.mean.isfinite().all() and self.squares.isfinite().all())

    @property
    def variance(self) -> Tensor:
        """The biased variance, (groups, channels)."""
        count = torch.tensor(self.count, dtype=torch.float64, device=self.mean.device)
        return self.squares / count[:, None]

    @property
    def constant(self) -> Tensor:
        """Which features do not vary beyond rounding, (groups, channels)."""
        variance = self.variance
        size = (self.mean.square() + variance).sqrt()
        return variance.sqrt() <= ROUNDED_TERMS * self.eps * size


def _channels(layer: Layer) -> int:
    return layer.tensor.shape[1]


@dataclass(frozen=True)
class Statistics:
    """What one pass over the data found.

    Attributes:
        moments: By layer.
        calls: Of each layer's forward in a batch, at most.
    """

    moments: dict[str, Moments]
    calls: dict[str, int]


def input_statistics(scene: Scene) -> Statistics:
    """The moments of the inputs of all layers of the network, computed once per network.

    Cost:
        One forward pass over the data.
    """
    if _KEY not in scene.cache:
        layers = find_layers(scene.model)
        moments = {name: Moments.empty(layer) for name, layer in layers.items()}
        calls = visit_inputs(
            scene.objective,
            list(layers.values()),
            lambda layer, inputs: moments[layer.name].add(layer, inputs),
        )
        scene.cache[_KEY] = Statistics(moments, calls)
    return cast("Statistics", scene.cache[_KEY])
