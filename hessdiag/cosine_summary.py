"""What the cosines along a trajectory say, in a few numbers and warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGE = 0.1
"""Of a cosine, in the theory; maths.md 6.2 says what that is worth."""
FAR = 0.3
"""Of the quadratic model's residual: beyond it the cosines are not about the loss."""
COARSE = 1.5
"""Of the interval of a row norm, high over low: beyond it the spread of gamma is partly its."""


@dataclass(frozen=True)
class CosineSummary:
    """The cosines of all rows and iterates together; None where a number does not exist.

    Attributes:
        iterates: With at least one cosine.
        rows: With at least one cosine.
        fraction: Share of the cosines beyond 0.1 in absolute value.
        null_fraction: That of random directions in as many dimensions.
        median: Of the absolute cosines.
        null_median: That of random directions, 0.6745/√n.
        spread: Of gamma_i = gradient_rms_i / ‖h_i‖ over the live rows, 95 % over 5 % quantile:
            the factor to which the mean gradient recovers the norms of the rows.
        extreme_spread: The same, largest over smallest.
        slope: Of log gradient_rms over log ‖h_i‖, by least squares.
        correlation: Of these logarithms.
        silent: Live rows whose gradient is zero at every iterate; they are in no number above
            but the cosines.
        warnings: What a reader must know before believing the rest.
    """

    iterates: int
    rows: int
    fraction: float | None
    null_fraction: float
    median: float | None
    null_median: float
    spread: float | None
    extreme_spread: float | None
    slope: float | None
    correlation: float | None
    silent: int
    warnings: tuple[str, ...]


def summarise(cosines: Mapping[str, NDArray[Any]]) -> CosineSummary:
    """The summary of the arrays of ``/cosines``.

    Source:
        maths.md 6.2 and 6.3.
    """
    valid = cosines["valid"]
    size = valid.shape[1]
    absolute = np.abs(cosines["cosine"][valid])
    norm, mean = cosines["row_norm"], cosines["gradient_rms"]
    live = norm > 0
    heard = live & (mean > 0)
    slope, correlation = _fit(np.log(norm[heard]), np.log(mean[heard]))
    gamma = mean[heard] / norm[heard]
    low, high = np.quantile(gamma, [0.05, 0.95]) if gamma.size else (np.nan, np.nan)
    return CosineSummary(
        iterates=int(valid.any(axis=1).sum()),
        rows=int(valid.any(axis=0).sum()),
        fraction=float((absolute > LARGE).mean()) if absolute.size else None,
        null_fraction=_null_fraction(size),
        median=float(np.median(absolute)) if absolute.size else None,
        null_median=0.6745 / math.sqrt(size),
        spread=float(high / low) if gamma.size else None,
        extreme_spread=float(gamma.max() / gamma.min()) if gamma.size else None,
        slope=slope,
        correlation=correlation,
        silent=int((live & ~heard).sum()),
        warnings=tuple(_warnings(cosines)),
    )


def _null_fraction(size: int) -> float:
    """P(|cos| > 0.1) of a direction uniform on the sphere: cos² is Beta(1/2, (n - 1)/2)."""
    from scipy.stats import beta

    return float(beta.sf(LARGE**2, 0.5, (size - 1) / 2)) if size > 1 else 1.0


def _fit(across: NDArray[Any], up: NDArray[Any]) -> tuple[float | None, float | None]:
    """Slope and correlation, where both coordinates vary."""
    if across.size < 2 or np.ptp(across) == 0:
        return None, None
    across, up = across - across.mean(), up - up.mean()
    slope = float(across @ up / (across @ across))
    if np.ptp(up) == 0:
        return slope, None
    return slope, float(across @ up / math.sqrt((across @ across) * (up @ up)))


def _warnings(cosines: Mapping[str, NDArray[Any]]) -> list[str]:
    valid, distance = cosines["valid"], cosines["distance"]
    residual, norm = cosines["quadratic_residual"], cosines["row_norm"]
    if not valid.any():
        reason = "every row of the Hessian is zero" if not (norm > 0).any() else "all are p* itself"
        return [f"no iterate has a cosine: {reason}"]
    found = []
    lost = int((~np.isfinite(residual) & (distance > 0)).sum())
    if lost:
        found.append(
            f"at {lost} of {len(distance)} iterates the gradient is not finite or H (p_t - p*) is "
            "zero, so nothing says whether the quadratic model holds there"
        )
    far = residual > FAR
    if far.any():
        found.append(
            f"at {int(far.sum())} of {len(distance)} iterates the quadratic model misses the "
            f"change of the gradient by more than {FAR:g} of it (up to "
            f"{float(np.nanmax(residual)):.2g}): their cosines are not about the loss; give later "
            "--iterates, or a --reference that is nearer"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        width = np.median((cosines["row_norm_high"] / cosines["row_norm_low"])[norm > 0])
    if not width <= COARSE:
        known = f"to a factor of {width:.2g} only" if math.isfinite(width) else "from above only"
        found.append(
            f"the row norms themselves are known {known}, which is in the spread as well; more "
            "--probes narrow them"
        )
    return found
