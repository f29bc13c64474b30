"""Power iteration: a few vectors of memory, and a certificate for both ends of a spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from hessdiag_probes.polynomial import beyond, chebyshev, share
from hessdiag_probes.types import CountedMatvec, Matvec, Vector, check_vector, norm, unit

FIRST = 4
DEGREE = 512
BEYOND_MIDDLE = 0.75


@dataclass(frozen=True, slots=True)
class Power:
    """``‖A v - value v‖ = residual``, ``‖v‖ = 1``: some eigenvalue lies within ``residual``.

    Attributes:
        value: The Rayleigh quotient of ``A`` itself, whatever the shift.
        residual: Belongs to ``value`` and ``vector``, converged or not.
        vector: Shape ``(n,)``.
        steps: Products spent.
        converged: ``residual`` fell to the tolerance; otherwise ``value`` need not be near
            any eigenvalue.
    """

    value: float
    residual: float
    vector: Vector
    steps: int
    converged: bool


@dataclass(frozen=True, slots=True)
class Ends:
    """Both ends of a spectrum: from inside with residuals, from outside with certificates.

    Attributes:
        largest: ``largest.value <= λ_max`` whatever the start.
        smallest: ``smallest.value >= λ_min`` likewise.
        low: ``low <= λ_min``, except with the probability of failure that was asked for.
        high: ``high >= λ_max``, likewise, each by itself.
        matvecs: All products spent.
    """

    largest: Power
    smallest: Power
    low: float
    high: float
    matvecs: int


def power(
    matvec: Matvec, start: Vector, steps: int, tolerance: float, *, shift: float = 0.0
) -> Power:
    """Follow the eigenvalue that lies farthest from ``shift``.

    Args:
        matvec: ``v -> A v`` for a real symmetric ``A``.
        start: Any nonzero vector of shape ``(n,)``; it fixes ``n``, the dtype and the device.
        steps: At most this many products, at least 1.
        tolerance: Wanted residual relative to the largest ``‖A v‖`` seen, which is at most
            and in the end nearly ``‖A‖``.
        shift: The iteration runs on ``A - shift I``.

    Returns:
        The last iterate. Where two eigenvalues lie equally far from ``shift`` on its two sides
        it is a mixture: ``converged`` is false and the residual large.

    Raises:
        ValueError: ``steps`` or ``tolerance`` cannot be met.
        Breakdown: ``start`` is zero, or a product is not finite.

    Cost:
        At most ``steps`` matvecs; two vectors. With ``l`` the farthest and ``m`` the next, the
        error of the value falls by ``((m - shift) / (l - shift))²`` per step.
    """
    check_vector(start)
    return _iterate(CountedMatvec(matvec), start, steps, tolerance, shift=shift, scale=0.0)


def power_ends(
    matvec: Matvec,
    start: Vector,
    steps: int,
    tolerance: float,
    *,
    failure: float = 1e-3,
    stop: Callable[[], bool] | None = None,
) -> Ends:
    """Both ends of the spectrum by shifted power iterations, and a bound beyond each.

    Two iterations follow one end each; their shift lies on the far side of what is known, so that
    ends of equal size and opposite sign do not mix. A third, whose shift changes, certifies: from
    the start ``v`` it reaches ``p(A) v``, ``p`` a polynomial with known real roots, and

        ``‖p(A) v‖ >= γ |p(λ_max)|``, ``γ = |uᵀv|``, ``u`` a unit eigenvector of ``λ_max``.

    ``P(γ < c) <= failure`` for ``c = failure √(π / 2n)``. Above its largest root ``|p|`` grows, so
    the ``x`` there with ``|p(x)| = ‖p(A) v‖ / c`` is a bound. That ``γ >= c`` concerns ``u`` and
    the start only: one such event makes the bounds of all ``p`` right at once, whatever their
    roots, their degrees, and what these were chosen by. So neither the choice of shifts nor an
    early end nor taking the best of all bounds costs confidence. ``λ_min`` has its own event.
    The first shifts are the Rayleigh quotient of the start, the later ones the roots of Chebyshev
    polynomials on the part of the spectrum found so far, which certify both ends together.

    Args:
        matvec: ``v -> A v`` for a real symmetric ``A``.
        start: Uniform on the unit sphere, as :func:`hessdiag_probes.sphere` draws it: the
            certificates rest on that. It fixes ``n``, the dtype and the device.
        steps: At most this many products in all, at least 1.
        tolerance: Wanted ``high - largest.value`` and ``smallest.value - low``, relative to the
            largest ``‖A v‖`` seen; the search ends where both are met.
        failure: Of each bound, above 0 and below 1.
        stop: Asked after every product whether those done must do.

    Returns:
        The ends, ``low <= smallest.value <= largest.value <= high``; ``converged`` where a
        residual fell to the tolerance, which is no part of the certificate.

    Raises:
        ValueError: ``steps``, ``tolerance`` or ``failure`` cannot be met.
        Breakdown: ``start`` is zero, or a product is not finite.

    Cost:
        At most ``steps`` matvecs and about eight vectors. About half of the products certify. The
        wider side of the certificate, in units of ``λ_max - λ_min``, was at most 0.36, 0.14, 0.05
        and 0.014 after 40, 80, 200 and 600 products, and mostly half of that (twelve spectra,
        ``n`` = 2000, ``failure`` = 1e-3); Lanczos, where its basis fits, is far ahead of that.

    Source:
        van Dorsselaer, Hochstenbach and van der Vorst (2000), whose polynomial is that of Lanczos;
        the order of the roots from Reichel (1990).
    """
    check_vector(start)
    if steps < 1:
        raise ValueError(f"steps = {steps}; a Rayleigh quotient takes at least one product")
    if not tolerance >= 0:
        raise ValueError(f"tolerance = {tolerance}; it is a relative width, so at least 0")
    if not 0 < failure < 1:
        raise ValueError(f"failure = {failure} is no probability between 0 and 1; take 1e-3")
    search = _Search(CountedMatvec(matvec), unit(start), steps, failure, stop)
    search.certify([None])
    first = search.top = search.bottom = search.reached
    if search.goes_on(tolerance):
        search.certify([first.value] * (FIRST - 1))
    search.top = max(first, search.reached, key=lambda end: end.value)
    search.bottom = min(first, search.reached, key=lambda end: end.value)
    length = FIRST
    while search.goes_on(tolerance):
        search.follow(length // 2, tolerance / 100)
        degree = min(length, DEGREE, steps - search.product.count)
        search.certify(chebyshev(search.bottom.value, search.top.value, degree))
        length = 3 * length // 2
    return search.ends(tolerance)


@dataclass(frozen=True, slots=True)
class _Iterate:
    """A unit vector, its product, what they give, and how many products led here."""

    vector: Vector
    image: Vector
    value: float
    residual: float
    steps: int


class _Search:
    """The state of :func:`power_ends`: an iterate for each end, and a chain that certifies."""

    def __init__(
        self,
        product: CountedMatvec,
        start: Vector,
        steps: int,
        failure: float,
        stop: Callable[[], bool] | None,
    ) -> None:
        self.product, self.steps, self.stop = product, steps, stop
        self.log_share = math.log(share(start.numel(), failure))
        self.rounding = 10 * torch.finfo(start.dtype).eps
        self.scale, self.over = 0.0, False
        self.vector, self.log_norm = start, 0.0
        self.roots: list[float] = []
        self.low, self.high = -math.inf, math.inf
        self.top = self.bottom = self.reached = _Iterate(start, start, 0.0, 0.0, 0)

    def goes_on(self, tolerance: float) -> bool:
        """Whether a product may be spent, and one is called for."""
        width = max(self.high - self.top.value, self.bottom.value - self.low)
        return not self.over and width > tolerance * self.scale

    def certify(self, shifts: Iterable[float | None]) -> None:
        """Multiply the chain by ``A - shift`` for each shift, then bound both ends by its norm.

        None is a shift by the Rayleigh quotient itself.
        """
        for given in shifts:
            if self.over:
                break
            reached = self._measure(self.vector, len(self.roots) + 1)
            shift = reached.value if given is None else given
            size = math.hypot(reached.residual, reached.value - shift)
            rounding = self.rounding * math.hypot(reached.residual, reached.value, shift)
            self.roots.append(shift)
            self.log_norm += math.log(size + rounding) if size + rounding > 0 else -math.inf
            if size <= rounding:
                self.over = True  # nothing is left of the chain
            else:
                self.vector = _moved(reached, shift)
            self.reached = reached
        least, most = min(self.roots), max(self.roots)
        target = self.log_norm - self.log_share
        self.low = max(self.low, least - beyond([root - least for root in self.roots], target))
        self.high = min(self.high, most + beyond([most - root for root in self.roots], target))

    def follow(self, count: int, settled: float) -> None:
        """Move each end's iterate up to ``count`` products on, unless its residual has settled."""
        for sign in (1, -1):
            for _ in range(count):
                end, other = (self.top, self.bottom) if sign > 0 else (self.bottom, self.top)
                if self.over or end.residual <= settled * self.scale:
                    break
                # The other end may lie its residual farther out; beyond the middle of that, this
                # end is the farthest.
                gap = abs(end.value - other.value) + other.residual
                shift = end.value - sign * BEYOND_MIDDLE * gap
                end = self._measure(_moved(end, shift), end.steps + 1)
                if sign > 0:
                    self.top = end
                else:
                    self.bottom = end

    def ends(self, tolerance: float) -> Ends:
        """The result; an inner bound is right whatever the certificate says."""
        smallest, largest = (
            Power(
                end.value,
                end.residual,
                end.vector,
                end.steps,
                end.residual <= tolerance * self.scale,
            )
            for end in sorted((self.bottom, self.top), key=lambda end: end.value)
        )
        return Ends(
            largest=largest,
            smallest=smallest,
            low=min(self.low, smallest.value),
            high=max(self.high, largest.value),
            matvecs=self.product.count,
        )

    def _measure(self, vector: Vector, steps: int) -> _Iterate:
        image = self.product(vector)
        value = float((vector * image).sum(dtype=torch.float64))
        residual = norm(image - value * vector)
        self.scale = max(self.scale, math.hypot(value, residual))
        self.over = self.product.count >= self.steps or (self.stop is not None and self.stop())
        return _Iterate(vector, image, value, residual, steps)


def _moved(iterate: _Iterate, shift: float) -> Vector:
    return unit(iterate.image - shift * iterate.vector)


def _iterate(
    product: CountedMatvec,
    start: Vector,
    steps: int,
    tolerance: float,
    *,
    shift: float,
    scale: float,
) -> Power:
    if steps < 1:
        raise ValueError(f"steps = {steps}; a Rayleigh quotient takes at least one product")
    if not tolerance >= 0:
        raise ValueError(f"tolerance = {tolerance}; it is a relative residual, so at least 0")
    vector = unit(start)
    for step in range(1, steps + 1):
        image = product(vector)
        value = float((vector * image).sum(dtype=torch.float64))
        remainder = image - value * vector
        residual = norm(remainder)
        scale = max(scale, math.hypot(value, residual))
        converged = residual <= tolerance * scale
        if converged or step == steps:
            break
        vector = unit(remainder + (value - shift) * vector)
    return Power(value, residual, vector, step, converged)
