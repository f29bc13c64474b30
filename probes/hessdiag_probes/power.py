"""Power iteration: two vectors of memory, and a second opinion on the norm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hessdiag_probes.types import CountedMatvec, Matvec, Vector, check_vector, norm, unit


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
    """Both ends of a spectrum, each with its residual, and all the products spent."""

    largest: Power
    smallest: Power
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


def power_ends(matvec: Matvec, start: Vector, steps: int, tolerance: float) -> Ends:
    """Both ends of the spectrum, the second by shifting with the first.

    Where the first run does not settle, for example because the ends are of nearly equal size and
    opposite sign, each end is sought with a shift by the norm of the operator.

    Args:
        matvec: ``v -> A v`` for a real symmetric ``A``.
        start: As for :func:`power`; random, so that it has a share in both ends.
        steps: At most this many products in each run.
        tolerance: Wanted residuals, relative to the norm of the operator.

    Returns:
        The ends, ``largest.value >= smallest.value``.

    Raises:
        ValueError: ``steps`` or ``tolerance`` cannot be met.
        Breakdown: ``start`` is zero, or a product is not finite.

    Cost:
        Two or three runs of at most ``steps`` matvecs; two vectors beside the start and the
        results.
    """
    check_vector(start)
    product = CountedMatvec(matvec)
    first = _iterate(product, start, steps, tolerance, shift=0.0, scale=0.0)
    scale = math.hypot(first.value, first.residual)  # ‖A v‖, which tends to ‖A‖
    shifts = (first.value,) if first.converged else (-scale, scale)
    found = [
        _iterate(product, start, steps, tolerance, shift=shift, scale=scale) for shift in shifts
    ]
    if first.converged:
        found.append(first)
    smallest, largest = sorted(found, key=lambda end: end.value)
    return Ends(largest=largest, smallest=smallest, matvecs=product.count)


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
