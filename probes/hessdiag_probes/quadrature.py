"""Stochastic Lanczos quadrature: the distribution of the eigenvalues, with two errors apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hessdiag_probes.basis import AS_IT_IS, Storage
from hessdiag_probes.counts import least_count, most_count
from hessdiag_probes.lanczos import Ritz, lanczos
from hessdiag_probes.random import gaussian
from hessdiag_probes.rules import Recurrence, Rule
from hessdiag_probes.types import Matvec, norm

EPS = torch.finfo(torch.float64).eps
SMOOTHING = 2.0
MARGIN = 4.0


@dataclass(frozen=True, slots=True)
class Mass:
    """The share of the eigenvalues in a set.

    Attributes:
        value: The likeliest, a share of ``n``.
        low: ``least / n``.
        high: ``most / n``; ``[low, high]`` holds the truth at ``confidence``, both errors included.
        resolution_low: What the probes' share in the set is at least, by the Lanczos runs.
        resolution_high: And at most; the truth for these probes lies within, with certainty.
        stderr: Of the probes: by how much another set of probes would differ.
        least: Lower end of the count.
        most: Upper end of the count.
        confidence: Of ``[low, high]``, half of the rest on each side.
    """

    value: float
    low: float
    high: float
    resolution_low: float
    resolution_high: float
    stderr: float
    least: int
    most: int
    confidence: float


@dataclass(frozen=True, slots=True)
class Density:
    """Of the eigenvalues, smoothed, per unit of ``A``; float64 on the CPU, shape of the grid.

    ``stderr`` is that of the probes: it follows from the law of the shares, not from their
    scatter. What the Lanczos runs do not resolve is not in it.
    """

    value: Tensor
    stderr: Tensor


@dataclass(frozen=True, slots=True)
class Quadrature:
    """The spectral measures of random vectors, known by their first moments.

    The pooled measure ``μ`` of a set is the share of the probes, in their summed square norms,
    that lies in the span of the eigenvectors of the set; its mean is the share of the eigenvalues.

    Attributes:
        n: The size of the operator.
        runs: One per probe.
        share: Of each probe in the pooled measure: its square norm over the sum of all.
        rule: The Gauss rules of all probes as one, nodes ascending.
        rounding: Eigenvalues nearer than this are not told apart.
        floor: Shares smaller than this are not told from zero.
        matvecs: Products spent.
    """

    n: int
    runs: tuple[Recurrence, ...]
    share: tuple[float, ...]
    rule: Rule
    rounding: float
    floor: float
    matvecs: int

    @property
    def steps(self) -> int:
        """The depth of the shallowest run that is not invariant, or else of the deepest."""
        open_ended = [run.diagonal.size for run in self.runs if not run.invariant]
        return min(open_ended) if open_ended else max(run.diagonal.size for run in self.runs)

    @property
    def span(self) -> float:
        """From the smallest to the largest node, at most that of the spectrum."""
        node = self.rule.node
        return float(node[-1] - node[0])

    @property
    def resolution(self) -> float:
        """``5 span / steps²``: a count of the eigenvalues above a smaller threshold is rarely good.

        A rule of thumb for spectra that reach down to zero. The masses carry their own brackets,
        which are proven. 0 where every run is invariant.
        """
        if all(run.invariant for run in self.runs):
            return 0.0
        return 5 * self.span / self.steps**2

    def bracket(self, threshold: float) -> tuple[float, float]:
        """What ``μ((threshold, ∞))`` is at least and at most, with certainty.

        Eigenvalues within :attr:`rounding` of the threshold may count or not.

        Cost:
            ``O(steps³)`` per probe, no matvec.

        Source:
            The Chebyshev–Markov–Stieltjes inequalities: sharp, for a measure of known moments.
        """
        if math.isinf(threshold):
            return (0.0, 0.0) if threshold > 0 else (1.0, 1.0)
        low = high = 0.0
        for share, run in zip(self.share, self.runs, strict=True):
            node, weight = run.pinned(threshold)
            low += share * float(weight[node > threshold + self.rounding].sum())
            high += share * float(weight[node >= threshold - self.rounding].sum())
        return max(low - self.floor, 0.0), min(high + self.floor, 1.0)

    def estimate(self, threshold: float) -> float:
        """``μ((threshold, ∞))`` by the Gauss rules; it may leave the bracket, which then decides.

        Half of a node's weight counts at the node, and between nodes it is interpolated: a step
        at each node would err by its whole weight.
        """
        share = 0.0
        for part, run in zip(self.share, self.runs, strict=True):
            node, weight = run.gauss
            beyond = 1 - np.cumsum(weight) + weight / 2
            share += part * float(np.interp(threshold, node, beyond, left=1.0, right=0.0))
        return share

    def above(
        self, threshold: float, *, upto: float | None = None, confidence: float = 0.95
    ) -> Mass:
        """The eigenvalues above a threshold; with ``upto``, above one in ``[threshold, upto]``."""
        low, high = self.bracket(threshold)
        if upto is not None:
            low, _ = self.bracket(upto)
        return self._mass(low, high, self.estimate(threshold), confidence)

    def below(
        self, threshold: float, *, downto: float | None = None, confidence: float = 0.95
    ) -> Mass:
        """The eigenvalues below one; with ``downto``, below one in ``[downto, threshold]``."""
        low, high = self.bracket(threshold)
        if downto is not None:
            _, high = self.bracket(downto)
        return self._mass(1 - high, 1 - low, 1 - self.estimate(threshold), confidence)

    def between(self, left: float, right: float, *, confidence: float = 0.95) -> Mass:
        """The eigenvalues in ``[left, right]``."""
        low_left, high_left = self.bracket(left)
        low_right, high_right = self.bracket(right)
        value = max(self.estimate(left) - self.estimate(right), 0.0)
        return self._mass(max(low_left - high_right, 0.0), high_left - low_right, value, confidence)

    def grid(self, points: int = 1024, width: float | None = None) -> Tensor:
        """Evenly spaced points that hold the smoothed density, shape ``(points,)``."""
        width = self.smoothing if width is None else width
        node = self.rule.node
        left, right = float(node[0]) - MARGIN * width, float(node[-1]) + MARGIN * width
        return torch.linspace(left, right, points, dtype=torch.float64)

    @property
    def smoothing(self) -> float:
        """A width for :meth:`density`: half the mean distance of a run's nodes, never zero."""
        largest = float(self.rule.node.abs().max())
        narrowest = 1e-3 * largest if largest > 0 else 1.0
        return max(self.span / (SMOOTHING * self.steps), narrowest)

    def density(self, grid: Tensor, width: float | None = None) -> Density:
        """The pooled measure convolved with a Gaussian, at the grid's points.

        Args:
            grid: Any points, shape ``(points,)``, as :meth:`grid` makes them.
            width: Standard deviation of the Gaussian; default :attr:`smoothing`.

        Returns:
            The density, whose integral over the line is 1, and its error.

        Raises:
            ValueError: ``width`` is not positive.
        """
        width = self.smoothing if width is None else width
        if not width > 0:
            raise ValueError(f"width = {width}; smooth with a positive one")
        rule = self.rule
        distance = (grid.double()[:, None] - rule.node) / width
        kernel = torch.exp(-0.5 * distance.square()) / (width * math.sqrt(2 * math.pi))
        value = kernel @ rule.weight
        spread = (kernel.square() @ rule.weight - value.square()).clamp_min(0)
        return Density(value, (2 * spread / (len(self.runs) * self.n + 2)).sqrt())

    def _mass(self, low: float, high: float, value: float, confidence: float) -> Mass:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence = {confidence} lies outside (0, 1)")
        tail, probes = (1 - confidence) / 2, len(self.runs)
        value = min(max(value, low), high)
        least = least_count(low, self.n, probes, tail)
        most = most_count(high, self.n, probes, tail)
        return Mass(
            value=value,
            low=least / self.n,
            high=most / self.n,
            resolution_low=low,
            resolution_high=high,
            stderr=math.sqrt(max(2 * value * (1 - value), 0.0) / (probes * self.n + 2)),
            least=least,
            most=most,
            confidence=confidence,
        )


def stochastic_quadrature(
    matvec: Matvec,
    n: int,
    probes: int,
    steps: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    stop: Callable[[], bool] | None = None,
    storage: Storage = AS_IT_IS,
) -> Quadrature:
    """Estimate the distribution of the eigenvalues of a symmetric operator.

    Args:
        matvec: ``v -> A v`` for a real symmetric ``A``.
        n: The size of the operator.
        probes: How many random starts, at least 1.
        steps: Lanczos steps from each, at least 1; no more than ``n`` are made.
        generator: On the CPU, as :func:`hessdiag_probes.generator` makes it.
        dtype: Of the vectors.
        device: Of the vectors.
        stop: Asked after every product whether those done must do.
        storage: How the basis of a run is kept; not in fewer digits.

    Returns:
        The measures, in the units of ``A``. The bases are thrown away.

    Raises:
        ValueError: An argument lies outside its range.
        Breakdown: A product is not finite.

    Cost:
        At most ``probes steps`` matvecs; ``n steps`` numbers while a run lasts.

    Source:
        Ubaru, Chen and Saad (2017). Starts are Gaussian, so uniform on the sphere, and weigh by
        their square norms: that makes the pooled share a Beta variable, see
        :func:`hessdiag_probes.counts.most_count`.
    """
    if n < 1:
        raise ValueError(f"n = {n}, but an operator acts on at least one number")
    if probes < 1:
        raise ValueError(f"probes = {probes}; a quadrature takes at least 1")
    if steps < 1:
        raise ValueError(f"steps = {steps}; a quadrature takes at least 1")
    runs: list[Recurrence] = []
    squares: list[float] = []
    matvecs = 0
    scale = 0.0
    cut: Callable[[Ritz], bool] | None = None if stop is None else lambda _: stop()
    for _ in range(probes):
        if runs and stop is not None and stop():
            break
        start = gaussian(n, generator=generator, dtype=dtype, device=device)
        run = lanczos(matvec, start, min(steps, n), converged=cut, storage=storage)
        runs.append(Recurrence.of(run))
        squares.append(norm(start) ** 2)
        matvecs += run.matvecs
        scale = max(scale, float(run.diagonal.abs().max()), *run.offdiagonal.tolist())
    eps = torch.finfo(dtype).eps
    deepest = max(run.diagonal.size for run in runs)
    shares = tuple(square / sum(squares) for square in squares)
    return Quadrature(
        n=n,
        runs=tuple(runs),
        share=shares,
        rule=_pooled(runs, shares),
        # The first as Lanczos calls a space invariant; the second what such a call may lose.
        rounding=10 * math.sqrt(max(n, 10)) * eps * scale,
        floor=4 * deepest * EPS + 100 * n * eps**2,
        matvecs=matvecs,
    )


def _pooled(runs: Sequence[Recurrence], shares: Sequence[float]) -> Rule:
    rules = [run.gauss for run in runs]
    node = np.concatenate([node for node, _ in rules])
    weight = np.concatenate([s * weight for s, (_, weight) in zip(shares, rules, strict=True)])
    order = np.argsort(node)
    return Rule(torch.from_numpy(node[order]), torch.from_numpy(weight[order]))
