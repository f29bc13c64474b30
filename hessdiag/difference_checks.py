"""Self-checks of products that are differences of gradients: there are no others to compare."""

from __future__ import annotations

from collections.abc import Sequence

from hessdiag.checks import Check
from hessdiag.curvature.engines import Difference
from hessdiag.errors import SelfCheckFailed
from hessdiag_probes.types import Vector

AGREEMENT_LIMIT = 0.1
"""Of a product: what its differences over several steps may disagree by at most."""
ROUGH = 1e-6
"""Above it a reader must know why: kinks on the way, or a narrower type."""


def check_symmetry(engine: Difference, pairs: Sequence[tuple[Vector, Vector]]) -> tuple[float, str]:
    """The largest ``|u·Dv - v·Du|`` beyond the products' own errors, relative, and a note."""
    worst, note = 0.0, ""
    for u, v in pairs:
        of_u, of_v = engine.differ(u), engine.differ(v)
        scale = float(of_v.value.norm() * u.norm() + of_u.value.norm() * v.norm())
        slack = float(of_v.error.norm() * u.norm() + of_u.error.norm() * v.norm())
        if scale <= 2 * slack:
            note = "the matrix is zero, or its products are drowned in their errors"
            continue
        apart = abs(float(u @ of_v.value - v @ of_u.value))
        worst = max(worst, max(apart - slack, 0.0) / scale)
    return worst, note


def check_agreement(engine: Difference, vector: Vector) -> Check:
    """Whether differences over several steps tell the same product: what it is certified to.

    Raises:
        SelfCheckFailed: They tell nothing of it.
    """
    found = engine.differ(vector)
    whole, wrong = float(found.value.norm()), float(found.error.norm())
    if whole <= wrong and found.truncation <= found.rounding:
        return Check(0.0, AGREEMENT_LIMIT, True, "the matrix is zero or rounding noise")
    value = wrong / whole if whole > 0 else float("inf")
    if not value <= AGREEMENT_LIMIT:
        raise SelfCheckFailed(
            f"differences of gradients over steps of {found.step / engine.length:.1e} and twice "
            f"that, relative to the parameters, disagree by {value:.1e} of the product (limit "
            f"{AGREEMENT_LIMIT:.0e}), and no shorter step does better: the gradient jumps there "
            "(many kinks near these weights, a quantised or narrow operation, a gradient that is "
            "no derivative?), so that --engine difference can tell nothing of the Hessian; use "
            "an engine that differentiates twice, or smooth activations"
        )
    return Check(value, AGREEMENT_LIMIT, True)


def notice(check: Check) -> str:
    """What every reader of the run must know."""
    told = (
        "products are differences of gradients (--engine difference): accurate to about "
        f"{check.value:.0e} of ‖H‖ here, which every interval holds; no number is claimed exact, "
        "and neurons' factors (theorem 3), which take a second derivative, are left out"
    )
    if check.value > ROUGH:
        told += (
            "; that is rough: the gradient has kinks within the step (ReLU), or passes through a "
            "narrower type"
        )
    return told
