"""How much the two halves of the data differ in their largest eigenvalue."""

from __future__ import annotations

from hessdiag.microbatches import cut
from hessdiag.opened import Opened
from hessdiag.quantity import Quantity
from hessdiag.solve import Solved
from hessdiag.variants.scene import Built
from hessdiag_probes.lanczos import Ritz, lanczos
from hessdiag_probes.random import generator, sphere
from hessdiag_probes.types import Matvec

HALF_STEPS = 20
SETTLED = 1e-4
"""Relative residual of the largest Ritz value at which more steps would not change the ratio."""


def half_ratio(opened: Opened, solved: Solved, built: Built | None = None) -> Quantity:
    """λ_max on one half of the drawn examples over that on the other, by Lanczos."""
    network = opened.network
    if not network.halves:
        return Quantity.absent()
    kappa = solved.values["kappa"]
    if isinstance(kappa, Quantity) and kappa.status == "zero":
        return Quantity.zero()  # the halves hold rounding noise
    decay = network.options.weight_decay
    # What of the decay is inside the products, and what is added to their eigenvalues.
    inside = decay if built is not None and not built.decoupled else 0.0
    tops = []
    rows = network.relief.rows
    for whole in network.halves:
        half = whole if rows is None else cut(whole, rows)
        product: Matvec = network.engine(half, opened.parameters, products=HALF_STEPS)
        if built is not None:
            product = opened.view(built.coordinates, inside)(product)
        start = sphere(
            opened.block.size,
            generator=generator(network.options.seed, opened.block.name, "half ratio"),
            dtype=opened.parameters[0].dtype,
            device=opened.parameters[0].device,
        )
        run = lanczos(
            product,
            start,
            min(HALF_STEPS, opened.block.size),
            converged=lambda ritz: _settled(ritz) or network.late(),
            storage=network.budget(opened.block).elsewhere,
        )
        tops.append(float(run.ritz().value[-1]) + decay - inside)
    if min(tops) <= 0 or network.late():
        return Quantity.unresolved()
    return Quantity.estimate(tops[0] / tops[1])


def _settled(ritz: Ritz) -> bool:
    top = float(ritz.value[-1])
    return top > 0 and float(ritz.bound[-1]) <= SETTLED * top
