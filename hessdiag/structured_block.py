"""The matrix of a block by structure: whether it pays, and whether it is the products' matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessdiag.curvature.engines import BUILD, Recompute
from hessdiag.curvature.structured import NotStructured, Plan, make_plan, structured_matrix
from hessdiag.network import Network, Row
from hessdiag.solve.problem import ROW_FACTOR, noise_vector
from hessdiag_probes.types import Matvec, Vector

ROUNDING = 1e4
"""ε, relative, that two routes to a product may differ by besides the noise as measured."""


def structure(network: Network, parameters: list[torch.nn.Parameter]) -> Plan | None:
    """How a block would be assembled by structure; None where products take no longer.

    ``plan.products`` passes then stand in for a product per column. An engine that the user asked
    for by name makes all products there are.

    Cost:
        At most a forward pass over the dataset.
    """
    if network.options.engine != "auto" or network.relief.recompute:
        return None
    plan = make_plan(network.objective, parameters)
    return plan if plan.worthwhile else None


def assemble_by_structure(
    network: Network,
    row: Row,
    parameters: list[torch.nn.Parameter],
    plan: Plan,
    *,
    product: Callable[[], Matvec],
    error: Callable[[Vector], Vector],
) -> Tensor:
    """H of a block, verified, (n, n), float64.

    Args:
        network: On loan.
        row: Whose progress is told.
        parameters: Of the block.
        plan: Of :func:`structure`.
        product: Makes the engine, which is asked for the columns that have no structure.
        error: ``v -> `` the error of its product by rounding.
    Raises:
        NotStructured: It is not the matrix of the products; the message says why.
        OutOfTime: ``--max-seconds`` are over.
    Cost:
        ``plan.products`` passes over the dataset, and five products to verify.
    """
    like = torch.zeros(plan.size, dtype=parameters[0].dtype, device=parameters[0].device)
    batches = sum(1 for _ in network.objective.own())
    total = plan.directions * batches + len(plan.others)
    counted = network.watched(lambda v: v, row.name, row.step, total)
    alone = network.objective.group.size == 1
    tick = network.timed(counted) if alone else counted
    matrix = structured_matrix(
        network.objective, plan, network.options.curvature, step=lambda: _ignore(tick(like))
    )
    if len(plan.others):
        engine = product()
        columns = network.timed(lambda v: counted(engine(v)))
        for place in plan.others.tolist():
            unit = torch.zeros_like(like)
            unit[place] = 1.0
            matrix[place] = columns(unit).to(matrix)
        others = matrix[plan.others]
        between = others[:, plan.others]
        others[:, plan.others] = (between + between.T) / 2
        matrix[plan.others] = others
        matrix[:, plan.others] = others.T
    _verify(matrix, network, row, parameters, error)
    return matrix


def _ignore(_: Vector) -> None:
    return None


def difference(
    matrix: Tensor, network: Network, parameters: list[torch.nn.Parameter]
) -> Callable[[Vector], Vector]:
    """``v -> A v - H v``, of the assembled matrix and by a product: what rounding makes of both.

    Cost:
        One recomputed product per call.
    """
    product = Recompute(network.objective, parameters, BUILD[network.options.curvature])

    def apart(vector: Vector) -> Vector:
        return matrix @ vector.to(matrix) - product(vector).to(matrix)

    return apart


def _verify(
    matrix: Tensor,
    network: Network,
    row: Row,
    parameters: list[torch.nn.Parameter],
    error: Callable[[Vector], Vector],
) -> None:
    """That a random product is the same, and every row that it shows stands out from rounding."""
    like = torch.zeros(len(matrix), dtype=parameters[0].dtype, device=parameters[0].device)
    vector = noise_vector(like, seed=network.options.seed, name=row.name, index=0)
    apart = difference(matrix, network, parameters)(vector)
    wrong, seen = apart.abs(), (matrix @ vector.to(matrix) - apart).abs()
    noise = error(vector).abs().to(matrix)
    eps = torch.finfo(like.dtype).eps
    allowed = ROUNDING * eps * float(seen.norm()) + ROW_FACTOR * float(noise.norm())
    if not float(wrong.norm()) <= allowed:
        raise NotStructured("its weights act in other ways, too")
    live, drowned = seen > ROW_FACTOR * noise, matrix.norm(dim=1) <= ROW_FACTOR * wrong
    if bool((live & drowned).any()):
        raise NotStructured("rounding drowns rows that products resolve")
