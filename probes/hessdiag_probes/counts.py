"""How many of ``n`` eigenvalues lie in a set, from the share of random vectors in their span."""

from __future__ import annotations

from scipy.special import betainc


def most_count(share: float, n: int, probes: int, tail: float) -> int:
    """The largest count that a share this small leaves possible.

    The share of ``probes`` Gaussian vectors in the span of ``k`` orthonormal ones, in their
    summed square norms, follows the Beta(probes k/2, probes (n - k)/2) law exactly: a quotient of
    independent chi-squares. So no variance is estimated, and the bound holds for one eigenvalue
    of a million as for half of them.

    Args:
        share: The measured share, or an upper bound of it.
        n: The dimension.
        probes: How many vectors were pooled.
        tail: The probability with which the bound may fail.

    Returns:
        The largest ``k`` with ``P_k(R <= share) > tail``; the true count exceeds it with
        probability at most ``tail``.

    Source:
        Clopper and Pearson (1934) for the inversion.
    """
    low, high = 0, n
    while low < high:
        k = (low + high + 1) // 2
        if share_below(share, k, n, probes) > tail:
            low = k
        else:
            high = k - 1
    return low


def least_count(share: float, n: int, probes: int, tail: float) -> int:
    """The smallest count that a share this large leaves possible; see :func:`most_count`."""
    return n - most_count(1 - share, n, probes, tail)


def share_below(share: float, count: float, n: float, probes: int) -> float:
    """``P(R <= share)`` for ``count`` of ``n`` eigenvalues, which need not be whole numbers."""
    if share >= 1 or count <= 0:
        return 1.0
    if share <= 0 or count >= n:
        return 0.0
    return float(betainc(probes * count / 2, probes * (n - count) / 2, share))
