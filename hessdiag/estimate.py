"""What an analysis will cost: products, seconds and memory per block, from a few timed products."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessdiag.analysis import pick_device
from hessdiag.block_hessian import STRUCTURE
from hessdiag.blocks import WHOLE, Block, find_blocks
from hessdiag.checkpoint import Checkpoint, match_weights, read_checkpoint
from hessdiag.curvature.engines import Difference, Engine, make_engine
from hessdiag.curvature.loan import bare, exact_arithmetic, has_batch_statistics, loan
from hessdiag.curvature.objective import Objective
from hessdiag.curvature.precision import gradient_noise, noise_of
from hessdiag.curvature.structured import Plan, make_plan
from hessdiag.data import load_batches
from hessdiag.estimated import BlockEstimate, Estimate
from hessdiag.names import named_parameters
from hessdiag.network import allowed
from hessdiag.options import Options, exact_limit, make_options, with_variants
from hessdiag.peak import PeakMemory
from hessdiag.progress import Event, Report
from hessdiag.selfcheck import run_selfchecks
from hessdiag.sharding import share_of
from hessdiag.solve.budget import DENSITY_PROBES, POWER_VECTORS
from hessdiag.solve.calibration import DENSE_COPIES, DenseTimes
from hessdiag.task import Task, as_loss, units
from hessdiag.variants.grammar import RAW, parse_variant
from hessdiag_probes.random import generator, rademacher

TIMED_SECONDS = 0.3
TIMED_PRODUCTS = (2, 20)
HALF_PRODUCTS = 20  # of both halves of the data, in products over all of it
SELFCHECK_PRODUCTS = 14
RECOMPUTED = 3  # products in one measurement of a block's noise


def estimate(
    task: Task,
    checkpoint: str | Path | Checkpoint | None = None,
    *,
    trust: bool = False,
    report: Report | None = None,
    **options: Any,
) -> Estimate:
    """Products, seconds and peak memory that :func:`hessdiag.analyze` will take, per block.

    Args:
        task: Model, data and loss.
        checkpoint: Whose weights are loaded for the measurements; None takes the model's own.
        trust: Allow a checkpoint that is a pickled module, which runs code when it is loaded.
        report: Called with an :class:`Event` before each block.
        **options: Those of ``analyze``.
    Returns:
        The estimate, without H_e, neurons, symmetries and cosines. A block above the exact limit
        is counted at the most that it may cost; a positive definite one of a huge range may take
        ten times its dense solve. The model is bit for bit what it was.
    Raises:
        HessdiagError: As ``analyze`` would: the self-checks are run too.
    Cost:
        The self-checks, and per block whose products are computed 2 to 20 products, one
        measurement of their rounding and its engine; two small dense solves.
    """
    chosen = make_options(**options)
    if isinstance(checkpoint, (str, Path)):
        checkpoint = read_checkpoint(checkpoint, trust=trust)
    has_state = checkpoint is not None and checkpoint.optimizer is not None
    chosen = with_variants(chosen, has_state=has_state)
    model = bare(task.model)
    blocks = find_blocks(model, chosen.blocks)
    whole = find_blocks(model, (WHOLE,))[0]
    device = pick_device(chosen.device)
    peak = PeakMemory(device)
    peak.begin()
    dtype = torch.float64 if chosen.dtype == "float64" else torch.float32
    with (
        loan([model], mode=task.mode, dtype=dtype, device=device),
        exact_arithmetic([model], dtype),
    ):
        started = time.perf_counter()
        if checkpoint is not None:
            model.load_state_dict(match_weights(checkpoint, model).weights, strict=False)
        batches = load_batches(
            task.data,
            units(task),
            dtype=dtype,
            device=device,
            batch_size=chosen.batch_size,
            max_examples=chosen.max_examples,
            seed=chosen.seed,
            order_matters=has_batch_statistics(model),
        )
        objective = Objective(model, as_loss(task), batches)
        objective.value()
        setup = time.perf_counter() - started
        named = dict(named_parameters(model))
        wanted = [block for block in blocks if block.skipped is None]
        names = list(dict.fromkeys(name for block in wanted for name in block.parameters))
        started = time.perf_counter()
        if names:
            run_selfchecks(
                objective,
                [named[name] for name in names],
                curvature=chosen.curvature,
                seed=chosen.seed,
                engine=chosen.engine,
            )
        checked, check_memory = time.perf_counter() - started, peak.rise()
        measure = _Measure(objective, named, chosen, peak)
        found = []
        share = share_of(blocks, chosen, device.type, rows=batches.rows, total=whole.size)
        count = len(share.blocks)
        for position, block in enumerate(share.blocks):
            if report is not None:
                report(Event(message=f"timing block {position + 1}/{count} {block.name}"))
            found.append(measure.block(block, share.blocks))
    return Estimate(
        blocks=tuple(found),
        device=str(device),
        dtype=chosen.dtype,
        setup_seconds=setup,
        selfcheck_products=SELFCHECK_PRODUCTS,
        selfcheck_seconds=checked,
        selfcheck_memory=check_memory,
    )


@dataclass(frozen=True)
class _Timed:
    """What was measured on a block.

    Attributes:
        engine: How its products are computed; empty for none.
        build: Seconds that the engine took.
        product: Of one product.
        noise: Of one measurement of a product's rounding, three recomputed products.
        gradient: Of a gradient and its rounding.
        memory: Bytes at the peak of all that.
    """

    engine: str
    build: float
    product: float
    noise: float
    gradient: float
    memory: int


class _Measure:
    """Times a few products of each block, and knows what the rest of its work costs."""

    def __init__(
        self,
        objective: Objective,
        named: dict[str, nn.Parameter],
        options: Options,
        peak: PeakMemory,
    ) -> None:
        self.objective = objective
        self.named = named
        self.options = options
        self.limit = exact_limit(options, peak.device.type)
        self.dense = DenseTimes(peak.device)
        self.peak = peak
        variants = [parse_variant(name) for name in options.variants or (RAW,)]
        self.networks = len({variant.network for variant in variants})
        self.views = sum(variant.coordinates != RAW for variant in variants)

    def block(self, block: Block, blocks: Sequence[Block]) -> BlockEstimate:
        """What one block will cost, by the way in which it will be solved."""
        if block.skipped is not None:
            return BlockEstimate(block.name, block.size, block.skipped)
        parameters = [self.named[name] for name in block.parameters]
        whole = next((b.size for b in blocks if b.name == WHOLE and b.skipped is None), None)
        assembled = whole if whole is not None and whole <= self.limit else None
        if block.size > self.limit:
            return self._matrix_free(block, parameters)
        return self._exact(block, parameters, assembled)

    def _exact(
        self, block: Block, parameters: Sequence[nn.Parameter], assembled: int | None
    ) -> BlockEstimate:
        """By its matrix: ``assembled``, the size of the whole network's, is not made twice."""
        cut = assembled is not None and block.name != WHOLE
        plan = None if cut else self._plan(parameters)
        by_products = block.size if plan is None else len(plan.others)
        timed = self._timed(parameters, products=0 if cut else max(by_products, 1))
        count = 0 if cut else block.size if plan is None else plan.products
        # Two measurements for the rows, one for the equilibrated matrix.
        seconds = timed.build + timed.gradient + 3 * timed.noise
        if plan is not None:
            seconds += self.dense.multiply_seconds(plan.flops(self.objective.batches.rows))
        seconds += (count + 2 * (not cut)) * timed.product + self.dense.seconds(block.size)
        # A congruence: one measurement for its rows, one for its equilibrated matrix.
        view = 2 * timed.noise + self.dense.seconds(block.size)
        seconds = self.networks * seconds + self.views * view
        noise = self.networks * 3 * RECOMPUTED + self.views * 2 * RECOMPUTED
        matrix = 8 * block.size**2
        held = 8 * assembled**2 if cut and assembled is not None else 0
        solve = self.peak.held() + round((1 + DENSE_COPIES) * matrix)
        halves = (
            self._halves(timed)
            if not cut
            else self._halves(self._timed(parameters, products=HALF_PRODUCTS))
        )
        return BlockEstimate(
            name=block.name,
            size=block.size,
            skipped=None,
            method="cut from whole" if cut else "exact",
            engine=timed.engine if plan is None else STRUCTURE,
            products=self.networks * count,
            noise_products=noise + 2 * self.networks * (not cut),
            seconds=seconds + (self.networks + self.views) * halves,
            memory=held + max(solve, timed.memory + matrix),
        )

    def _plan(self, parameters: Sequence[nn.Parameter]) -> Plan | None:
        """How the matrix would be made by structure, where that is quicker."""
        if self.options.engine != "auto":
            return None
        plan = make_plan(self.objective, parameters)
        return plan if plan.worthwhile else None

    def _matrix_free(self, block: Block, parameters: Sequence[nn.Parameter]) -> BlockEstimate:
        """From products alone, at the most that they may be."""
        options, size = self.options, block.size
        like = next(iter(self.named.values()))
        budget = allowed(options, size, like)
        timed = self._timed(parameters, products=budget.products(size))
        power = budget.power
        steps = options.steps if power else min(options.steps, size)
        forecast, depth = min(budget.forecast, size), min(budget.density, size)
        products = budget.products(size)
        # Each basis vector is read four times per step: orthogonalised twice, there and back.
        reads = 2 * ((0 if power else steps**2) + forecast**2)
        reads += 4 * options.probes * (0 if power else steps)
        reads += 2 * DENSITY_PROBES * depth**2
        rows = self.networks + self.views
        seconds = self.networks * (timed.build + timed.gradient) + rows * (
            2 * timed.noise + (2 + products) * timed.product
        )
        seconds += rows * reads * self.dense.pass_seconds(size)
        vectors = (0 if power else steps) + max(forecast, depth) + POWER_VECTORS
        return BlockEstimate(
            name=block.name,
            size=size,
            skipped=None,
            method="power" if power else "lanczos",
            engine=timed.engine,
            products=rows * products,
            noise_products=rows * (2 * RECOMPUTED + 2),
            seconds=seconds + rows * self._halves(timed),
            memory=timed.memory + vectors * size * like.element_size(),
        )

    def _halves(self, timed: _Timed) -> float:
        """Seconds of ``half_ratio``: an engine and 20 products on each half of the data."""
        if self.options.max_examples is None:
            return 0.0
        return timed.build + HALF_PRODUCTS * timed.product

    def _timed(self, parameters: Sequence[nn.Parameter], *, products: int) -> _Timed:
        """Time what a block does with its engine, which is built where ``products`` are wanted.

        One is timed where all columns come by structure, too: a pass of that takes as long.
        """
        options = self.options
        self.peak.begin()
        size = sum(p.numel() for p in parameters)
        vector = rademacher(
            size,
            generator=generator(options.seed, "estimate"),
            dtype=parameters[0].dtype,
            device=parameters[0].device,
        )
        engine: Engine | None = None
        build = product = 0.0
        if products:
            started = self._now()
            engine = make_engine(
                self.objective,
                parameters,
                curvature=options.curvature,
                engine=options.engine,
                memory_budget=options.memory_budget,
                products=products,
            )
            build = self._now() - started
            made = engine
            product = self._typical(lambda: made(vector))
        started = self._now()
        if options.engine != "difference":
            noise_of(self.objective, parameters, options.curvature)(vector)
        elif isinstance(engine, Difference):
            engine.error(vector)
        noise = self._now() - started
        started = self._now()
        gradient_noise(self.objective, parameters)
        self.objective.gradient(parameters)
        gradient = self._now() - started
        return _Timed(
            engine="" if engine is None else engine.name,
            build=build,
            product=product,
            noise=noise,
            gradient=gradient,
            memory=self.peak.rise(),
        )

    def _typical(self, call: Callable[[], object]) -> float:
        """The median seconds of a few calls, after one that warms up."""
        call()
        taken: list[float] = []
        least, most = TIMED_PRODUCTS
        while len(taken) < least or (sum(taken) < TIMED_SECONDS and len(taken) < most):
            started = self._now()
            call()
            taken.append(self._now() - started)
        return sorted(taken)[len(taken) // 2]

    def _now(self) -> float:
        device = next(iter(self.named.values())).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
