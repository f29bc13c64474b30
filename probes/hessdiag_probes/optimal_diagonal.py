"""The diagonal ``D`` of the least condition number of ``D A D``, and how low any could go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from hessdiag_probes.exact import EPS
from hessdiag_probes.scaling import unit_diagonal, unit_spectrum

Array = NDArray[np.float64]

POWERS = tuple(4.0**k for k in range(2, 8))
ITERATIONS = 40  # per power
GOAL = 1.001  # the gap at which a better diagonal is not worth the search
REACH = 60.0  # no step leaves scales e^(±REACH/2) of the start


@dataclass(frozen=True, slots=True)
class OptimalDiagonal:
    """The best diagonal found, and a bound that no diagonal can beat.

    Attributes:
        scale: The diagonal of ``D``, shape ``(n,)``, float64 on the CPU, positive.
        kappa: The condition number of ``D A D``, rounded up: it is at most that.
        bound: Every diagonal leaves at least this condition number, rounding and the errors of
            the entries included.
    """

    scale: Tensor
    kappa: float
    bound: float

    @property
    def gap(self) -> float:
        """By which factor another diagonal could still be better, at most."""
        return max(self.kappa / self.bound, 1.0)


def optimal_diagonal(
    matrix: Tensor,
    starts: Sequence[Tensor] = (),
    *,
    entry_error: float = 0.0,
    goal: float = GOAL,
) -> OptimalDiagonal | None:
    """Minimise the condition number of ``D A D`` over diagonal ``D``, with a certificate.

    Args:
        matrix: Symmetric, shape ``(n, n)``, ``n`` a few hundred.
        starts: Further scales to start from, shape ``(n,)`` each, positive; the unit diagonal is
            always one, and the best of them is taken.
        entry_error: A bound of ``|δa_ij| / sqrt(a_ii a_jj)``, the errors of the given entries.
        goal: Ends once the gap is no more than this.

    Returns:
        The best diagonal seen, or None where the matrix is not certainly positive definite.

    Raises:
        ValueError: The matrix is not square.
        Breakdown: The matrix is not finite.

    Cost:
        Up to some 300 dense eigenproblems.

    Source:
        maths 5.3. ``log κ`` is quasi-convex in the logarithms of ``D²``, so that what is locally
        best is best; it is smoothed by p-norms, ``(1/p) (log Σ lᵢᵖ + log Σ lᵢ⁻ᵖ)``, p = 16 … 4⁷,
        each by L-BFGS from where the last one ended. The bound is the dual of the semidefinite
        program of Qu, Gao, Hinder, Ye and Zhou (2025).
    """
    if unit_spectrum(matrix, entry_error) is None:
        return None
    given = matrix.detach().to("cpu", torch.float64)
    root = given.diagonal().sqrt()
    search = _Search(unit_diagonal(given).numpy(), entry_error)
    origin = np.zeros(len(given))
    points = [origin, *(2 * (start.to(root) * root).log().numpy() for start in starts)]
    points = [point - point.mean() for point in points]
    x = points[int(np.argmin([search.visit(point) for point in points]))]
    for power in POWERS:
        if search.gap <= goal or len(x) == 1:
            break
        x = _descend(search, x, power, goal)
    scale = torch.from_numpy(np.exp(search.best_x / 2)) / root
    return OptimalDiagonal(scale, search.kappa, min(search.bound, search.kappa))


def _descend(search: _Search, x: Array, power: float, goal: float) -> Array:
    def objective(point: Array) -> tuple[float, Array]:
        return search.smoothed(point, power)

    def step(point: Array) -> None:
        search.visit(point, power)
        if search.gap <= goal:
            raise StopIteration

    found = minimize(
        objective,
        x,
        jac=True,
        method="L-BFGS-B",
        bounds=[(value - REACH, value + REACH) for value in x],
        callback=step,
        options={"maxiter": ITERATIONS, "ftol": 0.0, "gtol": 1e-12},
    )
    result: Array = found.x - found.x.mean()
    return result


@dataclass
class _Search:
    """``B = D J D`` along a search over ``x = log D²``, and the best of what it has seen."""

    unit: Array
    entry_error: float
    kappa: float = np.inf
    bound: float = 1.0
    best_x: Array = field(default_factory=lambda: np.zeros(0))
    _last: tuple[Array, Array, Array, Array] | None = None

    @property
    def gap(self) -> float:
        return self.kappa / self.bound

    def visit(self, x: Array, power: float = POWERS[-1]) -> float:
        """Take this point and its bound where they are the best; κ there, rounded up."""
        scaled, value, vector = self._solve(x)
        slack = 4 * max(len(x), 10) * EPS * value[-1] + self.entry_error * np.trace(scaled)
        low = float(value[0] - slack)
        kappa = float(value[-1] + slack) / low if low > 0 else np.inf
        if kappa < self.kappa or not self.best_x.size:
            self.kappa, self.best_x = kappa, x.copy()
        high, low_weight = _weights(value, power)
        self.bound = max(self.bound, dual_bound(scaled, vector, high, low_weight, self.entry_error))
        return kappa

    def smoothed(self, x: Array, power: float) -> tuple[float, Array]:
        """The smoothed ``log κ`` and its gradient by x."""
        _, value, vector = self._solve(x)
        logs = np.log(np.maximum(value, EPS * value[-1]))
        high, low = _weights(value, power)
        top = logs[-1] + np.log(np.exp(power * (logs - logs[-1])).sum()) / power
        bottom = logs[0] - np.log(np.exp(-power * (logs - logs[0])).sum()) / power
        slope: Array = np.square(vector) @ (high - low)
        return float(top - bottom), slope

    def _solve(self, x: Array) -> tuple[Array, Array, Array]:
        if self._last is None or not np.array_equal(self._last[0], x):
            d = np.exp(x / 2)
            scaled = self.unit * d[:, None] * d
            value, vector = scipy.linalg.eigh(scaled, driver="evd", check_finite=False)
            self._last = (x.copy(), scaled, value, vector)
        return self._last[1:]


def _weights(value: Array, power: float) -> tuple[Array, Array]:
    """``lᵖ`` and ``l⁻ᵖ``, each of sum 1: most at the top, and most at the bottom."""
    logs = np.log(np.maximum(value, EPS * value[-1]))
    high, low = np.exp(power * (logs - logs[-1])), np.exp(-power * (logs - logs[0]))
    return high / high.sum(), low / low.sum()


def dual_bound(matrix: Array, vector: Array, high: Array, low: Array, entry_error: float) -> float:
    """A condition number that no ``D A D`` falls below.

    For ``X, Y`` positive semidefinite with equal diagonals, and ``E = D⁻²`` such that
    ``l E ≤ A ≤ κ l E``: ``⟨Y, A⟩ ≤ κ l ⟨Y, E⟩ = κ l ⟨X, E⟩ ≤ κ ⟨X, A⟩``. Here
    ``X = V diag(low) Vᵀ`` and ``Y = S V diag(high) Vᵀ S + T``, with diagonal ``S`` no more than 1
    and ``T`` no less than 0 such that the diagonals agree, or one of the two is diagonal; the best
    of these pairs counts. Whatever ``V`` is, these are
    semidefinite, so that its own errors do not matter; sums are rounded to the safe side.

    Args:
        matrix: ``A``, positive definite, shape ``(n, n)``, each entry right to a few roundings.
        vector: ``V``, by columns: near the eigenvectors of ``A``.
        high: Nonnegative, shape ``(n,)``: most where the eigenvalues of ``A`` are largest.
        low: Nonnegative, shape ``(n,)``: most where they are smallest.
        entry_error: A bound of ``|δa_ij| / sqrt(a_ii a_jj)``, the errors of the given entries.

    Returns:
        The bound, at least 1.

    Cost:
        Six products of dense matrices.
    """
    n = len(matrix)
    rounding = (n + 20) * EPS
    root = np.sqrt(matrix.diagonal())

    def inner(weight: Array, scale: Array) -> tuple[float, float]:
        scaled = vector * scale[:, None]
        form = (scaled * weight) @ scaled.T
        largest = (np.abs(scaled) * weight) @ np.abs(scaled).T
        error = 2 * rounding * float((largest * np.abs(matrix)).sum())
        error += entry_error * float(root @ (np.abs(form) + rounding * largest) @ root)
        return float((form * matrix).sum()), error

    squares = np.square(vector)
    upper, lower = squares @ high, squares @ low
    target = lower * (1 - 4 * rounding)
    shrink = np.sqrt(np.minimum(1.0, target / np.where(upper > 0, upper, 1.0)))
    rest = np.maximum(target - shrink**2 * upper * (1 + 4 * rounding), 0.0)
    top, top_error = inner(high, shrink)
    bottom, bottom_error = inner(low, np.ones(n))
    most, most_error = inner(high, np.ones(n))
    diagonal = matrix.diagonal()
    sure = 1 - rounding - entry_error
    above = max(
        top - top_error + sure * float(rest @ diagonal),
        sure * float(target @ diagonal),  # Y diagonal
    )
    reached = max(
        above / (bottom + bottom_error),
        sure**2 * (most - most_error) / float(upper @ diagonal),  # X diagonal, Y = V diag(high) Vᵀ
    )
    return max(float(reached) * (1 - 4 * EPS), 1.0)
