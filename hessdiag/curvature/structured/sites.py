"""Which layers of a block have a structure that makes its matrix cheap, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.activations import Layer, find_layers, unfold
from hessdiag.curvature.objective import Objective
from hessdiag.data import row_count

MOST_POSITIONS = 0.7
"""Positions per sample, of a neuron's weights: above, offsets save too little to be worth it."""
LEAST_SAVED = 64
"""Products; fewer are not worth the forward pass that plans, nor the products that verify."""


@dataclass(frozen=True)
class Site:
    """A layer of a block whose weights act once per forward, through its output alone.

    Attributes:
        layer: Linear, or a convolution without groups.
        weight: Its weight belongs to the block.
        bias: Its bias does.
        index: Places of its weights in the block, (outputs, features), a bias last.
        positions: Of its output per sample, at most.
    """

    layer: Layer
    weight: bool
    bias: bool
    index: Tensor
    positions: int

    @property
    def outputs(self) -> int:
        """Number of neurons."""
        return self.index.shape[0]

    @property
    def features(self) -> int:
        """Number of weights of one neuron, its bias included, as far as they are in the block."""
        return self.index.shape[1]

    @property
    def directions(self) -> int:
        """Offsets of one sample."""
        return self.outputs * self.positions

    def rows(self, value: Tensor, samples: int, last: float = 1.0) -> Tensor:
        """ĥ of every position, (samples, positions, features), from what the layer was given.

        Args:
            value: Its input, or a derivative of that.
            samples: Rows of the batch.
            last: What the bias meets: 1, or 0 in a derivative.
        """
        if self.layer.kind == "linear":
            vectors = value.reshape(samples, -1, value.shape[-1])
        else:
            patches = unfold(self.layer.module, value).mT
            vectors = patches.reshape(samples, -1, patches.shape[-1])
        if not self.bias:
            return vectors
        ones = torch.full_like(vectors[..., :1], last)
        return torch.cat([vectors, ones], dim=-1) if self.weight else ones

    def outward(self, value: Tensor, samples: int) -> Tensor:
        """A view of a tensor like the layer's output, (samples, positions, outputs)."""
        if self.layer.kind == "linear":
            return value.view(samples, -1, value.shape[-1])
        return value.view(samples, self.outputs, -1).mT


@dataclass(frozen=True)
class Plan:
    """How the matrix of a block is made by structure.

    Attributes:
        sites: Layers whose columns come from offsets, in the order of the forward pass.
        others: Places of all other columns, which are products.
        size: Of the block.
    """

    sites: tuple[Site, ...]
    others: Tensor
    size: int

    @property
    def directions(self) -> int:
        """Backward passes over the dataset that the sites take, each about a product."""
        return sum(site.directions for site in self.sites)

    @property
    def products(self) -> int:
        """Passes in all, those of the other columns included."""
        return self.directions + len(self.others)

    @property
    def worthwhile(self) -> bool:
        """Whether that beats a product per column.

        Of a matrix product per weight each saves eight times the arithmetic of the matrix
        multiplications that stand in for it, whatever the layer's sizes, so it is the passes
        that decide.
        """
        return bool(self.sites) and self.size - self.products >= LEAST_SAVED

    def flops(self, rows: int) -> float:
        """Additions and multiplications of the matrix products over so many samples, about."""
        columns = self.size - len(self.others)
        # Two for each number, of which symmetry saves half.
        return float(rows * columns * sum(site.directions * site.features for site in self.sites))


def make_plan(objective: Objective, parameters: Sequence[nn.Parameter]) -> Plan:
    """Which columns of a block's matrix are made by structure; the same on every rank.

    Args:
        objective: Model on loan, loss and batches.
        parameters: Of the block, in its order.
    Cost:
        One forward pass over the dataset, if any layer comes into question.
    """
    device = parameters[0].device
    places: dict[int, Tensor] = {}
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        places[id(parameter)] = torch.arange(start, stop, device=device)
        start = stop
    candidates = [layer for layer in find_layers(objective.model).values() if _plain(layer, places)]
    taken = []
    covered = torch.zeros(start, dtype=torch.bool, device=device)
    for layer, positions in _seen(objective, candidates):
        site = _site(layer, places, positions)
        if site.positions <= MOST_POSITIONS * site.features:
            taken.append(site)
            covered[site.index.reshape(-1)] = True
    return Plan(tuple(taken), torch.nonzero(~covered).reshape(-1), start)


def _plain(layer: Layer, places: dict[int, Tensor]) -> bool:
    """Whether the layer has weights in the block, for itself alone."""
    own = [p for p in layer.module._parameters.values() if p is not None and id(p) in places]
    return bool(own) and not layer.shared and layer.groups == 1 and layer.features > 0


def _site(layer: Layer, places: dict[int, Tensor], positions: int) -> Site:
    module: Any = layer.module
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    parts = []
    if id(weight) in places:
        parts.append(places[id(weight)].view(layer.outputs, layer.features))
    if bias is not None and id(bias) in places:
        parts.append(places[id(bias)].view(layer.outputs, 1))
    has_bias = bias is not None and id(bias) in places
    return Site(layer, id(weight) in places, has_bias, torch.cat(parts, dim=1), positions)


class _Calls:
    """How often a forward pass calls each of some layers, and with how many positions.

    Attributes:
        order: The layers, in the order in which they were first called.
        positions: Per sample, at most, by layer.
        unfit: Those that are not called once by every batch, or not sample by sample.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = {id(layer.module): layer for layer in layers}
        self.order: dict[int, Layer] = {}
        self.positions: dict[int, int] = {}
        self.unfit: set[int] = set()
        self.samples = 0
        self.calls: dict[int, int] = {}

    def hook(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Of a layer's forward."""
        key = id(module)
        self.calls[key] += 1
        self.order.setdefault(key, self.layers[key])
        found = _positions(self.layers[key], output, self.samples)
        if found is None:
            self.unfit.add(key)
        else:
            self.positions[key] = max(self.positions.get(key, 0), found)

    def watch(self, objective: Objective, batch: Any) -> None:
        """One forward pass."""
        self.samples, self.calls = row_count(batch), dict.fromkeys(self.layers, 0)
        handles = [layer.module.register_forward_hook(self.hook) for layer in self.layers.values()]
        try:
            objective.evaluate(batch)
        finally:
            for handle in handles:
                handle.remove()
        self.unfit |= {key for key, count in self.calls.items() if count != 1}


def _seen(objective: Objective, layers: Sequence[Layer]) -> list[tuple[Layer, int]]:
    """Layers that every batch calls exactly once, in the order of the calls, and positions."""
    if not layers:
        return []
    calls = _Calls(layers)
    for batch, _ in objective:
        calls.watch(objective, batch)
    known = calls.positions
    return [(layer, known[key]) for key, layer in calls.order.items() if key not in calls.unfit]


def _positions(layer: Layer, output: Any, samples: int) -> int | None:
    """Positions per sample of a layer's output; None where its rows are no samples'."""
    if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
        return None
    if not output.is_contiguous():
        return None
    if layer.kind == "conv":
        if output.ndim != layer.tensor.ndim or output.shape[0] != samples:
            return None
        return output[0, 0].numel()
    vectors = output.numel() // output.shape[-1]
    return vectors // samples if samples and vectors % samples == 0 else None
