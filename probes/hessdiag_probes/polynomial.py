"""What the norm of ``p(A) v`` says of a spectrum, for a polynomial with known real roots."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CLOSE = 1e-6  # relative, of a root
NEWTON_STEPS = 200  # each of which leaves a bound; far fewer are taken


def share(n: int, failure: float) -> float:
    """A ``c`` with ``P(|uᵀv| < c) <= failure``, ``v`` uniform on the sphere, ``u`` any unit vector.

    From ``P <= √(2 (n-1) / π) c`` for ``n >= 3`` and ``P = 2 arcsin(c) / π`` for ``n = 2``; for
    ``n = 1`` the share is 1.
    """
    return min(1.0, failure * math.sqrt(math.pi / (2 * n)))


def beyond(gaps: Sequence[float], log_value: float) -> float:
    """The step ``s >= 0`` with ``Σ ln(s + gap_i) = log_value``, one gap being 0; rounded up."""
    if log_value == -math.inf:
        return 0.0
    with np.errstate(divide="ignore"):
        distances = np.log(np.asarray(gaps, dtype=np.float64))
    # The sum is convex in ln s: Newton's steps from the right never pass the root.
    log_step = log_value / len(distances)  # there every factor is at least the step
    for _ in range(NEWTON_STEPS):
        factors = np.logaddexp(log_step, distances)
        excess = float(factors.sum()) - log_value
        change = excess / float(np.exp(log_step - factors).sum())
        log_step -= max(change, 0.0)
        if not change > CLOSE:
            break
    return math.exp(log_step) * (1 + 2 * CLOSE)


def chebyshev(low: float, high: float, degree: int) -> list[float]:
    """The roots of the Chebyshev polynomial of ``[low, high]``, in the order of Leja.

    Each is the one farthest, in the product of distances, from all before it, so that every
    leading part is a fair polynomial of its own and rounding is nowhere amplified.
    """
    nodes = np.cos(np.pi * (np.arange(degree) + 0.5) / degree)
    spread = np.abs(nodes)
    order: list[int] = []
    with np.errstate(divide="ignore"):
        for _ in range(degree):
            order.append(int(np.argmax(spread)))
            if len(order) == 1:
                spread = np.zeros(degree)
            spread += np.log(np.abs(nodes - nodes[order[-1]]))
    return [float(place) for place in (low + high) / 2 + (high - low) / 2 * nodes[order]]
