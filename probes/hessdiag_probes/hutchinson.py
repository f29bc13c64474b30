"""Trace, diagonal, row norms and Frobenius norm from one set of random probes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.special import gammaincinv, stdtrit
from torch import Tensor

from hessdiag_probes.random import gaussian, rademacher
from hessdiag_probes.types import CountedMatvec, Matvec

Distribution = Literal["gaussian", "rademacher"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A random number and what it is worth: ``[low, high]`` holds the truth at ``confidence``."""

    value: float
    stderr: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimates:
    """One estimate per row; shape ``(n,)`` each, float64. The intervals hold one at a time."""

    value: Tensor
    stderr: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of a symmetric operator, all from the same probes.

    Attributes:
        trace: Unbiased; t-interval over the probes. It undercovers for an operator of low rank
            (nominal 95 % is about 85 % at 10 probes): deflate its large eigenvalues first.
        diagonal: Unbiased; t-intervals, exact for Gaussian probes. A small entry beside large
            off-diagonal ones is poor.
        row_norm: ``‖a_i‖₂`` with the chi-square interval, asymmetric: exact for Gaussian
            probes, and in practice conservative for Rademacher ones, which vary less.
        frobenius: ``‖A‖_F`` with the same chi-square interval: exact for Gaussian probes and an
            operator of rank one, conservative for any other at a confidence of 0.9 or more (a
            mean of chi-squares spreads less than one of them), so wide where many eigenvalues
            share the norm.
        confidence: Of every interval, each by itself.
        matvecs: Products spent.
    """

    trace: Estimate
    diagonal: Estimates
    row_norm: Estimates
    frobenius: Estimate
    confidence: float
    matvecs: int


def hutchinson(
    matvec: Matvec,
    n: int,
    probes: int,
    *,
    generator: torch.Generator,
    distribution: Distribution = "gaussian",
    confidence: float = 0.95,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Moments:
    """Estimate the moments of a symmetric operator.

    Args:
        matvec: ``v -> A v`` for a real symmetric ``A``.
        n: The size of the operator.
        probes: How many, at least 2.
        generator: On the CPU, as :func:`hessdiag_probes.generator` makes it.
        distribution: "gaussian" (exact row-norm intervals) or "rademacher" (less variance).
        confidence: Of each interval, at least 0.5 and below 1.
        dtype: Of the probes; sums are kept in float64.
        device: Of the probes.

    Returns:
        The estimates, in the units of ``A``.

    Raises:
        ValueError: An argument lies outside its range.
        Breakdown: A product is not finite.

    Cost:
        ``probes`` matvecs, ``O(n)`` numbers. Variance of the trace: ``2 ‖A‖_F² / probes``
        (Gaussian), ``2 (‖A‖_F² - Σ a_ii²) / probes`` (Rademacher).

    Source:
        Hutchinson (1989); Bekas, Kokiopoulou and Saad (2007) for the diagonal; for the Frobenius
        norm, Roosta-Khorasani and Székely (2015) on convolutions of gamma variables.
    """
    if n < 1:
        raise ValueError(f"n = {n}, but an operator acts on at least one number")
    if probes < 2:
        raise ValueError(f"probes = {probes}; an error bar takes at least 2")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence = {confidence} lies outside [0.5, 1)")
    if distribution not in {"gaussian", "rademacher"}:
        raise ValueError(f"distribution = {distribution!r}; choose 'gaussian' or 'rademacher'")
    draw = gaussian if distribution == "gaussian" else rademacher
    product = CountedMatvec(matvec)
    diagonal = torch.zeros(n, dtype=torch.float64, device=device)
    weight, misfit, squares = (torch.zeros_like(diagonal) for _ in range(3))
    traces = []
    for _ in range(probes):
        probe = draw(n, generator=generator, dtype=dtype, device=device)
        image = product(probe).double()
        probe = probe.double()
        # Entry i of A v is a_ii v_i plus a noise that does not depend on v_i: a regression through
        # the origin, updated without the cancellation of a difference of sums.
        surprise = image - diagonal * probe
        before = weight.clone()
        weight += probe.square()
        diagonal += surprise * probe / weight
        misfit += surprise.square() * (before / weight)
        squares += image.square()
        traces.append(float((probe * image).sum()))

    error = (misfit / ((probes - 1) * weight)).sqrt()
    student = float(stdtrit(probes - 1, (1 + confidence) / 2))
    values = torch.tensor(traces, dtype=torch.float64)
    trace = float(values.mean())
    trace_error = float(values.std()) / math.sqrt(probes)
    few, many = _chi_square(probes, confidence)
    norms = (squares / probes).sqrt()
    total = math.sqrt(float(squares.sum()) / probes)
    return Moments(
        trace=Estimate(
            trace, trace_error, trace - student * trace_error, trace + student * trace_error
        ),
        diagonal=Estimates(diagonal, error, diagonal - student * error, diagonal + student * error),
        row_norm=Estimates(norms, norms / math.sqrt(2 * probes), norms * few, norms * many),
        frobenius=Estimate(total, total / math.sqrt(2 * probes), total * few, total * many),
        confidence=confidence,
        matvecs=product.count,
    )


def _chi_square(probes: int, confidence: float) -> tuple[float, float]:
    """The factors that turn a root mean square of Gaussian samples into its interval."""
    tail = (1 - confidence) / 2
    low = 2 * float(gammaincinv(probes / 2, tail))
    high = 2 * float(gammaincinv(probes / 2, 1 - tail))
    return math.sqrt(probes / high), math.sqrt(probes / low)
