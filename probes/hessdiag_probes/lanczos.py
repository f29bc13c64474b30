"""The symmetric Lanczos process with full reorthogonalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from hessdiag_probes.basis import AS_IT_IS, Basis, Storage
from hessdiag_probes.drift import Drift
from hessdiag_probes.polynomial import beyond, share
from hessdiag_probes.types import (
    CountedMatvec,
    Matvec,
    Vector,
    check_vector,
    looks,
    norm,
    not_finite,
    unit,
)


@dataclass(frozen=True, slots=True)
class Tilted:
    """A decomposition whose basis vectors were rounded: ``T``, ``‖r‖`` and what that moved."""

    diagonal: Tensor
    offdiagonal: Tensor
    beta: float
    drift: Drift

    def beyond(self, end: float, least: float, sign: float) -> float:
        """How far beyond ``end`` of ``sign T`` the spectrum of ``sign A`` may reach."""
        return self.drift.beyond(
            sign * self.diagonal.numpy(), self.offdiagonal.numpy(), self.beta, sign * end, least
        )


@dataclass(frozen=True, slots=True)
class Ritz:
    """Eigenvalues of ``T``, ascending, with what each is worth; float64 on the CPU, shape ``(k,)``.

    Some eigenvalue of ``A`` lies within ``bound`` of each ``value`` (up to the rounding of the
    products); it does not say which one. ``weight`` is the squared share of the start vector that
    the Ritz vector carries: nonnegative, of sum 1. ``size`` is that of ``A``, and ``growth`` the
    sum of the logarithms of the off-diagonals of ``T`` and of the residual's norm. ``reach`` is
    how far a value may lie outside the spectrum of ``A`` because the basis was rounded, and
    ``tilted`` what that does to the rest; 0 and None where it was not.
    """

    value: Tensor
    bound: Tensor
    weight: Tensor
    growth: float
    size: int
    reach: float = 0.0
    tilted: Tilted | None = None

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
            That share is rarely less than :func:`hessdiag_probes.polynomial.share`. Of a rounded
            basis by :meth:`hessdiag_probes.drift.Drift.beyond`.
        """
        if not 0 < failure < 1:
            raise ValueError(f"failure = {failure} lies outside (0, 1)")
        least = share(self.size, failure)
        value = self.value.tolist()
        if self.tilted is not None:
            below = self.tilted.beyond(value[0], least, -1.0)
            above = self.tilted.beyond(value[-1], least, 1.0)
            return value[0] - below, value[-1] + above
        target = self.growth - math.log(least)
        below = beyond([v - value[0] for v in value], target)
        above = beyond([value[-1] - v for v in value], target)
        return value[0] - below, value[-1] + above


@dataclass(frozen=True, slots=True)
class Tridiagonal:
    """``A Q = Q T + r e_kᵀ``, ``QᵀQ = I``: ``T`` by its diagonals, ``Q`` by rows.

    Attributes:
        diagonal: Of ``T``, shape ``(k,)``, float64 on the CPU.
        offdiagonal: Of ``T``, shape ``(k - 1,)``, positive, float64 on the CPU.
        space: ``Q`` in the storage that was asked for.
        residual: ``r``, shape ``(n,)``, orthogonal to the basis.
        matvecs: Products spent.
        invariant: The Krylov space is invariant to rounding, so the Ritz values are eigenvalues.
        drift: By how much the identity and ``QᵀQ = I`` are missed where the basis was rounded to
            fewer digits than its vectors have; None where it was not.
    """

    diagonal: Tensor
    offdiagonal: Tensor
    space: Basis
    residual: Tensor
    matvecs: int
    invariant: bool
    drift: Drift | None = None

    @property
    def basis(self) -> Tensor:
        """``Qᵀ``, shape ``(k, n)``, in the dtype and on the device of the start.

        Cost:
            Where ``space`` is stored otherwise, the memory that was to be saved.
        """
        return self.space.dense()

    def ritz(self) -> Ritz:
        """The Ritz values with their residual bounds ``|β_k s_k|`` and weights ``s_1²``."""
        growth = float(self.offdiagonal.log().sum())
        beta, size = norm(self.residual), self.residual.numel()
        return _ritz(self.diagonal, self.offdiagonal, growth, beta, size, self.drift)

    def vectors(self, indices: Sequence[int]) -> Tensor:
        """The Ritz vectors of the given Ritz values, as columns of shape ``(n, len(indices))``."""
        _, rotation = _eigh_tridiagonal(self.diagonal, self.offdiagonal)
        return self.space.combination(rotation[:, list(indices)].to(self.residual))


def lanczos(
    matvec: Matvec,
    start: Vector,
    steps: int,
    *,
    converged: Callable[[Ritz], bool] | None = None,
    storage: Storage = AS_IT_IS,
    every: int | None = None,
) -> Tridiagonal:
    """Tridiagonalise a symmetric operator on the Krylov space of ``start``.

    Args:
        matvec: ``v -> A v`` for a real symmetric ``A``.
        start: Any nonzero vector of shape ``(n,)``; it fixes ``n``, the dtype and the device.
        steps: Wanted depth, ``1 <= steps <= n``. The result is shallower, and
            exact, when the Krylov space is invariant first.
        converged: Asked at every look whether the present Ritz pairs will do.
        storage: How the basis is kept. In float32 the products are those of the rounded vectors,
            and the Ritz pairs' bounds and :meth:`Ritz.ends` hold what the rounding moved.
        every: Steps between two looks at the coefficients, each of which waits for a device to
            finish; None for 1 on the CPU and 5 on a device. Of a space that is invariant earlier,
            products are spent up to the next look, and all else is as if it had been looked at.

    Returns:
        The decomposition, in the units of ``A``.

    Raises:
        ValueError: ``steps`` lies outside ``1..n``.
        Breakdown: ``start`` is zero, or a product is not finite.

    Cost:
        At most ``steps`` matvecs, ``O(n steps²)`` flops, ``n steps`` numbers;
        ``converged`` adds ``O(steps²)`` to every look.

    Source:
        Lanczos (1950); orthogonalised twice, as in Giraud et al. (2005).
    """
    check_vector(start)
    n = start.numel()
    if not 1 <= steps <= n:
        raise ValueError(f"steps = {steps} lies outside 1..{n}, the size of the operator")
    run = _Run(CountedMatvec(matvec), start, steps, storage)
    often = looks(start, every)
    for k in range(1, steps + 1):
        run.step()
        last = k in (steps, n)
        if last or k % often == 0:
            ends = run.look() or last
            if ends or (converged is not None and converged(run.ritz())):
                break
        run.extend()
    return run.result()


class _Run:
    """The state of :func:`lanczos`; what a step finds stays on the device until the next look.

    Attributes:
        residual: Of the last step; ``None`` before the first.
        seen: Of every step that was looked at: whether its product is finite, the product's norm,
            α, β, and what of the coefficients is no part of ``T``.
        kept: Of every basis vector: by how much keeping it changed it, and ``QᵀQ - I``.
    """

    def __init__(self, product: CountedMatvec, start: Vector, steps: int, storage: Storage) -> None:
        self.product, self.n = product, start.numel()
        # What rounding leaves of a vanished residual; sqrt(n), since n eps is no small number in
        # float32 for a large network.
        self.tolerance = 10 * math.sqrt(self.n) * torch.finfo(start.dtype).eps
        self.space = Basis.empty(steps, start, storage)
        self.residual = start
        self.seen: list[list[float]] = []
        self.kept: list[list[float]] = []
        self.unseen: list[Tensor] = []
        self.unread: list[Tensor] = []
        self.invariant = False
        self._keep(unit(start))

    def step(self) -> None:
        """One product, orthogonalised."""
        space = self.space
        residual = self.product.unseen(space.vector(len(space) - 1))
        found = [torch.isfinite(residual).all().double(), _norm(residual)]
        first = space.coefficients(residual)
        residual = residual - space.combination(first)
        second = space.coefficients(residual)
        self.residual = residual - space.combination(second)
        alpha = first[-1].double() + second[-1].double()
        found += [alpha, _norm(self.residual)]
        if space.narrow:
            whole = first.double() + second.double()
            beside = whole[-2] if len(space) > 1 else torch.zeros_like(alpha)
            found += [whole[:-2].abs().sum(), beside]
        self.unseen.append(torch.stack(found))

    def extend(self) -> None:
        """Make the last residual the next basis vector."""
        self._keep(unit(self.residual))

    def look(self) -> bool:
        """Read what the steps since the last look found; whether the space is invariant.

        Raises:
            Breakdown: A product is not finite.
        """
        news = torch.stack(self.unseen).tolist()
        self.unseen = []
        if self.space.narrow:
            self.kept += torch.stack(self.unread).tolist()
            self.unread = []
        scale = max((row[1] for row in self.seen), default=0.0)
        for row in news:
            count = len(self.seen) + 1
            if not row[0]:
                raise not_finite(f"product {count}", self.residual.dtype)
            self.seen.append(row)
            scale = max(scale, row[1])
            self.invariant = count == self.n or row[3] <= self._least(scale)
            if self.invariant:
                self._back_to(count)
                break
        return self.invariant

    def ritz(self) -> Ritz:
        """Of the steps that were looked at."""
        diagonal, offdiagonal, drift = self._coefficients()
        growth = 0.0
        for beta in offdiagonal.tolist():
            growth += math.log(beta)
        return _ritz(diagonal, offdiagonal, growth, self.seen[-1][3], self.n, drift)

    def result(self) -> Tridiagonal:
        """The decomposition."""
        diagonal, offdiagonal, drift = self._coefficients()
        return Tridiagonal(
            diagonal=diagonal,
            offdiagonal=offdiagonal,
            space=self.space,
            residual=self.residual,
            matvecs=self.product.count,
            invariant=self.invariant,
            drift=drift,
        )

    def _keep(self, vector: Vector) -> None:
        """Append a unit vector to the basis, and measure what keeping it changed."""
        self.space.append(vector)
        if self.space.narrow:
            now = self.space.vector(len(self.space) - 1)
            gram = self.space.coefficients(now).double()
            gram[-1] -= 1.0
            self.unread.append(torch.stack([_norm(vector - now), gram[:-1].norm(), gram[-1].abs()]))

    def _least(self, scale: float) -> float:
        """The residual that says no more than what was lost before."""
        table = torch.tensor(self.seen, dtype=torch.float64) if self.space.narrow else None
        drift = None if table is None else self._drift(table, table[:-1, 3])
        lost = 0.0 if drift is None else float(drift.columns.max())
        return max(self.tolerance * scale, lost)

    def _back_to(self, count: int) -> None:
        """Undo the steps after the one numbered ``count``."""
        if count < len(self.space):
            self.residual = self.seen[-1][3] * self.space.vector(count)
            self.space.drop(count)

    def _coefficients(self) -> tuple[Tensor, Tensor, Drift | None]:
        table = torch.tensor(self.seen, dtype=torch.float64)
        diagonal, offdiagonal = table[:, 2].clone(), table[:-1, 3].clone()
        return diagonal, offdiagonal, self._drift(table, offdiagonal)

    def _drift(self, table: Tensor, offdiagonal: Tensor) -> Drift | None:
        """What rounding the basis moved, as measured."""
        if not self.space.narrow:
            return None
        kept = np.array(self.kept[: len(self.seen)])
        columns = table[:, 4].numpy().copy()
        columns[1:] += np.abs(table[1:, 5].numpy() - offdiagonal.numpy())
        columns *= 1.0 + kept[:, 2].max()  # they multiply basis vectors of almost norm 1
        columns[:-1] += offdiagonal.numpy() * kept[1:, 0]
        overlap = math.sqrt(float((2 * kept[:, 1] ** 2 + kept[:, 2] ** 2).sum()))
        return Drift(columns, float(kept[0, 0]), overlap)


def _norm(vector: Vector) -> Tensor:
    """The 2-norm in float64, left on the device."""
    size: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return size


def _ritz(
    diagonal: Tensor,
    offdiagonal: Tensor,
    growth: float,
    beta: float,
    size: int,
    drift: Drift | None,
) -> Ritz:
    value, rotation = _eigh_tridiagonal(diagonal, offdiagonal)
    tilted, bound, reach = None, beta * rotation[-1].abs(), 0.0
    if drift is not None:
        tilted, reach = Tilted(diagonal, offdiagonal, beta, drift), drift.reach
        bound = torch.from_numpy(drift.residuals(beta, rotation.numpy()))
    return Ritz(
        value=value,
        bound=bound,
        weight=rotation[0].square(),
        growth=growth + math.log(beta) if beta > 0 else -math.inf,
        size=size,
        reach=reach,
        tilted=tilted,
    )


def _eigh_tridiagonal(diagonal: Tensor, offdiagonal: Tensor) -> tuple[Tensor, Tensor]:
    value, rotation = scipy.linalg.eigh_tridiagonal(diagonal.numpy(), offdiagonal.numpy())
    return torch.from_numpy(value), torch.from_numpy(rotation)
