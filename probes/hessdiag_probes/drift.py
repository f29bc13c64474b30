"""What a Krylov decomposition with rounded basis vectors still certifies.

With the vectors as they are kept, ``A Q = Q T + r e_kᵀ + F``; every column of ``F`` is measured.
None of what follows takes ``Q`` for orthonormal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a decomposition is from that of Lanczos.

    Attributes:
        columns: ``‖f_j‖`` at most, ``(k,)``, in the units of ``A``.
        start: How far the first vector as kept is from the start, of norm 1.
        overlap: ``‖QᵀQ - I‖_F``.
    """

    columns: Array
    start: float
    overlap: float

    @property
    def shrink(self) -> float:
        """``‖Q s‖ >= shrink`` for every unit ``s``; 0 where nothing is certain."""
        return math.sqrt(max(1.0 - self.overlap, 0.0))

    @property
    def reach(self) -> float:
        """How far a Ritz value may lie from the Rayleigh quotient of its vector."""
        size = float(np.linalg.norm(self.columns))
        return size / self.shrink**2 if self.shrink > 0 else math.inf

    def residuals(self, beta: float, rotation: Array) -> Array:
        """``‖A v - θ v‖ / ‖v‖`` at most, ``(k,)``, for ``v = Q s``, ``s`` each column."""
        if self.shrink == 0:
            return np.full(rotation.shape[1], math.inf)
        share = np.abs(rotation)
        found: Array = (beta * share[-1] + self.columns @ share) / self.shrink
        return found

    def beyond(
        self, diagonal: Array, offdiagonal: Array, beta: float, end: float, share: float
    ) -> float:
        """How far beyond ``end``, the largest eigenvalue of ``T``, that of ``A`` may lie.

        Args:
            diagonal: Of ``T``.
            offdiagonal: Of ``T``, positive.
            beta: ``‖r‖``.
            end: Of ``T``.
            share: What ``|uᵀv|`` is at least, ``v`` the start and ``u`` an eigenvector of ``A``
                of its largest eigenvalue λ.
        Source:
            ``uᵀA Q = λ uᵀQ`` gives ``uᵀQ (λ - T) = uᵀr e_kᵀ + uᵀF``, so that with
            ``y = (λ - T)⁻¹ e_1`` the start's share is at most ``β |y_k| + Σ_j ‖f_j‖ |y_j|``: for
            ``F = 0`` the bound of van Dorsselaer, Hochstenbach and van der Vorst (2000). All
            ``y_j`` are positive beyond ``T``, and fall with λ.
        """
        least = share - self.start
        if least <= 0:
            return math.inf
        weight = self.columns.copy()
        weight[-1] += beta
        size = float(np.linalg.norm(weight))
        if size == 0:
            return 0.0

        def excess(log_step: float) -> float:
            total = _response(end - diagonal, offdiagonal, math.exp(log_step), weight)
            return math.inf if total is None else total - least

        high = math.log(size / least)  # ‖y‖ is at most the inverse of the distance
        low = high + math.log(least) - 60.0
        tiny = 1e-13 * max(float(np.abs(diagonal).max()), float(np.max(offdiagonal, initial=0.0)))
        low = max(low, math.log(tiny)) if tiny > 0 else low
        if excess(high) >= 0:  # by rounding alone
            return math.exp(high) * (1 + 2e-6)
        if low >= high or excess(low) <= 0:
            return math.exp(low)
        from scipy.optimize import brentq  # slow to import, and rarely needed

        capped = float(brentq(lambda s: min(excess(s), 1e300), low, high, xtol=1e-6))
        return math.exp(capped) * (1 + 2e-6)


def _response(gaps: Array, offdiagonal: Array, step: float, weight: Array) -> float | None:
    """``Σ_j w_j y_j`` for ``(θ + step - T) y = e_1``; None where that matrix is not definite.

    ``gaps`` are those of the diagonal of ``T`` to ``θ``, lest a small step drown in ``θ``.
    """
    pivots = gaps + step
    for j in range(len(gaps) - 2, -1, -1):
        if pivots[j + 1] <= 0:
            return None
        pivots[j] -= offdiagonal[j] ** 2 / pivots[j + 1]
    if pivots[0] <= 0:
        return None
    entry = 1.0 / pivots[0]
    total = weight[0] * entry
    for j in range(1, len(gaps)):
        entry *= offdiagonal[j - 1] / pivots[j]
        total += weight[j] * entry
    return float(total)
