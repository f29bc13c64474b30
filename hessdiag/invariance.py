"""Exact tests of directions along which the loss does not change, by gradient and product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hessdiag.curvature.engines import Recompute
from hessdiag.curvature.hessian import hessian_product
from hessdiag.curvature.objective import flatten
from hessdiag.variants.scene import Scene
from hessdiag_probes.random import gaussian, generator, rademacher
from hessdiag_probes.types import Vector

VANISHES = {torch.float64: 1e-7, torch.float32: 1e-3}
"""What is left of terms that cancel, relative to the terms; rounding leaves 1e-8 times that."""
MOST_PRODUCTS = 100
WITHOUT_EPS = 1e-10
EPSILONS = ("eps", "variance_epsilon")


@dataclass
class Probe:
    """A block's gradient and products, for tests of its symmetries.

    Attributes:
        scene: Of the block.
        position: The parameters, flattened.
        gradient: Of the loss.
        tolerance: What ``H v`` of a unit vector may be by rounding alone.
        products: How many were taken.
    """

    scene: Scene
    position: Vector
    gradient: Vector
    tolerance: float
    products: int = 0

    @cached_property
    def places(self) -> dict[str, Tensor]:
        """Of each parameter in the block's vector."""
        return self.scene.places()

    @property
    def small(self) -> float:
        """What counts as zero, relative to the terms that cancel."""
        return VANISHES[self.position.dtype]

    def level(self, direction: Vector) -> bool:
        """Whether the gradient has no part along the direction, to rounding."""
        terms = self.gradient * direction
        drift = self.tolerance * float(self.position.norm()) * float(direction.norm())
        return abs(float(terms.sum())) <= self.small * float(terms.abs().sum()) + drift

    def balanced(self, left: Tensor, right: Tensor) -> bool:
        """Whether Σ g p over places of ``left`` and ``right`` agree row by row, to rounding."""
        terms = self.gradient * self.position
        sizes = terms.abs() * self.small + self.position.square() * self.tolerance
        apart = (terms[left].sum(dim=1) - terms[right].sum(dim=1)).abs()
        return bool((apart <= sizes[left].sum(dim=1) + sizes[right].sum(dim=1)).all())

    def maps(self, direction: Vector, image: Vector | None = None) -> bool:
        """Whether ``H direction = image`` (0 by default).

        The yardstick is ``H`` of the same direction with random signs, which keeps no symmetry:
        where that is rounding, too, nothing can be seen, and the answer is no.

        Cost:
            Two products.
        """
        if self.products >= MOST_PRODUCTS:
            return False
        made = generator(self.scene.options.seed, self.scene.block.name, "symmetry twin")
        signs = rademacher(
            len(direction), generator=made, dtype=direction.dtype, device=direction.device
        )
        size = float(self._product(direction * signs).norm())
        if size <= self.tolerance * float(direction.norm()):
            return False
        found = self._product(direction)
        apart = found if image is None else found - image
        return float(apart.norm()) <= self.small * size

    def coefficients(self, count: int, purpose: str) -> Vector:
        """Random numbers, for a combination of ``count`` directions."""
        made = generator(self.scene.options.seed, self.scene.block.name, purpose)
        like = self.position
        return gaussian(count, generator=made, dtype=like.dtype, device=like.device)

    def _product(self, vector: Vector) -> Vector:
        self.products += 1
        engine = Recompute(self.scene.objective, self.scene.parameters, hessian_product)
        return engine(vector)


@contextmanager
def probed(scene: Scene, gradient: Vector | None, tolerance: float | None) -> Iterator[Probe]:
    """A probe of the network in which normalisations have no eps that would break symmetries.

    Products are of the loss's own Hessian whatever ``--curvature`` is, without weight decay.

    Args:
        scene: Of the block.
        gradient: Of the block's loss, or None to compute it.
        tolerance: What ``H v`` of a unit vector may be by rounding alone; None estimates it.
    """
    if tolerance is None:
        tolerance = _rounding(scene)
    with _without_eps(scene.model) as changed:
        if gradient is None or changed:
            gradient = scene.objective.gradient(scene.parameters)
        yield Probe(scene, flatten([p.data for p in scene.parameters]), gradient, tolerance)


def _rounding(scene: Scene) -> float:
    """A thousand units in the last place of ``H`` times a random vector of unit length."""
    like = scene.parameters[0]
    made = generator(scene.options.seed, scene.block.name, "symmetry tolerance")
    vector = gaussian(scene.block.size, generator=made, dtype=like.dtype, device=like.device)
    eps = torch.finfo(like.dtype).eps
    return 1000 * eps * float(scene.product(vector).norm() / vector.norm())


@contextmanager
def _without_eps(model: nn.Module) -> Iterator[bool]:
    """Make the eps of normalisation layers negligible; yields whether there are any.

    With its eps the output of BatchNorm changes by eps/(2 var) when its input is scaled: the
    symmetry is that of the layer without it. Running statistics are no function of the input.
    """
    saved: list[tuple[nn.Module, str, float]] = []
    try:
        for module in model.modules():
            if "norm" not in type(module).__name__.lower():
                continue
            if not module.training and getattr(module, "running_var", None) is not None:
                continue
            for name in EPSILONS:
                value = module.__dict__.get(name)
                if isinstance(value, float) and value > 0:
                    saved.append((module, name, value))
                    setattr(module, name, value * WITHOUT_EPS)
        yield bool(saved)
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


@dataclass(frozen=True)
class Groups:
    """Weights whose common scale does not matter, group by group.

    Attributes:
        names: Of their parameters.
        places: In the block's vector, (groups, weights).
    """

    names: tuple[str, ...]
    places: Tensor


def scale_invariant(probe: Probe) -> list[Groups]:
    """Groups w with ``L(c w) = L(w)``: g·w = 0 and H w = -g, restricted to the group.

    Groups of a tensor with two or more dimensions are tried from fine to coarse: its rows
    (output channels), the groups of GroupNorm, all of it; and each together with its bias.

    Cost:
        Two products for each tensor whose gradient is orthogonal to it, else none.
    Source:
        maths.md 4.5.
    """
    found = []
    for name, parameter in zip(probe.scene.block.parameters, probe.scene.parameters, strict=True):
        if parameter.ndim >= 2 and parameter.numel():
            for groups in _partitions(probe, name, parameter.shape[0]):
                kept = _invariant(probe, groups)
                if kept is not None:
                    found.append(kept)
                    break
    return found


def _partitions(probe: Probe, name: str, rows: int) -> Iterator[Groups]:
    weight = probe.places[name].reshape(rows, -1)
    modules = probe.scene.model.modules()
    sizes = {m.num_groups for m in modules if isinstance(m, nn.GroupNorm)}
    counts = [count for count in sorted({rows, 1} | sizes, reverse=True) if rows % count == 0]
    head, found, _ = name.rpartition("weight")
    bias = probe.places.get(f"{head}bias") if found else None
    with_bias = bias is not None and len(bias) == rows
    for count in counts:
        yield Groups((name,), weight.reshape(count, -1))
        if with_bias and bias is not None:
            joined = torch.cat([weight, bias[:, None]], dim=1)
            yield Groups((name, f"{head}bias"), joined.reshape(count, -1))


def _invariant(probe: Probe, groups: Groups) -> Groups | None:
    """Those of the groups that are invariant; None where there are none."""
    places = groups.places
    weight, gradient = probe.position[places], probe.gradient[places]
    size = weight.square().sum(dim=1)
    left = (weight * gradient).sum(dim=1).abs()
    most = probe.small * (weight * gradient).abs().sum(dim=1) + probe.tolerance * size
    alive = ~probe.scene.dead.to(places.device)[places].all(dim=1) & (size > 0)
    kept = places[alive & (left <= most)]
    if not len(kept):
        return None
    direction, image = torch.zeros_like(probe.position), torch.zeros_like(probe.position)
    direction[kept], image[kept] = probe.position[kept], -probe.gradient[kept]
    return Groups(groups.names, kept) if probe.maps(direction, image) else None
