"""How much better another diagonal preconditioner could be, with a certificate (maths 5.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessdiag.quantity import Quantity
from hessdiag_probes.scaling import unit_spectrum

EPS = torch.finfo(torch.float64).eps


def diagonal_floor(matrix: Tensor, entry_error: float) -> float | None:
    """What no diagonal scaling brings κ below: it depends on the block alone, not on P.

    Args:
        matrix: H, symmetric, (n, n); zero rows are left out.
        entry_error: A bound of ``|δh_ij| / sqrt(h_ii h_jj)``, the errors of the given entries.
    Returns:
        ``max(1/l_min(J), l_max(J))`` with J of unit diagonal, rounded down; at least 1. None
        unless the nonzero rows are certainly positive definite.
    Cost:
        The eigenvalues of a dense matrix.
    Source:
        maths 5.3, whose other term is the geometric mean of these two. With ``Jv = l v`` and
        ``E = D⁻²``, ``l_1 E ≤ J ≤ κ l_1 E``: ``Σ v_i² J_ii ≤ κ l_1 Σ v_i² E_ii ≤ κ vᵀJv`` at the
        least l, so that ``1 ≤ κ l_min``; in the same way ``vᵀJv ≤ κ Σ v_i² J_ii`` at the largest.
    """
    live = (matrix != 0).any(dim=1)
    if not bool(live.any()):
        return None
    ends = unit_spectrum(matrix[live][:, live], entry_error)
    if ends is None:
        return None
    floor = max(1 / (ends.smallest + ends.error), ends.largest - ends.error)
    return max(floor * (1 - 4 * EPS), 1.0)


def diagonal_gap(kappa: Quantity, floor: float | None, *, bound: float | None = None) -> Quantity:
    """By which factor another diagonal could still lower κ, at most.

    Args:
        kappa: Of PᵀHP, P diagonal, without any shift: decoupled weight decay voids the floor.
        floor: :func:`diagonal_floor` of H.
        bound: A sharper one, such as the dual bound of ``optimal``; or None.
    Returns:
        ``upper-bound``, at least 1: the truth ``κ / min_D κ(DHD)`` is at most that. Absent where
        there is no floor, unresolved where κ is not bounded from above.
    Source:
        maths 5.3.
    """
    if floor is None or kappa.status in (None, "zero"):
        return Quantity.absent()
    if kappa.high is None or kappa.confidence is None:
        return Quantity.unresolved()
    least = max(floor, 1.0 if bound is None else bound)
    gap = kappa.high / least * (1 + 4 * EPS)
    return Quantity.upper_bound(max(gap, 1.0) if math.isfinite(gap) else gap, kappa.confidence)
