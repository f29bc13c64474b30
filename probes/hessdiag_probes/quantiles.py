"""Single eigenvalues from a stochastic quadrature: by rank, by quantile, next to a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hessdiag_probes.counts import least_count, most_count, share_below
from hessdiag_probes.quadrature import Quadrature

TOLERANCE = 1e-4
WIDENINGS = 12
POPULATIONS = 8


@dataclass(frozen=True, slots=True)
class Span:
    """An eigenvalue lies in ``[low, high]`` at the confidence asked for; infinite where unknown."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Quantile:
    """An eigenvalue at a quantile, with its two errors apart.

    Attributes:
        value: The likeliest.
        span: Both errors together, at the confidence asked for.
        probe: The error of the probes alone, as if the runs resolved their measures.
        resolution: The error of the resolution alone, as if the probes were all vectors.
    """

    value: float
    span: Span
    probe: Span
    resolution: Span


def ranked(quadrature: Quadrature, rank: int, *, confidence: float = 0.95) -> Span:
    """The eigenvalue of a rank, the largest being 1.

    The count above a threshold falls with it, so that bounds at one threshold are bounds at all:
    the interval holds at the confidence of a single count.

    Raises:
        ValueError: ``rank`` lies outside ``1..n``.

    Cost:
        Some 50 brackets of the quadrature, no matvec.
    """
    n, probes, tail = quadrature.n, len(quadrature.runs), (1 - confidence) / 2
    if not 1 <= rank <= n:
        raise ValueError(f"rank = {rank} lies outside 1..{n}, the size of the operator")

    def surely_above(threshold: float) -> bool:
        return least_count(quadrature.bracket(threshold)[0], n, probes, tail) >= rank

    def maybe_above(threshold: float) -> bool:
        return most_count(quadrature.bracket(threshold)[1], n, probes, tail) >= rank

    left, right = _ends(quadrature)
    low, _ = _change(surely_above, left, right, quadrature.rounding)
    _, high = _change(maybe_above, left, right, quadrature.rounding)
    return Span(low, high)


def quantile(
    quadrature: Quadrature,
    fraction: float,
    *,
    base: float = -math.inf,
    least: int | None = None,
    slack: float = 0.0,
    confidence: float = 0.95,
) -> Quantile:
    """``l_(k)``, ``k = ⌈fraction p⌉``, where ``p`` counts the eigenvalues above ``base``.

    The share above a threshold among the share above ``base`` is a Beta variable too, with ``p``
    in place of ``n``: neither the noise of ``p`` nor that of what lies below enters, and all that
    is needed of ``p`` is how small it might be.

    Args:
        quadrature: Of the operator.
        fraction: In ``(0, 1)``.
        base: Eigenvalues above it are those that are counted.
        least: A lower bound of ``p``, at least 1; ``n`` when ``base`` is infinite.
        slack: The products may have moved the eigenvalues by so much.
        confidence: Of the result, given that ``least`` holds.

    Returns:
        The eigenvalue; an end of a span is ``base`` where nothing above it is proven, and infinite
        where the runs do not bound it.

    Raises:
        ValueError: ``fraction`` lies outside (0, 1), or ``least`` is missing or too small.

    Cost:
        Some 150 brackets of the quadrature, no matvec.
    """
    n, probes, tail = quadrature.n, len(quadrature.runs), (1 - confidence) / 2
    if not 0 < fraction < 1:
        raise ValueError(f"fraction = {fraction} lies outside (0, 1)")
    if least is None and math.isinf(base):
        least = n
    if least is None or not 1 <= least <= n:
        raise ValueError(f"least = {least}; say how many eigenvalues exceed base, 1..{n}")
    base_low, base_high = quadrature.bracket(base + slack)[0], quadrature.bracket(base - slack)[1]
    base_share = max(min(max(quadrature.estimate(base), base_low), base_high), quadrature.floor)
    # The law narrows as p grows, at any level that matters; a few p more than the least anyway.
    populations = {least * (n / least) ** (i / POPULATIONS) for i in range(POPULATIONS + 1)}

    def low(threshold: float) -> float:
        return quadrature.bracket(threshold)[0] / base_high if base_high > 0 else 0.0

    def high(threshold: float) -> float:
        share = quadrature.bracket(threshold)[1]
        return min(share / base_low, 1.0) if base_low > 0 else 1.0

    def middle(threshold: float) -> float:
        least, most = quadrature.bracket(threshold)
        share = min(max(quadrature.estimate(threshold), least), most)
        return min(share / base_share, 1.0)

    def surely_above(share: float) -> bool:
        worst = max(share_below(1 - share, (1 - fraction) * p, p, probes) for p in populations)
        return worst <= tail

    def maybe_above(share: float) -> bool:
        return max(share_below(share, fraction * p, p, probes) for p in populations) > tail

    left, right = _ends(quadrature)
    left = max(left, base)

    def span(
        below: Callable[[float], float],
        above: Callable[[float], float],
        surely: Callable[[float], bool],
        maybe: Callable[[float], bool],
    ) -> Span:
        start, _ = _change(lambda t: surely(below(t)), left, right, quadrature.rounding, base)
        _, end = _change(lambda t: maybe(above(t)), left, right, quadrature.rounding, base)
        return Span(max(start - slack, base), end + slack)

    def passed(share: float) -> bool:
        return share >= fraction

    resolution = span(low, high, passed, passed)
    value, _ = _change(lambda t: passed(middle(t)), left, right, quadrature.rounding, base)
    return Quantile(
        value=value,
        span=span(low, high, surely_above, maybe_above),
        probe=span(middle, middle, surely_above, maybe_above),
        resolution=resolution,
    )


def next_above(
    quadrature: Quadrature,
    threshold: float,
    *,
    upto: float | None = None,
    slack: float = 0.0,
    confidence: float = 0.95,
) -> Span:
    """The smallest eigenvalue above a threshold; with ``upto``, above one in ``[threshold, upto]``.

    The upper end is certain: what the measure holds up to it is the share of some eigenvector.
    The lower end holds at ``confidence``: one eigenvalue in between would have had a larger share
    in the probes. It is ``threshold`` where the runs do not resolve the gap, and the upper end
    infinite where they prove no eigenvalue. The products may have moved the eigenvalues by
    ``slack``.

    Cost:
        Some 30 brackets of the quadrature, no matvec.
    """
    n, probes, tail = quadrature.n, len(quadrature.runs), 1 - confidence
    most = quadrature.bracket(threshold - slack)[1]
    sure = quadrature.bracket((threshold if upto is None else upto) + slack)[0]

    def empty(right: float) -> bool:
        share = max(most - quadrature.bracket(right)[0], 0.0)
        return most_count(share, n, probes, tail) == 0

    def nothing_proven(right: float) -> bool:
        return sure - quadrature.bracket(right)[1] <= 0

    _, right = _ends(quadrature)
    right = max(right, threshold + quadrature.rounding)
    low, _ = _change(empty, threshold, right, quadrature.rounding, threshold)
    if sure <= 0:
        return Span(max(low - slack, threshold), math.inf)
    before, proven = _change(nothing_proven, threshold, right, quadrature.rounding, threshold)
    # A share may be too small for the count and yet be proven: what is certain wins.
    return Span(max(min(low, before) - slack, threshold), proven + slack)


def _ends(quadrature: Quadrature) -> tuple[float, float]:
    node = quadrature.rule.node
    return float(node[0]), float(node[-1])


def _change(
    holds: Callable[[float], bool],
    left: float,
    right: float,
    rounding: float,
    base: float = -math.inf,
) -> tuple[float, float]:
    """Neighbours ``a < b`` where ``holds`` changes from true to false.

    Both are ``base`` where it is false from there on, and ``b`` is infinite where it never is.
    """
    step = max(right - left, rounding)
    if step <= 0:
        step = max(abs(left), 1.0)
    low, high = left, right
    for _ in range(WIDENINGS):
        if holds(low):
            break
        if low <= base:
            return base, base
        low, high = max(low - step, base), low
        step *= 4
    else:
        return base, base
    step = max(right - left, rounding, abs(right) * TOLERANCE)
    high = max(high, low)
    for _ in range(WIDENINGS):
        if not holds(high):
            break
        low, high = high, high + step
        step *= 4
    else:
        return low, math.inf
    while high - low > max(TOLERANCE * max(abs(low), abs(high)), rounding):
        middle = math.sqrt(low) * math.sqrt(high) if low > 0 else (low + high) / 2
        if not low < middle < high:
            break
        if holds(middle):
            low = middle
        else:
            high = middle
    return low, high
