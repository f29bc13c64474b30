"""The cosines along a trajectory, in sentences."""

from __future__ import annotations

from hessdiag.cosine_summary import CosineSummary, summarise
from hessdiag.run import Run


def cosine_sentences(run: Run) -> list[str]:
    """What the cosines of a run say, each a line without its end; empty without iterates."""
    if not run.cosines:
        return []
    found = summarise(run.cosines)
    return [*_angles(found), *_gradients(found), *found.warnings]


def _angles(found: CosineSummary) -> list[str]:
    if found.fraction is None or found.median is None:
        return []
    many = f"{found.iterates} iterate{'s' * (found.iterates != 1)}"
    return [
        f"{_percent(found.fraction)} of the cosines of {found.rows} Hessian rows to p_t - p* at "
        f"{many} exceed 0.1 (random directions: {_percent(found.null_fraction)}); median "
        f"{found.median:.2g} (random: {found.null_median:.2g})"
    ]


def _gradients(found: CosineSummary) -> list[str]:
    if found.spread is None:
        return []
    text = (
        f"mean |g| recovers the row norms to a factor of {found.spread:.3g} (q95/q05; largest "
        f"over smallest {found.extreme_spread:.2g})"
    )
    if found.slope is not None and found.correlation is not None:
        text += f": log-log slope {found.slope:.2f}, correlation {found.correlation:.2f}"
    if found.silent:
        text += f"; {found.silent} rows without any gradient are left out"
    return [text]


def _percent(share: float) -> str:
    if 0 < share < 1e-4:
        return "< 0.01 %"
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.3g} %"
