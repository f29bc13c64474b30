"""Exact tests of directions along which the loss does not change, by gradient and product."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hessdiag.curvature.engines import Difference, Engine, Recompute
from hessdiag.curvature.hessian import hessian_product
from hessdiag.curvature.objective import Objective, flatten
from hessdiag.variants.scene import Scene
from hessdiag_probes.random import gaussian, generator, rademacher
from hessdiag_probes.types import Vector

VANISHES = {torch.float64: 1e-7, torch.float32: 1e-3}
"""What is left of terms that cancel, relative to the terms; rounding leaves 1e-8 times that."""
MOST_PRODUCTS = 24
"""Of one block: two for each kind of symmetry, and some for what does not hold."""
TESTED = 2
"""Products of one test, whatever number of claims it is of."""
LOST = 1000
"""Units in the last place that a product, or a difference of two, may be wrong by."""
WITHOUT_EPS = 1e-10
GUARD = 1e-3
"""An eps that moves the loss by more, relative to it, is no guard against zero."""
NORMS = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm),
)
NAMED = re.compile(r"(Layer|RMS|Group|Batch|Instance)_?Norm", re.IGNORECASE)
"""Names of classes that normalise, where the network brings its own."""
EPSILONS = ("eps", "variance_epsilon")


@dataclass(frozen=True)
class Claim:
    """``H d = image``, the second-order part of a symmetry.

    Attributes:
        places: Where d is not zero, in the block's vector, (k,).
        direction: d there, (k,).
        image: ``H d`` there, (k,), zero elsewhere; None where it is zero everywhere.
    """

    places: Tensor
    direction: Vector
    image: Vector | None = None

    def times(self, factor: float) -> Claim:
        """The same claim of ``factor d``."""
        image = None if self.image is None else factor * self.image
        return Claim(self.places, factor * self.direction, image)


@dataclass(frozen=True)
class _Seen:
    """Of a sum of claims: ``H d - image``, H of its twin, and what both may be wrong by."""

    apart: Vector
    twin: Vector
    error: float


@dataclass
class Probe:
    """A block's gradient and products, for tests of its symmetries.

    Attributes:
        scene: Of the block.
        position: The parameters, flattened.
        gradient: Of the loss.
        tolerance: What ``H v`` of a unit vector may be by rounding alone.
        most: Products that may be taken; None for as many as it needs.
        late: Whether to take no more; None for never.
        products: How many were taken.
        asked: Claims to settle so far.
        untested: Those of them that ``most`` or ``late`` left open.
    """

    scene: Scene
    position: Vector
    gradient: Vector
    tolerance: float
    most: int | None = None
    late: Callable[[], bool] | None = None
    products: int = 0
    asked: int = 0
    untested: int = 0

    @cached_property
    def places(self) -> dict[str, Tensor]:
        """Of each parameter in the block's vector."""
        return self.scene.places()

    @property
    def small(self) -> float:
        """What counts as zero, relative to the terms that cancel."""
        return VANISHES[self.position.dtype]

    @property
    def negligible(self) -> float:
        """What counts as zero in ``H v`` of a unit vector, beside a random one's."""
        return self.small * self.tolerance / (LOST * torch.finfo(self.position.dtype).eps)

    @cached_property
    def signs(self) -> Vector:
        """Random signs, which turn a direction into its twin."""
        made = generator(self.scene.options.seed, self.scene.block.name, "symmetry twin")
        like = self.position
        return rademacher(len(like), generator=made, dtype=like.dtype, device=like.device)

    def level(self, claim: Claim) -> bool:
        """Whether the gradient has no part along the direction, to rounding."""
        terms = self.gradient[claim.places] * claim.direction
        drift = self.tolerance * float(self.position.norm()) * float(claim.direction.norm())
        return abs(float(terms.sum())) <= self.small * float(terms.abs().sum()) + drift

    def balanced(self, left: Tensor, right: Tensor) -> bool:
        """Whether Σ g p over places of ``left`` and ``right`` agree row by row, to rounding."""
        terms = self.gradient * self.position
        sizes = terms.abs() * self.small + self.position.square() * self.tolerance
        apart = (terms[left].sum(dim=1) - terms[right].sum(dim=1)).abs()
        return bool((apart <= sizes[left].sum(dim=1) + sizes[right].sum(dim=1)).all())

    def settle(self, claims: Sequence[Claim]) -> list[bool | None]:
        """Which of the claims hold; None where products or time did not reach.

        Their sum with random coefficients is tested first: it holds where each of them does. A
        sum that does not hold is halved, and of the second half the products are differences.

        Cost:
            Two products where all claims hold. Two for each of them at most, or four where the
            differences would be rounding.
        """
        factors = self.coefficients(len(claims), "claims")
        every = [
            claim.times(float(factor + factor.sign()))  # away from zero
            for claim, factor in zip(claims, factors, strict=True)
        ]
        verdicts: list[bool | None] = [None] * len(every)
        left: list[tuple[range, _Seen | None]] = [(range(len(every)), None)] if every else []
        while left:
            part, known = left.pop()
            some = [every[index] for index in part]
            seen = known or self._look(some)
            if seen is None:
                continue
            holds = self._hold(some, seen)
            if holds or len(some) == 1:
                for index in part:
                    verdicts[index] = holds
                continue
            middle = len(part) // 2
            half = self._look(some[:middle])
            rest = None if half is None else self._without(seen, half, some[middle:])
            left += [(part[middle:], rest), (part[:middle], half)]
        self.asked += len(every)
        self.untested += verdicts.count(None)
        return verdicts

    def _look(self, claims: Sequence[Claim]) -> _Seen | None:
        """The products for the sum of these claims, unless there may be no more."""
        beyond = self.most is not None and self.products + TESTED > self.most
        if beyond or (self.late is not None and self.late()):
            return None
        direction, image = torch.zeros_like(self.position), torch.zeros_like(self.position)
        for claim in claims:
            direction[claim.places] += claim.direction
            if claim.image is not None:
                image[claim.places] += claim.image
        found = self._product(direction)
        twin = self._product(direction * self.signs)
        unit = LOST * torch.finfo(found.dtype).eps
        return _Seen(found - image, twin, unit * float(found.norm() + twin.norm()))

    def _hold(self, claims: Sequence[Claim], seen: _Seen) -> bool:
        """Whether nothing is left of ``H d - image``, in all and at the places of each claim.

        The yardstick is ``H`` of the same direction with random signs, which keeps no symmetry:
        where that is rounding, too, nothing can be seen, and the answer is no. Each claim has its
        own, for a large curvature of one would hide what is left of another.
        """
        twin, apart = _sizes(seen.twin, claims), _sizes(seen.apart, claims)
        lengths = torch.stack([claim.direction.norm() for claim in claims])
        drift = self.tolerance * torch.cat([lengths.norm()[None], lengths])[: len(twin)]
        return bool(((twin > drift) & (apart <= self.small * twin)).all())

    def _without(self, seen: _Seen, half: _Seen, rest: Sequence[Claim]) -> _Seen | None:
        """What the rest of the claims gives by itself; None where rounding hides that."""
        twin, error = seen.twin - half.twin, seen.error + half.error
        if float(_sizes(twin, rest).min()) * self.small <= error:
            return None
        return _Seen(seen.apart - half.apart, twin, error)

    def coefficients(self, count: int, purpose: str) -> Vector:
        """Random numbers, for a combination of ``count`` directions."""
        made = generator(self.scene.options.seed, self.scene.block.name, purpose)
        like = self.position
        return gaussian(count, generator=made, dtype=like.dtype, device=like.device)

    @cached_property
    def _engine(self) -> Engine:
        objective, parameters = self.scene.objective, self.scene.parameters
        if self.scene.options.engine == "difference":
            return Difference(objective, parameters)
        return Recompute(objective, parameters, hessian_product)

    def _product(self, vector: Vector) -> Vector:
        self.products += 1
        return self._engine(vector)


def _sizes(vector: Vector, claims: Sequence[Claim]) -> Tensor:
    """The norm of a vector, and of its parts at the places of each of several claims."""
    parts = [vector[claim.places] for claim in claims] if len(claims) > 1 else []
    return torch.stack([part.norm() for part in (vector, *parts)])


@contextmanager
def probed(
    scene: Scene,
    gradient: Vector | None,
    tolerance: float | None,
    *,
    most: int | None = None,
    late: Callable[[], bool] | None = None,
) -> Iterator[Probe]:
    """A probe of the network in which normalisations have no eps that would break symmetries.

    Products are of the loss's own Hessian whatever ``--curvature`` is, without weight decay.

    Args:
        scene: Of the block.
        gradient: Of the block's loss, or None to compute it.
        tolerance: What ``H v`` of a unit vector may be by rounding alone; None estimates it.
        most: Products that may be taken; None for as many as it needs.
        late: Whether to take no more; None for never.
    """
    if tolerance is None:
        tolerance = _rounding(scene)
    with _without_eps(scene.objective) as changed:
        if gradient is None or changed:
            gradient = scene.objective.gradient(scene.parameters)
        position = flatten([p.data for p in scene.parameters])
        yield Probe(scene, position, gradient, tolerance, most, late)


def _rounding(scene: Scene) -> float:
    """So many units in the last place (``LOST``) of ``H`` times a random vector of unit length."""
    like = scene.parameters[0]
    made = generator(scene.options.seed, scene.block.name, "symmetry tolerance")
    vector = gaussian(scene.block.size, generator=made, dtype=like.dtype, device=like.device)
    eps = torch.finfo(like.dtype).eps
    return LOST * eps * float(scene.product(vector).norm() / vector.norm())


@contextmanager
def _without_eps(objective: Objective) -> Iterator[bool]:
    """Make the eps of normalisation layers negligible; yields whether there are any.

    With its eps the output of BatchNorm changes by eps/(2 var) when its input is scaled: the
    symmetry is that of the layer without it. Where the loss moves without eps, it is more than a
    guard against zero, and stays. Running statistics are no function of the input.
    """
    saved: list[tuple[nn.Module, str, float]] = []
    try:
        for module in objective.model.modules():
            if not isinstance(module, NORMS) and not NAMED.search(type(module).__name__):
                continue
            if not module.training and getattr(module, "running_var", None) is not None:
                continue
            for name in EPSILONS:
                value = module.__dict__.get(name)
                if isinstance(value, float) and value > 0:
                    saved.append((module, name, value))
                    setattr(module, name, value * WITHOUT_EPS)
        if saved:
            without = objective.value()
            _put_back(saved)
            there = objective.value()
            if abs(without - there) <= GUARD * abs(there):
                for module, name, value in saved:
                    setattr(module, name, value * WITHOUT_EPS)
            else:
                saved = []
        yield bool(saved)
    finally:
        _put_back(saved)


def _put_back(saved: list[tuple[nn.Module, str, float]]) -> None:
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
        Two products if the finest groups whose gradient is orthogonal to them are invariant, none
        where there are no such groups; up to two for each tensor and grouping that fails.
    Source:
        maths.md 4.5.
    """
    left = {
        name: _partitions(probe, name, parameter.shape[0])
        for name, parameter in zip(
            probe.scene.block.parameters, probe.scene.parameters, strict=True
        )
        if parameter.ndim >= 2 and parameter.numel()
    }
    found: dict[str, Groups] = {}
    while left:
        next_level = {name: _next_level(probe, partitions) for name, partitions in left.items()}
        candidates = {name: groups for name, groups in next_level.items() if groups is not None}
        verdicts = probe.settle([_claim(probe, groups) for groups in candidates.values()])
        outcome = dict(zip(candidates, verdicts, strict=True))
        found |= {name: candidates[name] for name, holds in outcome.items() if holds}
        left = {name: left[name] for name, holds in outcome.items() if holds is False}
    return [found[name] for name in probe.scene.block.parameters if name in found]


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


def _next_level(probe: Probe, partitions: Iterator[Groups]) -> Groups | None:
    """Of the next partition that has any: the groups to which the gradient is orthogonal."""
    for groups in partitions:
        places = groups.places
        weight, gradient = probe.position[places], probe.gradient[places]
        size = weight.square().sum(dim=1)
        left = (weight * gradient).sum(dim=1).abs()
        most = probe.small * (weight * gradient).abs().sum(dim=1) + probe.tolerance * size
        alive = ~probe.scene.dead.to(places.device)[places].all(dim=1) & (size > 0)
        kept = places[alive & (left <= most)]
        if len(kept):
            return Groups(groups.names, kept)
    return None


def _claim(probe: Probe, groups: Groups) -> Claim:
    places = groups.places.flatten()
    return Claim(places, probe.position[places], -probe.gradient[places])
