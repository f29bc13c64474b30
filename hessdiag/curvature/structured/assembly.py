"""The matrix of a block from offsets at its layers' outputs, and matrix multiplications."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hessdiag.curvature.objective import Objective
from hessdiag.curvature.structured.graph import BatchGraph, Direction, NotStructured, offsets
from hessdiag.curvature.structured.sites import Plan, Site
from hessdiag.errors import TaskError
from hessdiag.options import Curvature
from hessdiag_probes.random import gaussian, generator, rademacher

NUMBERS = 2**21
"""Of a factor of a matrix product: some samples at a time, and some of their features."""
SAMPLES = 256
"""At a time, summed by themselves: equal terms drift in a long sum, some hundred ε in 4096. Each
time the matrix is read and written once."""
SLAB = 1024
AGREES = 1e-8  # relative, of two ways to a derivative in float64
AGREES_NARROW = 1e-4


def structured_matrix(
    objective: Objective, plan: Plan, curvature: Curvature, *, step: Callable[[], None]
) -> Tensor:
    """The entries of H, or of Gauss–Newton's matrix, between the weights of the plan's sites.

    Args:
        objective: Model on loan, loss and batches.
        plan: Of the block, with one site or more.
        curvature: Whose matrix.
        step: Called after every direction of every batch; may raise what is no RuntimeError.
    Returns:
        Exactly symmetric, (n, n), float64; the rows and columns of ``plan.others`` are 0.
    Raises:
        NotStructured: Samples interact, a batch uses its layers in another way, or its graph
            cannot be differentiated by offsets, or not in the memory there is.
    Cost:
        ``plan.directions`` backward passes over the dataset; about ``N T n²`` flops of matrix
        multiplication over N samples of T positions, a quarter of that for one layer with T = 1;
        two matrices.
    Source:
        maths 4.1. A weight of neuron i moves its pre-activation by ĥ, so a column is
        ``Σ_j ĥ_j ∂g_j/∂a_ij``, g_j the gradient of one sample, and an offset of the neuron gives
        ``∂g_j/∂a_ij`` of all samples at once, for these do not interact.
    """
    order = _Order(plan)

    def part() -> Tensor:
        total = torch.zeros(order.size, order.size, dtype=torch.float64, device=plan.others.device)
        squares = [_Square(site, total.device) for site in plan.sites]
        for batch, share in objective.own():
            _add_batch(objective, batch, share, plan, curvature, total, squares, order, step)
        for square, (start, stop) in zip(squares, order.spans, strict=True):
            square.write(total[start:stop, start:stop])
        _mirror(total)
        return total.reshape(-1)

    try:
        total = objective.summed(part).view(order.size, order.size)
    except NotStructured:
        raise
    except (TaskError, RuntimeError, MemoryError) as error:  # on every rank, if on one
        raise NotStructured(" ".join(str(error).split())) from error
    return _in_place(total, order.index, plan.size)


class _Order:
    """Places in the sites' own order: site after site, neuron after neuron, its bias last."""

    def __init__(self, plan: Plan) -> None:
        ends = [0]
        for site in plan.sites:
            ends.append(ends[-1] + site.index.numel())
        self.spans = list(pairwise(ends))
        self.size = ends[-1]
        self.index = torch.cat([site.index.reshape(-1) for site in plan.sites])


def _add_batch(
    objective: Objective,
    batch: Any,
    share: float,
    plan: Plan,
    curvature: Curvature,
    total: Tensor,
    squares: list[_Square],
    order: _Order,
    step: Callable[[], None],
) -> None:
    with offsets(plan.sites) as made:
        graph = BatchGraph(objective, batch, plan.sites, curvature, made)
        if not graph.curved:
            return
        for place, site in enumerate(plan.sites):
            _check_samples(graph, place)
            positions = graph.inputs[place].shape[1]
            alone = positions == 1
            between = []
            for neuron in range(site.outputs):
                for position in range(positions):
                    # Anew each time: a derivative may be a view of its direction.
                    seed = torch.zeros_like(made.added[place])
                    site.outward(seed, graph.samples)[:, position, neuron] = 1.0
                    found = graph.direction(place, seed)
                    if alone:
                        between.append(_outward(graph, place, found.bent[place]))
                    first = place + 1 if alone else place
                    given = share * graph.inputs[place][:, position].double()
                    column = order.spans[place][0] + neuron * site.features
                    for other in range(first, len(plan.sites)):
                        least = neuron if other == place else 0
                        start = order.spans[other][0] + least * plan.sites[other].features
                        into = total[start : order.spans[other][1], column:]
                        _add_columns(graph, other, least, found, given, into[:, : site.features])
                    step()
            if alone:
                squares[place].add(between, graph.inputs[place][:, 0].double(), share)


def _add_columns(
    graph: BatchGraph, place: int, least: int, found: Direction, given: Tensor, into: Tensor
) -> None:
    """Add ``Σ_j ∂g_j/∂a given_jᵀ`` of the neurons from ``least`` on of one site."""
    bent, moved = found.bent[place], found.moved[place]
    slopes = graph.slopes[place]
    if bent is None and (moved is None or slopes is None):
        return
    site, rows = graph.sites[place], graph.inputs[place]
    ways: list[tuple[Tensor, Tensor]] = []
    if bent is not None:
        ways.append((site.outward(bent.contiguous(), graph.samples)[..., least:], rows))
    if moved is not None and slopes is not None:
        ways.append((slopes[..., least:], site.rows(moved, graph.samples, last=0.0)))
    for some in _parts(graph.samples, len(into)):
        terms = [_per_sample(left[some], right[some]) for left, right in ways]
        changed = terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
        into.add_(changed.flatten(1).T @ given[some])


def _per_sample(left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ right`` of every sample, (samples, neurons, features)."""
    left, right = left.double(), right.double()
    if left.shape[1] == 1:
        return left[:, 0, :, None] * right[:, 0, None, :]
    return left.mT @ right


class _Square:
    """One layer by itself, with one position a sample: ``Σ_j S_j ⊗ ĥ_j ĥ_jᵀ``.

    S_j and ĥ_j ĥ_jᵀ are symmetric, so a quarter of the entries is all; they are one matrix
    multiplication, neurons' pairs by features' pairs.
    """

    def __init__(self, site: Site, device: torch.device) -> None:
        self.site = site
        self.pairs = torch.tril_indices(site.outputs, site.outputs, device=device)
        self.slabs: dict[int, Tensor] = {}
        self.height = max(1, min(site.features, NUMBERS // (SAMPLES * site.features) + 1, 16))

    def add(self, between: list[Tensor], rows: Tensor, share: float) -> None:
        """Add a batch: S by columns, (samples, outputs) each, and ĥ, (samples, features)."""
        features = self.site.features
        for some in _parts(len(rows), self.height * features):
            given = rows[some]
            curved = torch.stack([column[some] for column in between], dim=1).double()
            # A pair (p, i) of neurons is column p of direction i.
            paired = (share * curved[:, self.pairs[1], self.pairs[0]]).T.contiguous()
            for start in range(0, features, self.height):
                some_rows = given[:, start : start + self.height]
                products = (some_rows[:, :, None] * given[:, None, start:]).flatten(1)
                added = paired @ products  # addmm would go on with the sum that there is
                if start in self.slabs:
                    self.slabs[start].add_(added)
                else:
                    self.slabs[start] = added

    def write(self, into: Tensor) -> None:
        """Write the lower triangle of the layer's matrix."""
        outputs, features = self.site.outputs, self.site.features
        blocks = into.unflatten(1, (outputs, features)).unflatten(0, (outputs, features))
        blocks = blocks.permute(0, 2, 1, 3)
        for start, slab in self.slabs.items():
            found = slab.view(len(slab), -1, features - start)
            stop = start + found.shape[1]
            blocks[self.pairs[0], self.pairs[1], start:stop, start:] = found
            blocks[self.pairs[0], self.pairs[1], start:, start:stop] = found.mT
        self.slabs.clear()


def _check_samples(graph: BatchGraph, place: int) -> None:
    """That no sample's derivatives depend on another's offset, on one random direction."""
    if graph.samples == 1:
        return
    seed = graph.made.added[place].detach()
    made = generator(0, "interaction of samples")
    numbers = seed.numel() // graph.samples
    weight = gaussian(numbers, generator=made, dtype=seed.dtype, device=seed.device)
    sign = rademacher(graph.samples, generator=made, dtype=seed.dtype, device=seed.device)
    flat = weight.expand(graph.samples, -1)
    together = graph.direction(place, flat.reshape(seed.shape))
    apart = graph.direction(place, (flat * sign[:, None]).reshape(seed.shape))
    agreement = AGREES if seed.dtype == torch.float64 else AGREES_NARROW
    for both, signed in zip(together.bent + together.moved, apart.bent + apart.moved, strict=True):
        if both is None or signed is None:
            continue
        turned = signed.reshape(graph.samples, -1) * sign[:, None]
        wrong = float((both.reshape(graph.samples, -1) - turned).norm())
        if wrong > agreement * float(both.norm() + signed.norm()):
            raise NotStructured("the loss of a sample depends on other samples")


def _outward(graph: BatchGraph, place: int, bent: Tensor | None) -> Tensor:
    """Of a site with one position, (samples, outputs)."""
    if bent is None:
        return torch.zeros_like(graph.made.added[place]).view(graph.samples, -1)
    return graph.sites[place].outward(bent.contiguous(), graph.samples)[:, 0]


def _parts(samples: int, width: int) -> Iterator[slice]:
    """Samples of which so many numbers each fit."""
    size = max(1, min(SAMPLES, NUMBERS // max(width, 1)))
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))


def _mirror(matrix: Tensor) -> None:
    """Copy the lower triangle to the upper one."""
    for start in range(0, len(matrix), SLAB):
        stop = start + SLAB
        square = matrix[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).T)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T


def _in_place(total: Tensor, index: Tensor, size: int) -> Tensor:
    """The matrix in the order of the block."""
    matrix = total.new_zeros(size, size)
    for start in range(0, len(total), SLAB):
        rows = total[start : start + SLAB]
        placed = rows.new_zeros(len(rows), size)
        placed[:, index] = rows
        matrix[index[start : start + SLAB]] = placed
    return matrix
