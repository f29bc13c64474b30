"""The model on loan, and what all its blocks share: products, noise, the whole matrix, halves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from hessdiag.blocks import WHOLE, Block
from hessdiag.conditioning.bounds import never_exact
from hessdiag.curvature.convexity import convex_loss
from hessdiag.curvature.engines import Engine, free_memory, make_engine
from hessdiag.curvature.objective import Objective, flatten
from hessdiag.curvature.precision import gradient_noise, noise_of
from hessdiag.errors import InputError, OutOfTime
from hessdiag.names import named_parameters
from hessdiag.options import Options, exact_limit
from hessdiag.progress import Event, Report
from hessdiag.quantity import Quantity
from hessdiag.selfcheck import SelfChecks
from hessdiag.solve import (
    Budget,
    Problem,
    Solved,
    fitted,
    measure_noise,
    solve_exact,
    solve_matrix_free,
)
from hessdiag.solve.budget import DENSITY_STEPS
from hessdiag_probes.exact import assemble
from hessdiag_probes.lanczos import lanczos
from hessdiag_probes.random import generator, sphere
from hessdiag_probes.types import Matvec, Vector

HALF_STEPS = 20
SQUARES = (1e-140, 1e140)  # numbers whose squares, and sums of them, float64 holds
REPORT_EVERY = 0.1  # seconds
NOT_CONVEX = "the loss is not recognised as convex in the outputs, so nothing is claimed from that"


def allowed(options: Options, size: int, like: Tensor) -> Budget:
    """What a block above the exact limit may cost, of numbers like ``like``, on its device."""
    free = options.memory_budget
    if free is None:
        free = free_memory(like.device) // 2
    wanted = Budget(
        steps=options.steps,
        probes=options.probes,
        density=DENSITY_STEPS if options.density else 0,
        tolerance=options.tolerance,
        power=options.eigensolver == "power",
    )
    return fitted(wanted, size, number=like.element_size(), free=free)


class Network:
    """The model on loan, and what all its blocks share.

    Attributes:
        matrix: Of the whole network, where it was assembled: its layers are cut from it.
        slices: Of each parameter in ``matrix``.
        deadline: When to end with what is certified by then, of ``time.monotonic()``; or None.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, options: Options, report: Report
    ) -> None:
        self.objective = objective
        self.options = options
        self.report = report
        self.named: dict[str, nn.Parameter] = dict(named_parameters(model))
        self.matrix: Tensor | None = None
        self.slices: dict[str, tuple[int, int]] = {}
        self.halves: list[Objective] = []
        self.loss = 0.0
        self.narrow = False
        self.deadline: float | None = None
        self._budgets: dict[str, Budget] = {}

    def select(self, names: Sequence[str]) -> list[nn.Parameter]:
        """The parameters of these names."""
        return [self.named[name] for name in names]

    def prepare(self, loss: float, checks: SelfChecks, parts: list[Objective]) -> None:
        """Take over what was found before the blocks."""
        self.loss = loss
        self.narrow = bool(checks.hidden_casts)
        self.halves = parts

    def solve(
        self, block: Block, index: int, count: int, engines: dict[str, str]
    ) -> tuple[Solved, int]:
        """One block: exact where it fits, else by Lanczos; with the products it took.

        Args:
            block: Not skipped.
            index: Of the block in the order of work, from 1, for the progress.
            count: Number of blocks.
            engines: Takes the name of the engine that was used.
        """
        options = self.options
        parameters = self.select(block.parameters)
        cut = self._cut(block)
        if cut is not None:
            engines[block.name] = "cut from whole"
            problem = self._problem(block, parameters, lambda v: (cut @ v.to(cut)).to(v))
            return self._certified(solve_exact(cut, problem)), 0
        device, dtype = parameters[0].device, parameters[0].dtype
        exact = self.is_exact(block)
        engine = self._engine(self.objective, parameters)
        engines[block.name] = engine.name
        problem = self._problem(block, parameters, engine)
        if not exact:
            budget = replace(self.budget(block), deadline=self.deadline)
            if options.curvature == "ggn":
                convex = convex_loss(self.objective, parameters)
                problem = replace(problem, semidefinite=convex)
                reasons = budget.reasons if convex else (*budget.reasons, NOT_CONVEX)
                budget = replace(budget, reasons=reasons)
            most = budget.products(block.size)
            watched = self._watched(engine, block, index, count, most)
            solved, products = solve_matrix_free(watched, problem, budget)
            self.report(Event(block.name, index, count, products, products))
            return self._certified(solved), products
        watched = self._timed(self._watched(engine, block, index, count, block.size))
        found = assemble(watched, block.size, dtype=dtype, device=device)
        # The dense solve needs the memory that the kept graphs hold.
        del engine, watched
        if block.name == WHOLE:
            self.take_matrix(block, found.matrix)
        return self._certified(solve_exact(found.matrix, problem)), found.matvecs

    def is_exact(self, block: Block) -> bool:
        """Whether the block is assembled and solved."""
        device = next(iter(self.named.values())).device
        return block.size <= exact_limit(self.options, device.type)

    def budget(self, block: Block) -> Budget:
        """What a block above the exact limit may cost; decided once, for memory comes and goes."""
        if block.name not in self._budgets:
            like = self.named[block.parameters[0]]
            self._budgets[block.name] = allowed(self.options, block.size, like)
        return self._budgets[block.name]

    def constrained(self, blocks: Sequence[Block]) -> dict[str, list[str]]:
        """What memory does not allow, by block: it changes numbers."""
        large = [b for b in blocks if b.skipped is None and not self.is_exact(b)]
        return {b.name: list(self.budget(b).reasons) for b in large if self.budget(b).reasons}

    def _late(self, _: object = None) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _timed(self, product: Matvec) -> Matvec:
        """``product`` until the deadline: half a matrix certifies nothing."""

        def timed(vector: Vector) -> Vector:
            if self._late():
                raise OutOfTime(
                    f"not assembled within --max-seconds {self.options.max_seconds:g}; allow "
                    "more, or lower --exact-limit for bounds from fewer products"
                )
            return product(vector)

        return timed

    def _engine(self, objective: Objective, parameters: list[nn.Parameter]) -> Engine:
        return make_engine(
            objective,
            parameters,
            curvature=self.options.curvature,
            engine=self.options.engine,
            memory_budget=self.options.memory_budget,
        )

    def _problem(self, block: Block, parameters: list[nn.Parameter], product: Matvec) -> Problem:
        options = self.options
        gradient = self.objective.gradient(parameters)
        wrong = gradient_noise(self.objective, parameters, narrow=self.narrow)
        noise = measure_noise(
            noise_of(self.objective, parameters, options.curvature, narrow=self.narrow),
            product,
            gradient,
            seed=options.seed,
            name=block.name,
            gradient=10 * float(wrong.norm()),
        )
        peak = float(noise.seen.max())
        if peak > 0 and not SQUARES[0] < peak < SQUARES[1]:
            raise InputError(
                f"the Hessian's entries are near {peak:.0e}, whose squares leave the range of "
                "float64; multiply the loss by a constant that brings them near 1"
            )
        narrow = self.narrow or gradient.dtype == torch.float32
        return Problem(
            name=block.name,
            gradient=gradient,
            position=flatten([p.data for p in parameters]),
            loss=self.loss,
            noise=noise,
            eps=torch.finfo(torch.float32 if narrow else torch.float64).eps,
            weight_decay=options.weight_decay,
            damping=options.damping,
            seed=options.seed,
        )

    def _certified(self, solved: Solved) -> Solved:
        if not self.narrow:
            return solved
        return Solved(never_exact(solved.values), solved.spectrum, solved.rows)

    def take_matrix(self, block: Block, matrix: Tensor) -> None:
        """Cut the layers from ``matrix``, which was assembled for ``block``, the whole network."""
        self.matrix = matrix
        self.slices = self._slices(block)

    def _slices(self, block: Block) -> dict[str, tuple[int, int]]:
        ends = accumulate(self.named[name].numel() for name in block.parameters)
        return {
            name: (end - self.named[name].numel(), end)
            for name, end in zip(block.parameters, ends, strict=True)
        }

    def _cut(self, block: Block) -> Tensor | None:
        """The block's part of the whole network's matrix, where that was assembled."""
        if self.matrix is None or block.name == WHOLE:
            return None
        device = self.matrix.device
        index = torch.cat([torch.arange(*self.slices[n], device=device) for n in block.parameters])
        return self.matrix[index][:, index]

    def _watched(self, product: Matvec, block: Block, index: int, count: int, total: int) -> Matvec:
        done = 0
        reported = 0.0

        def counted(vector: Vector) -> Vector:
            nonlocal done, reported
            result = product(vector)
            done += 1
            now = time.perf_counter()
            if now - reported >= REPORT_EVERY or done >= total:
                reported = now
                self.report(Event(block.name, index, count, done, total))
            return result

        return counted

    def half_ratio(self, block: Block, solved: Solved) -> Quantity:
        """λ_max on one half of the drawn examples over that on the other, by Lanczos."""
        if not self.halves:
            return Quantity.absent()
        kappa = solved.values["kappa"]
        if isinstance(kappa, Quantity) and kappa.status == "zero":
            return Quantity.zero()  # the halves hold rounding noise
        parameters = self.select(block.parameters)
        tops = []
        for half in self.halves:
            engine = self._engine(half, parameters)
            start = sphere(
                block.size,
                generator=generator(self.options.seed, block.name, "half ratio"),
                dtype=parameters[0].dtype,
                device=parameters[0].device,
            )
            run = lanczos(engine, start, min(HALF_STEPS, block.size), converged=self._late)
            tops.append(float(run.ritz().value[-1]) + self.options.weight_decay)
        if min(tops) <= 0 or self._late():
            return Quantity.unresolved()
        return Quantity.estimate(tops[0] / tops[1])
