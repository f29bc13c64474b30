"""How far a few random products stray: the factors that turn their spread into an interval."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import gammainc, gammaincc, gammaincinv, stdtrit

from hessdiag_probes.random import generator

DRAWS = 20_000
NUMBERS = 1_000_000


def student(probes: int, confidence: float) -> float:
    """The two-sided quantile of Student's t with ``probes - 1`` degrees of freedom."""
    return float(stdtrit(probes - 1, (1 + confidence) / 2))


def chi_square(probes: int, confidence: float) -> tuple[float, float]:
    """The factors that turn a root mean square of Gaussian samples into its interval."""
    tail = (1 - confidence) / 2
    low = 2 * float(gammaincinv(probes / 2, tail))
    high = 2 * float(gammaincinv(probes / 2, 1 - tail))
    return math.sqrt(probes / high), math.sqrt(probes / low)


@lru_cache(maxsize=64)
def quadratic_student(probes: int, confidence: float) -> float:
    """The two-sided quantile of ``|t|`` for samples ``vᵀA v``, ``v`` Gaussian, in the worst case.

    The samples are ``Σ λ_j χ²_1``, and one dominating eigenvalue makes them most skewed: they may
    all be small together, their spread with them. That case is therefore taken for every operator.
    Its ``S = Σ x_i ~ χ²_k`` is independent of the shape ``w² = Σ x_i² / S² - 1/k``, and
    ``t = √(k(k-1)) (1/k - 1/S) / w``, so given the shape the tails are values of a gamma function;
    they are averaged over drawn shapes, with three standard errors of the average on top.

    Args:
        probes: How many samples ``k``, at least 2.
        confidence: Above 0 and below 1.

    Returns:
        The quantile, not less than :func:`student`, to which it tends for many probes.

    Source:
        The independence is Lukacs (1955). That no other spectrum is worse was found by simulation,
        as tests/probes/test_tails.py does it; there is no proof.
    """
    seeded = generator(probes, "quadratic student")
    draws = min(DRAWS, NUMBERS // probes + 2)
    drawn = torch.randn(draws, probes, generator=seeded, dtype=torch.float64)
    samples: np.ndarray = drawn.square().numpy()
    samples /= samples.sum(axis=1, keepdims=True)
    width = samples.std(axis=1, ddof=1) / math.sqrt(probes)

    def excess(quantile: float) -> float:
        near, far = 1 / probes - quantile * width, 1 / probes + quantile * width
        right = np.where(near > 0, gammaincc(probes / 2, 0.5 / np.where(near > 0, near, 1)), 0)
        tail = gammainc(probes / 2, 0.5 / far) + right
        return float(tail.mean() + 3 * tail.std() / math.sqrt(draws)) - (1 - confidence)

    most = 2.0
    while excess(most) > 0:
        most *= 2
    return max(student(probes, confidence), float(brentq(excess, 0.0, most, rtol=1e-4)))
