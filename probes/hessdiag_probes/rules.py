"""Gauss and Gauss–Radau quadrature rules from one Lanczos run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag_probes.lanczos import Tridiagonal
from hessdiag_probes.types import norm

Array = NDArray[np.float64]
FAR = 10.0


@dataclass(frozen=True, slots=True)
class Rule:
    """``e_1ᵀ f(A) e_1 ≈ Σ weight f(node)``, ``e_1`` the unit start; float64 on the CPU, ``(k,)``.

    Nodes ascend, weights are nonnegative and sum to 1.
    """

    node: Tensor
    weight: Tensor

    def integral(self, function: Callable[[Tensor], Tensor]) -> float:
        """``Σ weight f(node)``; times ``|start|²`` it stands for ``startᵀ f(A) start``."""
        return float(self.weight @ function(self.node))


@dataclass(frozen=True, slots=True)
class Recurrence:
    """What a Lanczos run leaves when its basis is thrown away: the moments of its measure.

    Attributes:
        diagonal: α_1 to α_k.
        offdiagonal: β_1 to β_k: one more than in ``T``, the last is the residual's norm.
        gauss: Nodes and weights of the rule with ``k`` free nodes, exact to degree ``2k - 1``.
        invariant: The Krylov space is invariant to rounding, so that the Gauss rule is the measure.
    """

    diagonal: Array
    offdiagonal: Array
    gauss: tuple[Array, Array]
    invariant: bool

    @classmethod
    def of(cls, run: Tridiagonal) -> Recurrence:
        """That of a run.

        Raises:
            ValueError: The basis of the run was rounded, and no rule is known to hold then.
        """
        if run.drift is not None:
            raise ValueError(
                "the run's basis was rounded, and what a quadrature rule of it is off is not "
                "known; keep that of this run in the dtype of its vectors"
            )
        last = torch.tensor([norm(run.residual)], dtype=torch.float64)
        diagonal = run.diagonal.numpy()
        offdiagonal = torch.cat([run.offdiagonal, last]).numpy()
        return cls(diagonal, offdiagonal, _rule(diagonal, offdiagonal[:-1]), run.invariant)

    def radau(self, node: float) -> tuple[Array, Array]:
        """Nodes and weights of the rule with ``k`` free nodes and one at ``node``.

        Raises:
            ZeroDivisionError: ``node`` is a Ritz value, to rounding.
        """
        _, pivot = self._pivots(node)
        beta = float(self.offdiagonal[-1])
        corner = node + beta * (beta / pivot)
        return _rule(np.append(self.diagonal, corner), self.offdiagonal)

    def pinned(self, node: float) -> tuple[Array, Array]:
        """The best rule with a node at ``node`` that rounding allows; Gauss's when invariant.

        That of :meth:`radau`, or where ``node`` is so close to a Ritz value that the last node
        would lie far outside, the rule of one step less. By the Chebyshev–Markov–Stieltjes
        inequalities the measure of either side of ``node`` is at least the rule's weight strictly
        on it and at most that with the weight at ``node`` itself.
        """
        if self.invariant:
            return self.gauss
        before, pivot = self._pivots(node)
        scale = max(float(np.abs(self.diagonal).max()), float(self.offdiagonal.max()), abs(node))
        long = _shift(float(self.offdiagonal[-1]), pivot)
        if abs(long) <= FAR * scale:
            return _rule(np.append(self.diagonal, node + long), self.offdiagonal)
        if self.diagonal.size == 1:
            return np.array([node]), np.array([1.0])
        short = _shift(float(self.offdiagonal[-2]), before)
        if abs(short) < abs(long):
            return _rule(np.append(self.diagonal[:-1], node + short), self.offdiagonal[:-1])
        return _rule(np.append(self.diagonal, node + long), self.offdiagonal)

    def _pivots(self, node: float) -> tuple[float, float]:
        """The last two pivots of ``T - node I = L D Lᵀ``."""
        before = pivot = math.inf
        beta = 0.0
        for alpha, following in zip(self.diagonal.tolist(), self.offdiagonal.tolist(), strict=True):
            before, pivot = pivot, alpha - node - _shift(beta, pivot)
            beta = following
        return before, pivot


def gauss(run: Tridiagonal) -> Rule:
    """The Gauss rule of a run: nodes are its Ritz values.

    Where every even derivative of ``f`` is positive on the spectrum, it is a lower bound of
    ``e_1ᵀ f(A) e_1``, and exact when the run is invariant.

    Source:
        Golub and Meurant (1994).
    """
    return _as_rule(Recurrence.of(run).gauss)


def gauss_radau(run: Tridiagonal, node: float) -> Rule:
    """The Gauss–Radau rule of a run with a prescribed node; Gauss's when the run is invariant.

    Where every odd derivative of ``f`` is negative on the spectrum, a node at or left of the
    smallest eigenvalue makes it an upper bound of ``e_1ᵀ f(A) e_1``.

    Args:
        run: Of ``k`` steps, from any start; its residual is used too.
        node: At or outside an end of the spectrum for a one-sided bound.

    Returns:
        The rule with ``k + 1`` nodes, exact to degree ``2k``.

    Raises:
        ValueError: ``node`` is not finite, or is a Ritz value of the run.

    Cost:
        ``O(k³)``, no matvec.

    Source:
        Golub and Meurant (1994): ``(T - node I) δ = β_k² e_k``, last entry ``node + δ_k``.
    """
    if not math.isfinite(node):
        raise ValueError(f"node = {node}; prescribe a finite one, at or outside the spectrum's end")
    moments = Recurrence.of(run)
    if moments.invariant:
        return _as_rule(moments.gauss)
    try:
        rule = moments.radau(node)
    except ZeroDivisionError as error:
        raise ValueError(
            f"node = {node} is a Ritz value of the run; prescribe one outside its Ritz values"
        ) from error
    return _as_rule(rule)


def _shift(beta: float, pivot: float) -> float:
    """``β² / pivot``, without its overflow; infinite at a pivot of zero."""
    return beta * (beta / pivot) if pivot else math.inf


def _rule(diagonal: Array, offdiagonal: Array) -> tuple[Array, Array]:
    # stevd: its eigenvectors are orthogonal to rounding also in clusters.
    node, rotation = scipy.linalg.eigh_tridiagonal(
        diagonal, offdiagonal, lapack_driver="stevd", check_finite=False
    )
    return node, np.square(rotation[0])


def _as_rule(rule: tuple[Array, Array]) -> Rule:
    return Rule(torch.from_numpy(rule[0]), torch.from_numpy(rule[1]))
