"""One analysis over several processes that never meet: which of them computes which blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hessdiag.activations import Layer
from hessdiag.blocks import WHOLE, Block
from hessdiag.options import Options, exact_limit
from hessdiag.shard import parse_shard
from hessdiag.solve.budget import DENSITY_STEPS, Budget
from hessdiag.variants.grammar import RAW, parse_variant

DENSE_FLOPS = 25
"""Of one row of an assembled block, over n³: two eigenproblems, one with vectors."""
PRODUCT_FLOPS = 12
"""Of one product, over examples × parameters: two gradients."""
BASIS_FLOPS = 4
"""Of one step against one vector of the basis, over n: orthogonalised twice."""


@dataclass(frozen=True)
class Share:
    """What one process of an analysis computes.

    Attributes:
        blocks: Its own, in the order of the table; all their variants are its own, too.
        leads: It computes what belongs to no block: the cosines, H_e of layers in no block.
        owned: By parameter of any block, whether the first block with it is its own.
    """

    blocks: tuple[Block, ...]
    leads: bool = True
    owned: Mapping[str, bool] = field(default_factory=dict)

    def owns(self, block: Block) -> bool:
        """Whether the block, or what a change of the network made of it, is its own."""
        return any(own.name == block.name for own in self.blocks)

    def explains(self, layer: Layer) -> bool:
        """Whether H_e of the layer is its own: it goes with the block of the layer's weight."""
        return self.owned.get(layer.weight, self.leads)


def share_of(
    blocks: Sequence[Block], options: Options, device_type: str, *, rows: int, total: int
) -> Share:
    """The share of the shard that ``options`` names; of all blocks where it names none.

    Every process computes the same shares, whatever its machine, memory and clock: the longest
    block that is left goes to the shard that has least to do.

    Args:
        blocks: In the order of the table.
        options: With the variants spelled out.
        device_type: What computes, ``cpu`` or ``cuda``.
        rows: Examples in the data.
        total: Parameters of the network.
    Source:
        Graham (1969), longest processing time first: the last shard ends at most 4/3 as late as
        in the best deal.
    """
    if options.shard is None:
        return Share(tuple(blocks))
    shard, limit = parse_shard(options.shard), exact_limit(options, device_type)
    costs = {b.name: block_cost(b, options, limit=limit, rows=rows, total=total) for b in blocks}
    owners: dict[str, int] = {}
    loads = [0] * shard.count
    for block in sorted(blocks, key=lambda block: -costs[block.name]):
        # What takes no time goes with the first, so that an empty shard says that it is empty.
        place = loads.index(min(loads)) if costs[block.name] else 0
        owners[block.name] = place + 1
        loads[place] += costs[block.name]
    owned: dict[str, bool] = {}
    for block in blocks:
        for name in block.parameters:
            owned.setdefault(name, owners[block.name] == shard.number)
    return Share(
        blocks=tuple(block for block in blocks if owners[block.name] == shard.number),
        leads=owners.get(WHOLE, 1) == shard.number,
        owned=owned,
    )


def block_cost(block: Block, options: Options, *, limit: int, rows: int, total: int) -> int:
    """Operations that all variants of a block take, about, and the same on every machine.

    A layer counts as if it were assembled on its own, for ``whole``, whose matrix serves its
    layers, may be another shard's.
    """
    if block.skipped is not None:
        return 0
    variants = [parse_variant(name) for name in options.variants or (RAW,)]
    networks = len({variant.network for variant in variants})
    size, product = block.size, PRODUCT_FLOPS * rows * total
    if size <= limit:
        return networks * size * product + len(variants) * DENSE_FLOPS * size**3
    budget = Budget(
        steps=options.steps,
        probes=options.probes,
        density=DENSITY_STEPS if options.density else 0,
        power=options.eigensolver == "power",
    )
    basis = 0 if budget.power else min(options.steps, size) ** 2
    return len(variants) * (budget.products(size) * product + BASIS_FLOPS * size * basis)
