"""H_e of every layer under every variant that changes it: why a layer is ill-conditioned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hessdiag.activations import Layer, find_layers
from hessdiag.blocks import Block
from hessdiag.errors import OutOfTime
from hessdiag.hidden import Change, affine_change
from hessdiag.names import named_parameters
from hessdiag.network import Network
from hessdiag.neurons import Observed, explain_layers
from hessdiag.run import HiddenResult
from hessdiag.sharding import Share
from hessdiag.variants.grammar import RAW, Variant
from hessdiag.variants.registry import AFFINE, MAKERS
from hessdiag.variants.scene import NotApplicable, Scene
from hessdiag_probes.types import CountedMatvec, Vector

NO_SECOND = "its neurons' factors take a second derivative, and --engine difference has none"


@dataclass
class Explained:
    """What H_e is under each variant; filled network by network.

    Attributes:
        blocks: Of the original network, in the order of the table.
        by_layer: The table has a block per layer.
        share: Its layers are explained; None for all.
        results: By variant.
        reasons: By layer, why it has no H_e, or no singular values.
    """

    blocks: Sequence[Block]
    by_layer: bool
    share: Share | None = None
    results: dict[str, tuple[HiddenResult, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(
        self,
        network: Network,
        variants: Sequence[Variant],
        changed: Collection[str] | None = None,
    ) -> None:
        """Explain the layers of a network, while it is on loan.

        Args:
            network: Prepared.
            variants: Of this network.
            changed: Layers that the change of the network alters; None for all.
        Raises:
            OutOfTime: The time is up; variants that are explained by then stay.
        """
        layers = {
            name: layer
            for name, layer in find_layers(network.objective.model).items()
            if (changed is None or name in changed)
            and (self.share is None or self.share.explains(layer))
        }
        observed: dict[str, Observed | str] = {}
        if network.differences:
            observed |= dict.fromkeys(layers, NO_SECOND)
        for variant in variants:
            if variant.coordinates == RAW:
                chosen, changes = layers, None
            elif variant.coordinates in AFFINE:
                changes = _changes(network, variant.coordinates, layers)
                chosen = {name: layers[name] for name in changes}
            else:
                continue
            # One pass serves all layers; with a limit on time each has its own, to end between.
            found = list(chosen.values())
            together = [found] if network.deadline is None else [[layer] for layer in found]
            results: list[HiddenResult] = []
            for some in together:
                if network.late():
                    raise OutOfTime(
                        f"not begun within --max-seconds {network.options.max_seconds:g}"
                    )
                results += explain_layers(
                    network.objective,
                    some,
                    changes,
                    indices=self._indices(network),
                    observed=observed,
                    reasons=self.reasons,
                )
            if results:
                self.results[variant.key] = tuple(results)

    def _indices(self, network: Network) -> dict[str, int] | None:
        """The places of the layers' blocks in the table, where every layer has one."""
        if not self.by_layer:
            return None
        places = {block.name: index for index, block in enumerate(self.blocks)}
        names = find_layers(network.objective.model)
        return places if all(name in places for name in names) else None


def _changes(network: Network, coordinates: str, layers: Mapping[str, Layer]) -> dict[str, Change]:
    """What these coordinates make of the inputs of each layer that they change."""
    changes: dict[str, Change] = {}
    for name, layer in layers.items():
        owned = [name for name in (layer.weight, layer.bias) if name is not None]
        if not all(name in network.named for name in owned):
            continue
        scene = _layer_scene(network, name, tuple(owned))
        try:
            built = MAKERS[coordinates](scene)
        except NotApplicable:
            continue
        places = scene.places()
        weight = places[layer.weight].reshape(layer.outputs, -1)
        bias = None if layer.bias is None else places[layer.bias]
        change = affine_change(built.coordinates, weight, bias)
        if change is not None:
            changes[name] = change
    return changes


def _layer_scene(network: Network, name: str, parameters: tuple[str, ...]) -> Scene:
    """The scene of a layer for makers that look at activations alone."""
    size = sum(network.named[p].numel() for p in parameters)
    like = network.named[parameters[0]]

    def nothing(vector: Vector) -> Vector:
        return torch.zeros_like(vector)

    return Scene(
        block=Block(name, parameters, size),
        named=dict(named_parameters(network.objective.model)),
        objective=network.objective,
        options=network.options,
        optimizer=None,
        changed=network.changed,
        product=CountedMatvec(nothing),
        matrix=None,
        rows={},
        dead=torch.zeros(size, dtype=torch.bool, device=like.device),
        iterates=(),
        cache=network.cache,
    )
