"""All eigenvalues of a block: the zero tolerance, the signs, and how well each is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ZERO_FACTOR = 10.0  # τ = 10 max(n, 10) ε ‖H‖
NOISE_FACTOR = 100.0  # τ ≥ 100 ν
ROUNDING_SHARE = 0.2  # computed eigenvalues are right to this share of τ
AMBIGUOUS_ABOVE = 10.0
AMBIGUOUS_BELOW = 0.1


def zero_tolerance(norm: float, size: int, eps: float, noise: float) -> float:
    """τ: below it an eigenvalue cannot be told from zero (maths 1.1)."""
    return max(ZERO_FACTOR * max(size, 10) * eps * norm, NOISE_FACTOR * noise)


@dataclass(frozen=True)
class Inertia:
    """Signs of the eigenvalues, counted on the equilibrated matrix (Sylvester's law).

    ``*_low`` and ``*_high`` are the least and the most that the counts may be; they differ from
    the count only where it is ``ambiguous``. ``margin_above`` and ``margin_below`` are the nearest
    magnitudes above and below the tolerance, in units of it; None where there is none.
    """

    positive: int
    negative: int
    positive_low: int
    positive_high: int
    negative_low: int
    negative_high: int
    margin_above: float | None
    margin_below: float | None
    ambiguous: bool


def count_inertia(equilibrated: Array, tolerance: float, *, narrow: bool = False) -> Inertia:
    """The inertia of the equilibrated matrix's eigenvalues at ``tolerance``.

    Args:
        equilibrated: Eigenvalues, (n,).
        tolerance: τ of the equilibrated matrix.
        narrow: The products have a narrower type's precision. Then τ is so large that ordinary
            eigenvalues lie far below it, and any there makes the count ambiguous.
    """
    size = np.abs(equilibrated)
    above = size[size > tolerance]
    below = size[size <= tolerance]
    margin_above = float(above.min() / tolerance) if above.size and tolerance > 0 else None
    margin_below = float(below.max() / tolerance) if below.size and tolerance > 0 else None
    unclear = 0.0 if narrow else AMBIGUOUS_BELOW
    ambiguous = (margin_above is not None and margin_above < AMBIGUOUS_ABOVE) or (
        margin_below is not None and margin_below > unclear
    )
    sure, maybe = tolerance, tolerance
    if ambiguous:
        # Below a narrow type's tolerance not even the sign is known.
        sure, maybe = AMBIGUOUS_ABOVE * tolerance, -tolerance if narrow else unclear * tolerance
    return Inertia(
        positive=int((equilibrated > tolerance).sum()),
        negative=int((equilibrated < -tolerance).sum()),
        positive_low=int((equilibrated > sure).sum()),
        positive_high=int((equilibrated > maybe).sum()),
        negative_low=int((equilibrated < -sure).sum()),
        negative_high=int((equilibrated < -maybe).sum()),
        margin_above=margin_above,
        margin_below=margin_below,
        ambiguous=ambiguous,
    )


@dataclass(frozen=True)
class ExactSpectrum:
    """All eigenvalues of a block, and how well each is known.

    Attributes:
        value: Ascending, (n,).
        error: Bound on the error of each, (n,): a share of τ, or relative for a positive definite
            block that was certified.
        tolerance: τ; 0 for a certified positive definite block, which has no zero eigenvalue.
        inertia: From the equilibrated matrix.
        diagonal: Of the matrix, (n,).
        frobenius: Frobenius norm.
        noise: ν of the block.
    """

    value: Array
    error: Array
    tolerance: float
    inertia: Inertia
    diagonal: Array
    frobenius: float
    noise: float

    @property
    def resolved(self) -> bool:
        """Whether the eigenvalues beyond ±τ are exactly those that the inertia counts."""
        positive = int((self.value > self.tolerance).sum())
        negative = int((self.value < -self.tolerance).sum())
        counted = (self.inertia.positive, self.inertia.negative)
        return not self.inertia.ambiguous and (positive, negative) == counted

    @property
    def top(self) -> tuple[float, float]:
        """The largest eigenvalue and the bound on its error."""
        return float(self.value[-1]), float(self.error[-1])

    @property
    def norm(self) -> float:
        """‖H‖ = max |l_i|."""
        return float(np.abs(self.value).max(initial=0.0))

    @property
    def norm_error(self) -> float:
        """Bound on the error of ``norm``."""
        return float(self.error[np.argmax(np.abs(self.value))]) if self.value.size else 0.0
