"""Trace, diagonal, row norms and Frobenius norm from one set of random probes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hessdiag_probes.basis import Basis
from hessdiag_probes.lanczos import Tridiagonal
from hessdiag_probes.random import gaussian, rademacher
from hessdiag_probes.tails import chi_square, quadratic_student, student
from hessdiag_probes.types import CountedMatvec, Matvec, norm

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
        trace: Unbiased. For Gaussian probes the interval holds at least as often as it says,
            whatever the spectrum, since it allows for one eigenvalue that dominates; see
            :func:`hessdiag_probes.tails.quadratic_student`. For signs no error bar can promise
            that: few of them may all give one wrong number.
        diagonal: Unbiased; t-intervals, exact for Gaussian probes. A small entry beside large
            off-diagonal ones is poor.
        row_norm: ``‖a_i‖₂`` with the chi-square interval, asymmetric: exact for Gaussian
            probes, and in practice conservative for Rademacher ones, which vary less.
        frobenius: ``‖A‖_F`` with the same chi-square interval: exact for Gaussian probes and an
            operator of rank one, conservative for any other at a confidence of 0.9 or more (a
            mean of chi-squares spreads less than one of them), so wide where many eigenvalues
            share the norm.
        confidence: Of every interval, each by itself, up to the rounding of the products.
        matvecs: Products spent here, those of a deflating run not counted.
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
    deflate: Tridiagonal | None = None,
    stop: Callable[[], bool] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Moments:
    """Estimate the moments of a symmetric operator.

    With a Lanczos run on the same operator, ``A Q`` is known exactly from its recurrence, whether
    or not a Ritz pair has converged, and only ``A P``, ``P = I - QQᵀ``, is left to chance:
    ``‖a_i‖² = ‖(A Q)_i‖² + ‖(A P)_i‖²``, ``a_ii = Σ_j (A Q)_ij Q_ij + (A P)_ii`` and
    ``tr A = tr T + tr P A P``. The intervals of the remainder keep what they promise, and shrink
    with it. An invariant run need not leave nothing: of a repeated eigenvalue it holds one copy.

    Args:
        matvec: ``v -> A v`` for a real symmetric ``A``.
        n: The size of the operator.
        probes: How many, at least 2.
        generator: On the CPU, as :func:`hessdiag_probes.generator` makes it.
        distribution: "gaussian" (intervals that hold) or "rademacher" (less variance).
        confidence: Of each interval, at least 0.5 and below 1.
        deflate: A run whose start is independent of the probes.
        stop: Asked after every probe from the second on whether those done must do.
        dtype: Of the probes; sums are kept in float64.
        device: Of the probes.

    Returns:
        The estimates, in the units of ``A``.

    Raises:
        ValueError: An argument lies outside its range, or the run does not fit the rest.
        Breakdown: A product is not finite.

    Cost:
        At most ``probes`` matvecs, ``O(n)`` numbers; with a run of ``k`` steps ``O(n k)`` flops
        more for each, and no product. Variance of the trace: ``2 ‖P A P‖_F² / probes`` (Gaussian),
        ``2 (‖A‖_F² - Σ a_ii²) / probes`` (Rademacher).

    Source:
        Hutchinson (1989); Bekas, Kokiopoulou and Saad (2007) for the diagonal; for the Frobenius
        norm, Roosta-Khorasani and Székely (2015) on convolutions of gamma variables; deflation
        from the basis alone as in Meyer, Musco, Musco and Woodruff (2021), its product being known.
    """
    if n < 1:
        raise ValueError(f"n = {n}, but an operator acts on at least one number")
    if probes < 2:
        raise ValueError(f"probes = {probes}; an error bar takes at least 2")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence = {confidence} lies outside [0.5, 1)")
    if distribution not in {"gaussian", "rademacher"}:
        raise ValueError(f"distribution = {distribution!r}; choose 'gaussian' or 'rademacher'")
    if deflate is not None:
        _check_run(deflate, n, distribution, dtype)
    draw = gaussian if distribution == "gaussian" else rademacher
    product = CountedMatvec(matvec)
    diagonal = torch.zeros(n, dtype=torch.float64, device=device)
    weight, misfit, squares = (torch.zeros_like(diagonal) for _ in range(3))
    # In one place: small tensors that stay between large ones that go would split the heap.
    traces = torch.zeros(probes, dtype=torch.float64, device=device)
    done = 0
    while done < probes and not (done >= 2 and stop is not None and stop()):
        probe = draw(n, generator=generator, dtype=dtype, device=device)
        rest = probe if deflate is None else _without(deflate.space, probe)
        image = product(rest).double()
        probe = probe.double()
        # Entry i of A P v is (A P)_ii v_i plus a noise that does not depend on v_i: a regression
        # through the origin, updated without the cancellation of a difference of sums.
        surprise = image - diagonal * probe
        before = weight.clone()
        weight += probe.square()
        diagonal += surprise * probe / weight
        misfit += surprise.square() * (before / weight)
        squares += image.square()
        traces[done] = (rest.double() * image).sum()
        done += 1

    product.look()
    values = traces[:done].cpu()
    known = _known(deflate, diagonal)
    trace, trace_error = float(values.mean()) + known.trace, float(values.std()) / math.sqrt(done)
    reach = quadratic_student(done, confidence) * trace_error + known.trace_slack
    diagonal = diagonal + known.diagonal
    error = (misfit / ((done - 1) * weight)).sqrt()
    width = student(done, confidence) * error + known.slack
    norms = _root(squares / done, known.squares, done, confidence, known.slack)
    total = _root(
        (squares.sum() / done)[None],
        known.squares.sum()[None],
        done,
        confidence,
        known.slack.square().sum().sqrt(),
    )
    return Moments(
        trace=Estimate(trace, trace_error, trace - reach, trace + reach),
        diagonal=Estimates(diagonal, error, diagonal - width, diagonal + width),
        row_norm=norms,
        frobenius=Estimate(
            float(total.value), float(total.stderr), float(total.low), float(total.high)
        ),
        confidence=confidence,
        matvecs=product.count,
    )


@dataclass(frozen=True, slots=True)
class _Known:
    """What a run says of ``A Q``, and how far rounding may have moved it."""

    trace: float
    trace_slack: float
    diagonal: Tensor
    squares: Tensor
    slack: Tensor


def _known(run: Tridiagonal | None, like: Tensor) -> _Known:
    """The part of the moments that needs no chance, from ``A Q = Q T + r e_kᵀ`` by columns."""
    diagonal, squares, share = (torch.zeros_like(like) for _ in range(3))
    if run is None:
        return _Known(0.0, 0.0, diagonal, squares, share)
    alphas, betas = run.diagonal.tolist(), run.offdiagonal.tolist()
    steps = len(alphas)
    before, scale = torch.zeros_like(like), 0.0
    for j, alpha in enumerate(alphas):
        vector = run.space.vector(j).double()
        last = j + 1 == steps
        after = run.residual.double() if last else betas[j] * run.space.vector(j + 1).double()
        image = before + alpha * vector + after
        diagonal += image * vector
        squares += image.square()
        share += vector.square()
        scale = max(scale, norm(image))
        if not last:
            before = betas[j] * vector
    # Of vectors that were rounded when they were kept this is far above what was measured.
    eps = 10 * math.sqrt(steps) * run.space.eps
    if run.drift is not None and scale > 0:
        eps = max(eps, run.drift.overlap, float(run.drift.columns.sum()) / scale)
    return _Known(
        trace=math.fsum(alphas),
        trace_slack=eps * math.sqrt(steps) * scale,
        diagonal=diagonal,
        squares=squares,
        slack=eps * (scale * share.sqrt() + squares.sqrt()),
    )


def _root(
    square: Tensor, known: Tensor, probes: int, confidence: float, slack: Tensor
) -> Estimates:
    """``√(known + x)`` for the mean ``square`` of Gaussian samples of variance ``x``."""
    few, many = chi_square(probes, confidence)
    value = (known + square).sqrt()
    positive = torch.where(value > 0, value, torch.ones_like(value))
    return Estimates(
        value=value,
        stderr=square / positive / math.sqrt(2 * probes),
        low=((known + square * few**2).sqrt() - slack).clamp(min=0),
        high=(known + square * many**2).sqrt() + slack,
    )


def _without(space: Basis, probe: Tensor) -> Tensor:
    """The part of a probe outside the basis; twice, so that it is so to rounding."""
    for _ in range(2):
        probe = probe - space.combination(space.coefficients(probe))
    return probe


def _check_run(run: Tridiagonal, n: int, distribution: str, dtype: torch.dtype) -> None:
    if distribution != "gaussian":
        raise ValueError(
            f"deflate = a run with distribution = {distribution!r}; the intervals of a remainder "
            f"rest on Gaussian probes, so choose 'gaussian', or deflate nothing"
        )
    size, kind = run.residual.numel(), run.residual.dtype
    if size != n:
        raise ValueError(
            f"the run acts on {size} numbers, the operator on {n}; "
            f"deflate with a run on the same operator"
        )
    if kind != dtype:
        raise ValueError(
            f"the run is in {kind}, the probes in {dtype}; draw them in that of the run"
        )
