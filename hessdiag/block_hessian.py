"""The Hessian of one block, as a product and as a matrix, whichever way is cheapest to have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from hessdiag.blocks import WHOLE, Block
from hessdiag.curvature.differenced import assemble_differences
from hessdiag.curvature.engines import BUILD, Difference, Linearized, Recompute, Summed
from hessdiag.curvature.precision import noise_of
from hessdiag.curvature.structured import NotStructured, Plan
from hessdiag.network import Network, Row
from hessdiag.solve.problem import Noise
from hessdiag.structured_block import (
    Departure,
    assemble_by_structure,
    difference,
    structure,
    verify,
)
from hessdiag_probes.exact import assemble
from hessdiag_probes.types import Matvec, Vector

STRUCTURE = "structure"


class BlockHessian:
    """H of a block; its product and its matrix are made when they are first used.

    Attributes:
        engine_name: What computes its products; empty until it is known.
        tried: Seconds per product of the engines that were tried for it.
        products: Spent on its matrix; a pass that stands for the products of many columns counts
            as one.
        refused: Why its matrix was not made by structure, or cut from such a one, though that
            would have been quicker.
        departure: By which a matrix that was made by structure differs from products, or None.
    """

    def __init__(self, network: Network, block: Block, row: Row) -> None:
        self.network = network
        self.block = block
        self.row = row
        self.parameters = network.select(block.parameters)
        self.engine_name = ""
        self.tried: dict[str, float] = {}
        self.products = 0
        self.refused = ""
        self.departure: Departure | None = None
        self._errors: Tensor | None = None

    @cached_property
    def product(self) -> Matvec:
        """``v -> H v``, as cheap as it is to have."""
        cut = self._known_matrix()
        if cut is not None:
            self.engine_name = "cut from whole"
            return lambda v: (cut @ v.to(cut)).to(v)
        network = self.network
        engine = network.engine(
            network.objective,
            self.parameters,
            products=self._expected(),
            columns=network.is_exact(self.block) and self._plan is None,
        )
        self.engine_name = engine.name
        if isinstance(engine, Summed):
            self.engine_name, self.tried = engine.record, engine.tried
        return engine

    @cached_property
    def _plan(self) -> Plan | None:
        """How the matrix would be made by structure; None where products take no longer."""
        # What its part of the whole's matrix misses, its own would miss.
        return None if self.refused else structure(self.network, self.parameters)

    def _expected(self) -> int:
        """About how many products of the engine will be asked for."""
        if not self.network.is_exact(self.block):
            return self.network.budget(self.block).products(self.block.size)
        return self.block.size if self._plan is None else len(self._plan.others)

    @cached_property
    def matrix(self) -> Tensor:
        """H, assembled or cut from the whole network's; float64."""
        cut = self._known_matrix()
        if cut is not None:
            return cut
        structured = self._by_structure()
        if structured is not None:
            return structured
        like, size = self.parameters[0], self.block.size
        engine = self.product
        watched = self._watched(engine)
        if isinstance(engine, Difference):
            made = assemble_differences(watched, engine, size)
            self.products, self._errors = size, made.errors
            self.__dict__["product"] = lambda v: (made.matrix @ v.to(made.matrix)).to(v)
            if self.block.name == WHOLE:
                self.network.take_matrix(self.block, made.matrix, made.errors, sure=True)
            return made.matrix
        chunk = 1
        if isinstance(engine, Summed):
            chunk = engine.chunk(size)
            watched = watched if chunk == 1 else self._watched(engine.many)
        found = assemble(
            watched,
            size,
            dtype=like.dtype,
            device=like.device,
            chunk=chunk,
        )
        self.products = found.matvecs
        # The dense solves need the memory that the kept graphs hold.
        matrix = found.matrix
        self.__dict__["product"] = lambda v: (matrix @ v.to(matrix)).to(v)
        if self.block.name == WHOLE:
            self.network.take_matrix(self.block, matrix, sure=True)
        return matrix

    def _watched(self, product: Matvec) -> Matvec:
        """``product`` as it makes the columns of the matrix: told, and until the deadline."""
        network, row = self.network, self.row
        return network.timed(network.watched(product, row.name, row.step, self.block.size))

    def _by_structure(self) -> Tensor | None:
        """H by the structure of its layers, where that is quicker and its own matrix; else None."""
        network = self.network
        plan = self._plan
        if plan is None:
            return None

        def product() -> Matvec:
            return self.product

        try:
            matrix, self.departure = assemble_by_structure(
                network, self.row, self.parameters, plan, product=product, error=self._rounding()
            )
        except NotStructured as reason:
            self.refused = str(reason)
            return None
        self.products = plan.products
        named = [STRUCTURE, self.engine_name] if len(plan.others) else [STRUCTURE]
        self.engine_name = " + ".join(named)
        self.__dict__["product"] = lambda v: (matrix @ v.to(matrix)).to(v)
        if self.block.name == WHOLE:
            network.take_matrix(self.block, matrix)
        return matrix

    def noise(self, view: Callable[[Matvec], Matvec] | None = None) -> Callable[[Vector], Vector]:
        """``v -> `` the error of its product by rounding, seen through ``view``."""
        noise = self._rounding(view)

        def error(vector: Vector) -> Vector:
            own, engine = noise(vector), self.product
            if not isinstance(engine, Linearized):
                return own
            # Another route than that whose rounding was measured: what it makes of that is seen.
            there: Matvec = Recompute(
                self.network.objective, self.parameters, BUILD[self.network.options.curvature]
            )
            here: Matvec = engine
            if view is not None:
                here, there = view(here), view(there)
            other = here(vector) - there(vector)
            return torch.where(other.abs() > own.abs(), other, own)

        return error

    def _rounding(
        self, view: Callable[[Matvec], Matvec] | None = None
    ) -> Callable[[Vector], Vector]:
        """The same of a recomputed product."""
        return noise_of(
            self.network.objective,
            self.parameters,
            self.network.options.curvature,
            narrow=self.network.narrow,
            view=view,
        )

    def with_departure(self, noise: Noise) -> Noise:
        """The noise of the assembled matrix, of ``noise`` as random vectors show it."""
        return noise if self.departure is None else self.departure.within(noise)

    def matrix_noise(self) -> Callable[[Vector], Vector]:
        """``v -> `` the error of the assembled matrix's product by rounding, whoever made it."""
        noise = self.noise()
        apart = difference(self.matrix, self.network, self.parameters)

        def error(vector: Vector) -> Vector:
            own, other = noise(vector), apart(vector).to(vector)
            return torch.where(other.abs() > own.abs(), other, own)

        return error

    @property
    def errors(self) -> Tensor | None:
        """What the entries of the matrix may be wrong by; None where that is rounding alone."""
        if self._errors is None and self.network.differences and self._known_matrix() is None:
            _ = self.matrix
        return self.network.cut_errors(self.block) if self._errors is None else self._errors

    def error(self, *, exact: bool) -> Callable[[Vector], Vector]:
        """``v -> `` what products by differences may be wrong by, the matrix's or the engine's."""
        if not exact and isinstance(self.product, Difference):
            return self.product.error
        errors = self.errors
        if errors is None:
            raise ValueError("only products by differences know their errors")
        return lambda v: (errors @ v.to(errors)).to(v)

    def _known_matrix(self) -> Tensor | None:
        """H from the whole network's matrix, where that is there."""
        if self.block.name == WHOLE:
            return self.network.matrix
        cut = self.network.cut(self.block)
        if cut is None or self.network.sure or self.departure is not None:
            return cut
        return None if self.refused else self._verified(cut)

    def _verified(self, cut: Tensor) -> Tensor | None:
        """``cut`` if it is right in its own scale, of which the whole's may have shown nothing."""
        try:
            self.departure = verify(cut, self.network, self.row, self.parameters, self._rounding())
        except NotStructured as reason:
            self.refused = str(reason)
            return None
        return cut

    def through(self, view: Callable[[Matvec], Matvec], row: Row) -> Tensor:
        """PᵀHP from products through P, where the means of far inputs cancel inside the network.

        In the assembled H they have drowned the rest already.
        """
        network, size, like = self.network, self.block.size, self.parameters[0]
        engine = network.engine(network.objective, self.parameters, products=size)
        watched = network.watched(view(engine), row.name, row.step, size)
        timed = network.timed(watched)
        return assemble(timed, size, dtype=like.dtype, device=like.device).matrix
