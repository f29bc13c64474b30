"""The symmetric Lanczos process with full reorthogonalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from hessdiag_probes.polynomial import beyond, share
from hessdiag_probes.types import CountedMatvec, Matvec, Vector, check_vector, norm, unit


@dataclass(frozen=True, slots=True)
class Ritz:
    """Eigenvalues of ``T``, ascending, with what each is worth; float64 on the CPU, shape ``(k,)``.

    Some eigenvalue of ``A`` lies within ``bound`` of each ``value`` (up to the rounding of the
    products); it does not say which one. ``weight`` is the squared share of the start vector that
    the Ritz vector carries: nonnegative, of sum 1. ``size`` is that of ``A``, and ``growth`` the
    sum of the logarithms of the off-diagonals of ``T`` and of the residual's norm.
    """

    value: Tensor
    bound: Tensor
    weight: Tensor
    growth: float
    size: int

    def ends(self, failure: float) -> tuple[float, float]:
        """Bounds from outside on the smallest and on the largest eigenvalue of ``A``.

        Args:
            failure: Each bound is wrong with at most this probability over the start, which must
                be uniform on the unit sphere; once right, it is right at every depth, so that
                stopping when the bounds are close enough costs nothing.
        Source:
            van Dorsselaer, Hochstenbach and van der Vorst (2000): the Lanczos polynomial
            ``Π (t - θ_i) / Π β_i`` maps the start to a unit vector, so at the largest eigenvalue
            it is at most the inverse of the start's share there, and it grows beyond ``θ_k``.
            That share is rarely less than :func:`hessdiag_probes.polynomial.share`.
        """
        if not 0 < failure < 1:
            raise ValueError(f"failure = {failure} lies outside (0, 1)")
        target = self.growth - math.log(share(self.size, failure))
        value = self.value.tolist()
        below = beyond([v - value[0] for v in value], target)
        above = beyond([value[-1] - v for v in value], target)
        return value[0] - below, value[-1] + above


@dataclass(frozen=True, slots=True)
class Tridiagonal:
    """``A Q = Q T + r e_kᵀ``, ``QᵀQ = I``: ``T`` by its diagonals, ``Q`` by rows.

    Attributes:
        diagonal: Of ``T``, shape ``(k,)``, float64 on the CPU.
        offdiagonal: Of ``T``, shape ``(k - 1,)``, positive, float64 on the CPU.
        basis: ``Qᵀ``, shape ``(k, n)``, in the dtype and on the device of the start.
        residual: ``r``, shape ``(n,)``, orthogonal to the basis.
        matvecs: Products spent.
        invariant: The Krylov space is invariant to rounding, so the Ritz values are eigenvalues.
    """

    diagonal: Tensor
    offdiagonal: Tensor
    basis: Tensor
    residual: Tensor
    matvecs: int
    invariant: bool

    def ritz(self) -> Ritz:
        """The Ritz values with their residual bounds ``|β_k s_k|`` and weights ``s_1²``."""
        growth = float(self.offdiagonal.log().sum())
        return _ritz(
            self.diagonal, self.offdiagonal, growth, norm(self.residual), self.residual.numel()
        )

    def vectors(self, indices: Sequence[int]) -> Tensor:
        """The Ritz vectors of the given Ritz values, as columns of shape ``(n, len(indices))``."""
        _, rotation = _eigh_tridiagonal(self.diagonal, self.offdiagonal)
        return self.basis.T @ rotation[:, list(indices)].to(self.basis)


def lanczos(
    matvec: Matvec,
    start: Vector,
    steps: int,
    *,
    converged: Callable[[Ritz], bool] | None = None,
) -> Tridiagonal:
    """Tridiagonalise a symmetric operator on the Krylov space of ``start``.

    Args:
        matvec: ``v -> A v`` for a real symmetric ``A``.
        start: Any nonzero vector of shape ``(n,)``; it fixes ``n``, the dtype and the device.
        steps: Wanted depth, ``1 <= steps <= n``. The result is shallower, and
            exact, when the Krylov space is invariant first.
        converged: Asked after every step whether the present Ritz pairs will do.

    Returns:
        The decomposition, in the units of ``A``.

    Raises:
        ValueError: ``steps`` lies outside ``1..n``.
        Breakdown: ``start`` is zero, or a product is not finite.

    Cost:
        At most ``steps`` matvecs, ``O(n steps²)`` flops, ``n steps`` numbers;
        ``converged`` adds ``O(steps²)`` to every step.

    Source:
        Lanczos (1950); orthogonalised twice, as in Giraud et al. (2005).
    """
    check_vector(start)
    n = start.numel()
    if not 1 <= steps <= n:
        raise ValueError(f"steps = {steps} lies outside 1..{n}, the size of the operator")
    product = CountedMatvec(matvec)
    # What rounding leaves of a vanished residual; sqrt(n), since n eps is no small number in
    # float32 for a large network.
    tolerance = 10 * math.sqrt(n) * torch.finfo(start.dtype).eps
    basis = torch.empty(steps, n, dtype=start.dtype, device=start.device)
    basis[0] = unit(start)
    diagonal: list[float] = []
    offdiagonal: list[float] = []
    scale = growth = 0.0
    for k in range(1, steps + 1):
        known = basis[:k]
        residual = product(basis[k - 1])
        scale = max(scale, norm(residual))
        first = known @ residual
        residual = residual - known.T @ first
        second = known @ residual
        residual = residual - known.T @ second
        diagonal.append(float(first[-1].double() + second[-1].double()))
        beta = norm(residual)
        invariant = k == n or beta <= tolerance * scale
        if invariant or k == steps:
            break
        if converged is not None:
            whole = torch.tensor(diagonal, dtype=torch.float64)
            beside = torch.tensor(offdiagonal, dtype=torch.float64)
            if converged(_ritz(whole, beside, growth, beta, n)):
                break
        offdiagonal.append(beta)
        growth += math.log(beta)
        basis[k] = unit(residual)
    return Tridiagonal(
        diagonal=torch.tensor(diagonal, dtype=torch.float64),
        offdiagonal=torch.tensor(offdiagonal, dtype=torch.float64),
        basis=basis if k == steps else basis[:k].clone(),
        residual=residual,
        matvecs=product.count,
        invariant=invariant,
    )


def _ritz(diagonal: Tensor, offdiagonal: Tensor, growth: float, beta: float, size: int) -> Ritz:
    value, rotation = _eigh_tridiagonal(diagonal, offdiagonal)
    return Ritz(
        value=value,
        bound=beta * rotation[-1].abs(),
        weight=rotation[0].square(),
        growth=growth + math.log(beta) if beta > 0 else -math.inf,
        size=size,
    )


def _eigh_tridiagonal(diagonal: Tensor, offdiagonal: Tensor) -> tuple[Tensor, Tensor]:
    value, rotation = scipy.linalg.eigh_tridiagonal(diagonal.numpy(), offdiagonal.numpy())
    return torch.from_numpy(value), torch.from_numpy(rotation)
