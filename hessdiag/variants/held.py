"""Replayed gradients that several blocks and variants read more than once."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from hessdiag.variants.decay import trained_decoupled
from hessdiag.variants.replay import SLICES, gradients
from hessdiag.variants.scene import Scene

HELD_BYTES = 2**31
"""What more gradients than :data:`hessdiag.variants.replay.SLICES` may take."""

_KEY = "held gradients"


@dataclass(frozen=True)
class Gradients:
    """The last gradients of the replay, in their order.

    Attributes:
        each: By the parameter's name, at each step; ``--weight-decay`` is in them where it is
            coupled, as in H.
        source: ``iterates`` or ``minibatches``.
        note: How many, and where they were taken.
    """

    each: Sequence[Mapping[str, Tensor]]
    source: str
    note: str


def held_gradients(scene: Scene) -> Gradients:
    """Gradients of every parameter of the network, kept in the scene's cache.

    Raises:
        NotApplicable: As :func:`hessdiag.variants.replay.gradients`.
    Cost:
        Once per network: a gradient over the dataset per iterate, or one in all. Memory for 16
        gradients, or for as many as 2 GiB hold; earlier ones are left out, and the note says so.
    """
    if _KEY not in scene.cache:
        scene.cache[_KEY] = _hold(scene)
    return cast("Gradients", scene.cache[_KEY])


def _hold(scene: Scene) -> Gradients:
    size = sum(p.numel() * p.element_size() for p in scene.named.values())
    samples = gradients(scene)
    kept: deque[Mapping[str, Tensor]] = deque(maxlen=max(SLICES, HELD_BYTES // max(size, 1)))
    count = 0
    decay = 0.0 if trained_decoupled(scene.optimizer) else scene.options.weight_decay
    for count, sample in enumerate(samples.each, 1):  # noqa: B007 - the last is their number
        kept.append(
            {
                name: gradient.add(sample.position[name], alpha=decay) if decay else gradient
                for name, gradient in sample.gradient.items()
            }
        )
    last = f"the last {len(kept)} of " if len(kept) < count else ""
    note = f"from {last}{count} gradient{'s' * (count != 1)} {samples.what}"
    return Gradients(tuple(kept), samples.source, note)
