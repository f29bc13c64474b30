"""One block of one network, open while its variants are computed: they share all that is dear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from hessdiag.block_hessian import BlockHessian
from hessdiag.blocks import Block
from hessdiag.conditioning.bounds import never_exact
from hessdiag.conditioning.diagonal import diagonal_gap
from hessdiag.conditioning.kappa import stored_inertia
from hessdiag.curvature.convexity import convex_loss
from hessdiag.curvature.differenced import Watched, error_in
from hessdiag.curvature.engines import Difference
from hessdiag.curvature.objective import flatten
from hessdiag.curvature.precision import gradient_noise
from hessdiag.errors import InputError
from hessdiag.network import Network, Row
from hessdiag.progress import Event
from hessdiag.quantity import Quantity
from hessdiag.run import VariantResult
from hessdiag.solve import (
    Problem,
    Solved,
    dead_rows,
    measure_noise,
    positive_floor,
    solve_exact,
    solve_matrix_free,
    without_noise,
)
from hessdiag.solve.matrix_free import DOUBT_MARGIN
from hessdiag.variants.coordinates import (
    Coordinates,
    congruence,
    congruence_error,
    entry_rounding,
)
from hessdiag.variants.scene import Built
from hessdiag_probes.random import generator, sphere
from hessdiag_probes.types import Matvec, Vector

CANCELLED = 1e6
"""A congruence whose sums are so many times smaller than their terms is made from products."""
SQUARES = (1e-140, 1e140)  # numbers whose squares, and sums of them, float64 holds
OTHER_VECTORS = 3.0  # the error of a difference depends on its direction
NOT_CONVEX = "the loss is not recognised as convex in the outputs, so nothing is claimed from that"


class Opened:
    """A block of a network; its products, matrix and noise are found when they are first used.

    Attributes:
        may_shrink: The row is tried again where a batch lacks memory.
    """

    def __init__(self, network: Network, block: Block, row: Row) -> None:
        self.network = network
        self.block = block
        self.row = row
        self.parameters = network.select(block.parameters)
        self.may_shrink = False
        self.exact = self._is_exact()
        self.hessian = BlockHessian(network, block, row)

    def reopen(self) -> None:
        """Forget all that was found: the network now does without something."""
        found = [name for name, kind in vars(Opened).items() if isinstance(kind, cached_property)]
        for name in found:
            self.__dict__.pop(name, None)
        self.exact = self._is_exact()
        self.hessian = BlockHessian(self.network, self.block, self.row)

    def _is_exact(self) -> bool:
        network = self.network
        cut = network.matrix is not None and not network.relief.matrix_free
        return network.is_exact(self.block) or (cut and network.cut(self.block) is not None)

    @property
    def product(self) -> Matvec:
        """``v -> H v``, as cheap as it is to have."""
        return self.hessian.product

    @property
    def matrix(self) -> Tensor:
        """H, assembled or cut from the whole network's; float64."""
        return self.hessian.matrix

    @cached_property
    def gradient_error(self) -> Vector:
        """The gradient's error by rounding, entry by entry."""
        network = self.network
        return gradient_noise(network.objective, self.parameters, narrow=network.narrow)

    @cached_property
    def loss_gradient(self) -> Vector:
        """Of the loss alone, by p."""
        return self.network.objective.gradient(self.parameters)

    @cached_property
    def position(self) -> Vector:
        """The block's parameters p."""
        return flatten([p.data for p in self.parameters])

    @cached_property
    def problem(self) -> Problem:
        """The block as it is, raw."""
        network, options = self.network, self.network.options
        noise = measure_noise(
            self._error(),
            self.product,
            self.loss_gradient,
            seed=options.seed,
            name=self.row.name,
            gradient=10 * float(self.gradient_error.norm()),
            coarse=network.differences,
        )
        if self.exact:
            noise = self.hessian.with_departure(noise)
        peak = float(noise.seen.max())
        if peak > 0 and not SQUARES[0] < peak < SQUARES[1]:
            raise InputError(
                f"the Hessian's entries are near {peak:.0e}, whose squares leave the range of "
                "float64; multiply the loss by a constant that brings them near 1"
            )
        decay = options.weight_decay
        narrow = network.narrow or self.loss_gradient.dtype == torch.float32
        return Problem(
            name=self.row.name,
            gradient=self.loss_gradient + decay * self.position,
            position=self.position,
            loss=network.loss,
            attainable=network.loss + 0.5 * decay * float(self.position.square().sum()),
            noise=noise,
            eps=torch.finfo(torch.float32 if narrow else torch.float64).eps,
            shift=decay,
            damping=options.damping,
            seed=options.seed,
            floor=decay if self.semidefinite else None,
            rounding=self._entry_errors,
        )

    def _error(self, view: Callable[[Matvec], Matvec] | None = None) -> Callable[[Vector], Vector]:
        """``v -> `` the error of its product, seen through ``view``."""
        network = self.network
        if network.differences:
            margin = 1.0 if self.exact else OTHER_VECTORS
            error = error_in(view, self.hessian.error(exact=self.exact))
            return lambda vector: margin * error(vector)
        if self.exact and view is None:
            return self.hessian.matrix_noise()
        return self.hessian.noise(view)

    @property
    def _entry_errors(self) -> Tensor | None:
        """What each entry of the assembled matrix may be wrong by, beyond rounding."""
        errors = self.hessian.errors if self.exact and self.network.differences else None
        return None if errors is None else errors.abs()

    @cached_property
    def semidefinite(self) -> bool:
        """Whether H is known to have no negative eigenvalue, from the structure of the loss."""
        if self.exact or self.network.options.curvature != "ggn":
            return False
        return convex_loss(self.network.objective, self.parameters)

    @cached_property
    def dead(self) -> Tensor:
        """Which rows of H are zero or rounding noise, (n,)."""
        if self.exact:
            return without_noise(self.matrix, self.problem.noise).dead
        return dead_rows(self.problem.noise)[0]

    def solve(self) -> tuple[Solved, int]:
        """The row of raw, and the products it took."""
        problem = self.problem
        if self.exact:
            matrix = self.matrix
            return self._certified(solve_exact(matrix, problem)), self.hessian.products
        solved, products = self._matrix_free(None, problem, self.row)
        return self._certified(solved), products

    def solve_in(
        self, built: Built, raw: VariantResult, row: Row, *, decoupled: bool
    ) -> tuple[Solved, int]:
        """The row in other coordinates, and the products it took.

        Args:
            built: The coordinates.
            raw: The row of raw, whose signs are theirs too.
            row: To be.
            decoupled: Weight decay acts on z: PᵀHP + λI in place of Pᵀ(H + λI)P.
        """
        options = self.network.options
        coordinates, decay = built.coordinates, options.weight_decay
        view = self.view(coordinates, 0.0 if decoupled else decay)
        problem = self._transformed(coordinates, view, row, decoupled=decoupled)
        # Signs are those of raw by Sylvester's law; a shift of z's own is no congruence.
        congruent = not (decoupled and decay)
        if not self.exact:
            if congruent:
                problem = replace(problem, positive=raw["n_positive"])
            solved, products = self._matrix_free(view, problem, row)
            return self._certified(solved), products
        cleaned = without_noise(self.matrix, self.problem.noise)
        lost = torch.zeros_like(cleaned.doubt)
        if bool((cleaned.doubt > 0).any()):
            lost = congruence(self.matrix - cleaned.matrix, coordinates).norm(dim=1)
        if congruent:
            problem = replace(problem, inertia=stored_inertia(raw.values))
        matrix = cleaned.matrix
        if not decoupled:
            matrix.diagonal().add_(decay)
        seen, rounding = congruence(matrix, coordinates), None
        spread = congruence_error(matrix, coordinates, problem.eps)
        products = 0
        errors = self.hessian.errors if self.network.differences else None
        if errors is not None:
            carried = congruence(errors, coordinates).abs()
            rounding = carried if spread is None else spread + carried
        elif spread is not None:
            rounding = spread
            unit = entry_rounding(len(seen), problem.eps) * float(seen.norm())
            coarse = float(spread.norm()) > CANCELLED * unit
            if coarse and built.source == "activations":
                seen, rounding = self.hessian.through(view, row), None
                products = self.block.size
        problem = replace(problem, doubt=lost, rounding=rounding)
        return self._certified(solve_exact(seen, problem)), products

    def view(self, coordinates: Coordinates, decay: float) -> Callable[[Matvec], Matvec]:
        """``H -> Pᵀ (H + decay) P`` on products, the dead rows of H zeroed."""
        alive = ~self.dead

        def seen(product: Matvec) -> Matvec:
            def through(vector: Vector) -> Vector:
                p = coordinates.apply(vector)
                mask = alive.to(vector)
                return coordinates.transposed(mask * product(mask * p) + decay * p)

            return through

        return seen

    def _transformed(
        self,
        coordinates: Coordinates,
        view: Callable[[Matvec], Matvec],
        row: Row,
        *,
        decoupled: bool,
    ) -> Problem:
        """The block's problem in coordinates z, p = P z."""
        network, raw = self.network, self.problem
        decay = network.options.weight_decay
        position = coordinates.inverse(self.position)
        gradient = coordinates.transposed(self.loss_gradient)
        wrong = coordinates.transposed(self.gradient_error)
        if decoupled:
            gradient = gradient + decay * position
            attainable = raw.loss + 0.5 * decay * float(position.square().sum())
        else:
            gradient = gradient + decay * coordinates.transposed(self.position)
            attainable = raw.attainable
        noise = measure_noise(
            self._error(view),
            view(self.product),
            gradient,
            seed=network.options.seed,
            name=row.name,
            gradient=10 * float(wrong.norm()),
            vectors=1,  # dead rows are known; only the size of the noise is new
            coarse=network.differences,
        )
        floor: float | None = None
        if self.semidefinite:
            least = coordinates.least() or 0.0
            floor = decay if decoupled else decay * least
        return replace(
            raw,
            name=row.name,
            gradient=gradient,
            position=position,
            attainable=attainable,
            noise=noise,
            shift=decay if decoupled else 0.0,
            floor=floor,
            doubt=None if self.exact else self._lost(coordinates, row),
        )

    def _lost(self, coordinates: Coordinates, row: Row) -> Vector:
        """What zeroing rows that may be real may have taken from PᵀHP, by one product."""
        noise = self.problem.noise
        real = noise.doubtful(noise.seen, self.dead) > 0
        if not bool(real.any()):
            return torch.zeros_like(self.loss_gradient)
        unit = sphere(
            self.block.size,
            generator=generator(self.network.options.seed, row.name, "doubt"),
            dtype=self.position.dtype,
            device=self.position.device,
        ) * (self.block.size**0.5)
        seen = self.product(coordinates.apply(unit))
        return DOUBT_MARGIN * coordinates.transposed(seen * real.to(seen))

    def _matrix_free(
        self, view: Callable[[Matvec], Matvec] | None, problem: Problem, row: Row
    ) -> tuple[Solved, int]:
        """The row above the exact limit, in the coordinates that ``view`` shows."""
        product = self.product
        if not isinstance(product, Difference):
            return self._from_products(product if view is None else view(product), problem, row)
        met = Watched(product, view)
        solved, products = self._from_products(met, problem, row)
        noise = problem.noise
        if met.block > noise.block:  # then too narrow for what the products turned out to be
            rows = torch.maximum(noise.rows, met.rows.to(noise.rows))
            noise = replace(noise, block=met.block, rows=rows)
            problem = replace(problem, noise=noise)
            solved, more = self._from_products(met, problem, row)
            products += more
        return solved, products

    def _from_products(self, product: Matvec, problem: Problem, row: Row) -> tuple[Solved, int]:
        network = self.network
        budget = replace(
            network.budget(self.block),
            late=network.late,
            agree=network.told,
            batches_may_shrink=self.may_shrink,
        )
        if network.options.curvature == "ggn" and not self.semidefinite:
            budget = replace(budget, reasons=(*budget.reasons, NOT_CONVEX))
        most = budget.products(self.block.size)
        watched = network.watched(product, row.name, row.step, most)
        solved, products = solve_matrix_free(watched, problem, budget)
        network.report(Event(row.name, *row.step, products, products))
        return solved, products

    def _certified(self, solved: Solved) -> Solved:
        if not (self.network.narrow or self.network.differences):
            return solved
        return Solved(never_exact(solved.values), solved.spectrum, solved.rows)

    @cached_property
    def diagonal_floor(self) -> float | None:
        """What no diagonal brings κ below, of an exact positive definite block; else None."""
        decay = self.network.options.weight_decay
        matrix = without_noise(self.matrix, self.problem.noise).matrix
        matrix.diagonal().add_(decay)
        return positive_floor(matrix, self.problem)

    def diagonal_gap(self, solved: Solved, built: Built | None = None) -> Quantity:
        """By which factor another diagonal could still lower κ, at most (maths 5.3)."""
        shifted = built is not None and built.decoupled and self.network.options.weight_decay > 0
        turned = built is not None and not built.coordinates.diagonal
        kappa, negative = solved.values["kappa"], solved.values["n_negative"]
        if not self.exact or shifted or turned or self.network.narrow or self.network.differences:
            return Quantity.absent()
        if not isinstance(kappa, Quantity) or kappa.value is None:
            return Quantity.absent()
        if not isinstance(negative, Quantity) or negative.high != 0:
            return Quantity.absent()
        bound = None if built is None else built.diagonal_bound
        return diagonal_gap(kappa, self.diagonal_floor, bound=bound)
