"""The matrix of a block by structure: whether it pays, and whether it is the products' matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hessdiag.conditioning.spectrum import NOISE_FACTOR, zero_tolerance
from hessdiag.curvature.engines import BUILD, Recompute
from hessdiag.curvature.structured import NotStructured, Plan, make_plan, structured_matrix
from hessdiag.network import Network, Row
from hessdiag.solve.problem import ROW_FACTOR, Noise, noise_vector
from hessdiag_probes.exact import equilibrate
from hessdiag_probes.types import Matvec, Vector

ROUNDING = 30.0
"""ε of its norm that a matrix may depart from products by, whatever its size."""
WIDER = 2.0
"""Times as wide as those of products the intervals may become."""
POWER_STEPS = 2


@dataclass(frozen=True)
class Departure:
    """E, by which an assembled matrix differs from products, as far as certificates need it.

    The rounding of products is new in each of them; that of a matrix, and what its structure
    misses, is a matrix of its own: ``|E v|/|v|`` of a random v is but ``1/√n`` of the norm of one
    of rank one, and says nothing of a trace.

    Attributes:
        block: The largest of ``|E v|/|v|`` and ``|tr E|/√n``, as seen by random vectors and by
            power iteration from them.
        rows: The largest magnitude in each row of those products, (n,).
    """

    block: float
    rows: Vector

    def within(self, noise: Noise) -> Noise:
        """``noise`` of a block, where its matrix departs from products by E."""
        rows = torch.maximum(noise.rows, self.rows.to(noise.rows))
        return replace(noise, block=max(noise.block, self.block), rows=rows)


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
) -> tuple[Tensor, Departure]:
    """H of a block, verified, (n, n), float64, and what it departs from products by.

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
        ``plan.products`` passes over the dataset, and those of :func:`verify`.
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
    return matrix, verify(matrix, network, row, parameters, error)


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


def verify(
    matrix: Tensor,
    network: Network,
    row: Row,
    parameters: list[torch.nn.Parameter],
    error: Callable[[Vector], Vector],
) -> Departure:
    """What the matrix departs by from products, in its own scale and equilibrated.

    Args:
        matrix: Assembled by structure for these parameters, or cut from such a one, (n, n).
        network: On loan.
        row: Whose name fixes the random vectors.
        parameters: Of the block, (n,) values.
        error: ``v -> `` the error of a product by rounding.
    Raises:
        NotStructured: That is more than the certificates of products leave room for, or drowns
            rows that products resolve.
    Cost:
        Seven products and two measurements of noise.
    """
    like = torch.zeros(len(matrix), dtype=parameters[0].dtype, device=parameters[0].device)
    vectors = [
        noise_vector(like, seed=network.options.seed, name=row.name, index=index)
        for index in range(2)
    ]
    away, eps = difference(matrix, network, parameters), float(torch.finfo(like.dtype).eps)
    found, first, noise = _judge(matrix, away, error, vectors, eps)
    seen = (matrix @ vectors[0].to(matrix) - first).abs()
    norms = matrix.norm(dim=1)
    live, drowned = seen > ROW_FACTOR * noise, norms <= ROW_FACTOR * found.rows
    if bool((live & drowned).any()):
        raise NotStructured("rounding drowns rows that products resolve")
    alive = ~drowned & (norms > ROW_FACTOR * noise)
    if not bool(alive.any()):
        return found
    # Where rows differ in scale, a small one's part would pass for the rounding of large ones.
    balanced = equilibrate(matrix[alive][:, alive])

    def scaled(product: Matvec) -> Matvec:
        def inside(vector: Vector) -> Vector:
            whole = torch.zeros_like(like)
            whole[alive] = (balanced.scale * vector.to(matrix)).to(like)
            return balanced.scale * product(whole)[alive].to(matrix)

        return inside

    _judge(balanced.matrix, scaled(away), scaled(error), [vectors[0][alive]], eps)
    return found


def _departure(
    away: Callable[[Vector], Vector], vectors: list[Vector]
) -> tuple[Departure, list[Vector], Vector]:
    """Of E from ``v -> E v``; E times the vectors; and the last unit vector of the iteration."""
    size = len(vectors[0])
    made, seen = [away(vector) for vector in vectors], []
    for vector, wrong in zip(vectors, made, strict=True):
        square = float(vector.double().square().sum())
        trace = abs(float(vector.to(wrong) @ wrong)) / square * size
        seen += [float(wrong.norm()) / math.sqrt(square), trace / math.sqrt(size)]
    steps, unit = [max(made, key=lambda wrong: float(wrong.norm()))], torch.zeros_like(vectors[0])
    for _ in range(POWER_STEPS):
        length = float(steps[-1].norm())
        if not 0 < length < math.inf:
            break
        unit = (steps[-1] / length).to(vectors[0])
        steps.append(away(unit))
        seen.append(float(steps[-1].norm()))
    rows = torch.stack([*made, *steps[1:]]).abs().amax(dim=0)
    return Departure(max(seen), rows), made, unit


def _judge(
    matrix: Tensor,
    away: Callable[[Vector], Vector],
    error: Callable[[Vector], Vector],
    vectors: list[Vector],
    eps: float,
) -> tuple[Departure, Vector, Vector]:
    """The departure, E times the first vector, and a product's error there.

    Raises:
        NotStructured: Certificates that hold the departure are wider than those of products.
    """
    found, made, unit = _departure(away, vectors)
    vector, length = vectors[0], float(vectors[0].double().norm())
    noise = error(vector).abs().to(matrix)
    reached = float((matrix @ vector.to(matrix)).norm()) / length
    norm = max(float(matrix.norm(dim=1).max()), reached)

    def fits(noise: float) -> bool:
        usual = zero_tolerance(norm, len(matrix), eps, noise) / NOISE_FACTOR
        return found.block <= max(WIDER * usual, ROUNDING * eps * norm)

    # Rounding may have its direction, too, of which random vectors show little.
    if not (fits(float(noise.norm()) / length) or fits(float(error(unit).norm()))):
        raise NotStructured("its weights act in other ways, too")
    return found, made[0], noise
