"""The Hessian of one block, as a product and as a matrix, whichever way is cheapest to have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from torch import Tensor

from hessdiag.blocks import WHOLE, Block
from hessdiag.network import Network, Row
from hessdiag_probes.exact import assemble
from hessdiag_probes.types import Matvec


class BlockHessian:
    """H of a block; its product and its matrix are made when they are first used.

    Attributes:
        engine_name: What computes its products; empty until it is known.
        products: Spent on its matrix.
    """

    def __init__(self, network: Network, block: Block, row: Row) -> None:
        self.network = network
        self.block = block
        self.row = row
        self.parameters = network.select(block.parameters)
        self.engine_name = ""
        self.products = 0

    @cached_property
    def product(self) -> Matvec:
        """``v -> H v``, as cheap as it is to have."""
        cut = self._known_matrix()
        if cut is not None:
            self.engine_name = "cut from whole"
            return lambda v: (cut @ v.to(cut)).to(v)
        engine = self.network.engine(self.network.objective, self.parameters)
        self.engine_name = engine.name
        return engine

    @cached_property
    def matrix(self) -> Tensor:
        """H, assembled or cut from the whole network's; float64."""
        cut = self._known_matrix()
        if cut is not None:
            return cut
        like, size = self.parameters[0], self.block.size
        watched = self.network.watched(self.product, self.row.name, self.row.step, size)
        found = assemble(self.network.timed(watched), size, dtype=like.dtype, device=like.device)
        self.products = found.matvecs
        # The dense solves need the memory that the kept graphs hold.
        matrix = found.matrix
        self.__dict__["product"] = lambda v: (matrix @ v.to(matrix)).to(v)
        if self.block.name == WHOLE:
            self.network.take_matrix(self.block, matrix)
        return matrix

    def _known_matrix(self) -> Tensor | None:
        """H from the whole network's matrix, where that is there."""
        if self.block.name == WHOLE:
            return self.network.matrix
        return self.network.cut(self.block)

    def through(self, view: Callable[[Matvec], Matvec], row: Row) -> Tensor:
        """PᵀHP from products through P, where the means of far inputs cancel inside the network.

        In the assembled H they have drowned the rest already.
        """
        network, size, like = self.network, self.block.size, self.parameters[0]
        engine = network.engine(network.objective, self.parameters)
        watched = network.watched(view(engine), row.name, row.step, size)
        timed = network.timed(watched)
        return assemble(timed, size, dtype=like.dtype, device=like.device).matrix
