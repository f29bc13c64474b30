"""The pipeline that ``analyze`` runs: a task and options in, a run out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hessdiag
from hessdiag.blocks import WHOLE, Block, find_blocks
from hessdiag.checkpoint import Checkpoint, match_weights, read_checkpoint
from hessdiag.checkpoint.optimizer import OptimizerState, map_optimizer
from hessdiag.curvature.engines import Engine, Kept, make_engine
from hessdiag.curvature.loan import bare, exact_arithmetic, loan
from hessdiag.curvature.objective import Objective, flatten
from hessdiag.curvature.precision import gradient_noise, noise_of
from hessdiag.data import halves, load_batches
from hessdiag.errors import HessdiagError, InputError, OptionError
from hessdiag.fingerprint import compare_fingerprints, hash_tensors, make_fingerprint
from hessdiag.names import clean_name, named_parameters
from hessdiag.options import EXACT_LIMIT, Options, make_options
from hessdiag.provenance import environment
from hessdiag.quantity import Quantity
from hessdiag.run import BlockResult, Provenance, Run, Value, VariantResult
from hessdiag.bounds import never_exact
from hessdiag.selfcheck import SelfChecks, run_selfchecks
from hessdiag.solve import (
    Problem,
    Solved,
    measure_noise,
    skipped_fields,
    solve_exact,
    solve_lanczos,
)
from hessdiag.task import Task, as_loss, units
from hessdiag_probes.exact import assemble
from hessdiag_probes.lanczos import lanczos
from hessdiag_probes.random import generator, sphere
from hessdiag_probes.types import Matvec, Vector

HALF_STEPS = 20
REPORT_EVERY = 0.1  # seconds


@dataclass(frozen=True)
class Event:
    """Progress: ``done`` of ``total`` products of ``block``, or only a ``message``."""

    block: str = ""
    index: int = 0
    count: int = 0
    done: int = 0
    total: int = 0
    message: str = ""


Report = Callable[[Event], None]


def _silent(_event: Event) -> None:
    return None


def analyze(
    task: Task,
    *,
    checkpoint: str | Path | None = None,
    output: str | Path | None = None,
    trust: bool = False,
    force: bool = False,
    report: Report | None = None,
    **options: Any,
) -> Run:
    """Condition numbers of every block, with certificates.

    Args:
        task: Model, data and loss.
        checkpoint: Weights to load for the analysis; None takes the model's present ones.
        output: HDF5 file to write; None writes none. An identical finished run there is
            returned as it is.
        trust: Allow a checkpoint that is a pickled module, which runs code when it is loaded.
        force: Overwrite a different run at ``output``.
        report: Called with an :class:`Event` now and then.
        **options: Those of the command line, with underscores; see
            :class:`hessdiag.options.Options`.
    Returns:
        The run. The model is bit for bit what it was.
    Raises:
        HessdiagError: One of the tree in :mod:`hessdiag.errors`, each with its remedy.
    Cost:
        n products for a block of n ≤ ``exact_limit`` parameters (the whole network's serve all
        its layers), at most ``steps`` for a larger one; about 14 products of self-checks and 8
        per block for its noise.
    """
    if not isinstance(task, Task):
        raise OptionError(f"analyze needs a hessdiag.Task, not {type(task).__name__}")
    chosen = make_options(**options)
    source = read_checkpoint(Path(checkpoint), trust=trust) if checkpoint is not None else None
    analysis = Analysis(task, chosen, source, report or _silent)
    run = analysis.run(Path(output) if output is not None else None, force=force)
    if output is not None and not analysis.reprinted:
        run.save(output, force=force)
    return run


@dataclass
class Analysis:
    """One run in the making."""

    task: Task
    options: Options
    checkpoint: Checkpoint | None
    report: Report
    warnings: list[str] = field(default_factory=list)
    engines: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    reprinted: bool = False

    def run(self, output: Path | None, *, force: bool) -> Run:
        """Everything between the loan of the model and its return."""
        options = self.options
        model = bare(self.task.model)
        blocks = find_blocks(model, options.blocks)
        device = pick_device(options.device)
        dtype = torch.float64 if options.dtype == "float64" else torch.float32
        optimizer = self._optimizer_state(model)
        with (
            loan([model], mode=self.task.mode, dtype=dtype, device=device),
            exact_arithmetic([model], dtype) as switches,
        ):
            self._load_weights(model)
            count = units(self.task)
            batches = load_batches(
                self.task.data,
                count,
                dtype=dtype,
                device=device,
                batch_size=options.batch_size,
                max_examples=options.max_examples,
                seed=options.seed,
                order_matters=self.task.mode == "train" and has_batch_statistics(model),
            )
            self.warnings += batches.notices
            objective = Objective(model, as_loss(self.task), batches)
            network = Network(model, objective, options, self.report)
            if self.task.mode == "train" and has_batch_statistics(model) and len(batches.items) > 1:
                self.warnings.append(
                    f"BatchNorm in train mode: the loss is the mean over these "
                    f"{len(batches.items)} batches, each normalised by its own statistics"
                )
            weights = hash_tensors({**network.named, **dict(model.named_buffers())})
            loss = objective.value()
            fingerprint = make_fingerprint(
                self.task, weights, batches, optimizer, loss, device.type, options
            )
            stored = _stored_run(output, fingerprint, force=force)
            if stored is not None:
                self.reprinted = True
                return stored
            wanted = [block for block in blocks if block.skipped is None]
            names = list(dict.fromkeys(name for block in wanted for name in block.parameters))
            self.report(Event(message="self-checks"))
            checks = run_selfchecks(
                objective, network.select(names), curvature=options.curvature, seed=options.seed
            )
            self.warnings += checks.notices
            parts = halves(batches, count) if options.max_examples is not None else None
            network.prepare(loss, checks, [Objective(model, objective.loss, p) for p in parts or ()])
            results = tuple(self._rows(network, blocks))
            record = environment(
                device, switches, checks.to_json(), self.engines, self.timings, self.failed
            )
        return Run(
            blocks=results,
            variants=options.variants,
            provenance=Provenance(
                config=self._config(str(device)),
                environment=record,
                fingerprint=fingerprint,
                warnings=self.warnings,
            ),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            hessdiag_version=hessdiag.__version__,
        )

    def _config(self, device: str) -> dict[str, Any]:
        options = self.options
        config = {name: getattr(options, name) for name in options.__dataclass_fields__}
        return config | {
            "task": self.task.name or type(bare(self.task.model)).__name__,
            "checkpoint": self.checkpoint.path.name if self.checkpoint else None,
            "mode": self.task.mode,
            "device": device,
            "variants": list(options.variants),
            "blocks": list(options.blocks),
        }

    def _optimizer_state(self, model: nn.Module) -> OptimizerState | None:
        if self.checkpoint is None or self.checkpoint.optimizer is None:
            return None
        state = map_optimizer(self.checkpoint.optimizer, model, self.task.optimizer)
        if state.unmappable:
            self.warnings.append(f"optimizer state is not used: {state.unmappable}")
        return state

    def _load_weights(self, model: nn.Module) -> None:
        if self.checkpoint is None:
            broken = [
                name
                for name, tensor in model.state_dict().items()
                if isinstance(tensor, Tensor)
                and tensor.is_floating_point()
                and not bool(torch.isfinite(tensor).all())
            ]
            if broken:
                raise InputError(
                    f"the model holds NaN or infinity in {', '.join(map(clean_name, broken[:8]))}; "
                    "its curvature means nothing"
                )
            return
        matched = match_weights(self.checkpoint, model)
        self.warnings += [*self.checkpoint.notices, *matched.notices]
        model.load_state_dict(matched.weights, strict=False)

    def _rows(self, network: Network, blocks: list[Block]) -> Iterator[BlockResult]:
        """The blocks' rows; the whole network is solved first, for its matrix serves all."""
        order = sorted(range(len(blocks)), key=lambda i: (blocks[i].name != WHOLE, i))
        done: dict[int, BlockResult] = {}
        for position, index in enumerate(order):
            block = blocks[index]
            started = time.perf_counter()
            result = self._row(network, block, position + 1, len(blocks))
            self.timings[block.name] = time.perf_counter() - started
            done[index] = BlockResult(block.name, block.parameters, {"raw": result})
        network.matrix = None
        return iter([done[index] for index in range(len(blocks))])

    def _row(self, network: Network, block: Block, index: int, count: int) -> VariantResult:
        started = time.perf_counter()
        fixed: dict[str, Value] = {
            "size": block.size,
            "skipped": block.skipped,
            "same_function": True,
            "dtype": self.options.dtype,
            "products": 0,
            "seconds": 0.0,
            "half_ratio": Quantity.absent(),
            "diagonal_gap": Quantity.absent(),
            "source": None,
            "optimizer_class": None,
            "zero_state": 0,
            "symmetries": [],
            "off_diagonality": None,
        }
        if block.skipped is not None:
            return VariantResult(skipped_fields() | fixed)
        try:
            solved, products = network.solve(block, index, count, self.engines)
        except (HessdiagError, ArithmeticError, RuntimeError, MemoryError) as error:
            self.failed.append(block.name)
            reason = f"failed: {type(error).__name__}: {error}"
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                reason = "failed: out of memory; lower --exact-limit or --memory-budget"
            return VariantResult(skipped_fields() | fixed | {"skipped": reason})
        fixed["products"] = products
        fixed["half_ratio"] = network.half_ratio(block)
        fixed["seconds"] = time.perf_counter() - started
        return VariantResult(fixed | solved.values, solved.spectrum, solved.rows)


class Network:
    """The model on loan, and what all its blocks share."""

    def __init__(
        self, model: nn.Module, objective: Objective, options: Options, report: Report
    ) -> None:
        self.objective = objective
        self.options = options
        self.report = report
        self.named: dict[str, nn.Parameter] = dict(named_parameters(model))
        self.matrix: tuple[Tensor, dict[str, slice]] | None = None
        self.halves: list[Objective] = []
        self.loss = 0.0
        self.narrow = False

    def select(self, names: list[str] | tuple[str, ...]) -> list[nn.Parameter]:
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
        """One block: exact where it fits, else by Lanczos; with the products it took."""
        options = self.options
        parameters = self.select(block.parameters)
        like = parameters[0].data
        limit = EXACT_LIMIT[like.device.type] if options.exact_limit is None else options.exact_limit
        engine: Engine | None = None
        cut = self._cut(block)

        def product(vector: Vector) -> Vector:
            nonlocal engine
            if engine is None:
                engine = make_engine(
                    self.objective,
                    parameters,
                    curvature=options.curvature,
                    engine=options.engine,
                    memory_budget=options.memory_budget,
                )
                engines[block.name] = engine.name
            return engine(vector)

        problem = self._problem(block, parameters, product if cut is None else None, cut)
        if cut is not None:
            engines[block.name] = "cut from whole"
            solved = solve_exact(cut, problem)
            return self._certified(solved, ["its matrix is a part of whole's"]), 0
        watched = self._watched(product, block, index, count, min(block.size, limit) or options.steps)
        if block.size <= limit:
            found = assemble(watched, block.size, dtype=like.dtype, device=like.device)
            if block.name == WHOLE:
                self.matrix = (found.matrix, self._slices(block))
            engine = None
            return self._certified(solve_exact(found.matrix, problem), []), found.matvecs
        solved, matvecs = solve_lanczos(watched, problem, steps=options.steps)
        return self._certified(solved, []), matvecs

    def _problem(
        self, block: Block, parameters: list[nn.Parameter], product: Matvec | None, cut: Tensor | None
    ) -> Problem:
        options = self.options
        error = noise_of(self.objective, parameters, options.curvature, narrow=self.narrow)
        gradient = self.objective.gradient(parameters)
        wrong = gradient_noise(self.objective, parameters, narrow=self.narrow)
        if product is None:
            matrix = cut

            def product(vector: Vector) -> Vector:
                if matrix is None:
                    raise ValueError("a block is given by its product or by its matrix")
                return (matrix @ vector.to(matrix)).to(vector)

        noise = measure_noise(
            error,
            product,
            gradient,
            seed=options.seed,
            name=block.name,
            gradient=10 * float(wrong.norm()),
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

    def _certified(self, solved: Solved, notes: list[str]) -> Solved:
        values = solved.values
        own = values["notes"]
        values["notes"] = notes + (own if isinstance(own, list) else [])
        if self.narrow:
            values = never_exact(values)
        return Solved(values, solved.spectrum, solved.rows)

    def _slices(self, block: Block) -> dict[str, slice]:
        slices, start = {}, 0
        for name in block.parameters:
            end = start + self.named[name].numel()
            slices[name] = slice(start, end)
            start = end
        return slices

    def _cut(self, block: Block) -> Tensor | None:
        """The block's part of the whole network's matrix, where that was assembled."""
        if self.matrix is None:
            return None
        matrix, slices = self.matrix
        index = torch.cat(
            [torch.arange(slices[n].start, slices[n].stop, device=matrix.device) for n in block.parameters]
        )
        return matrix[index][:, index]

    def _watched(
        self, product: Matvec, block: Block, index: int, count: int, total: int
    ) -> Matvec:
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

    def half_ratio(self, block: Block) -> Quantity:
        """λ_max on one half of the drawn examples over that on the other, by Lanczos."""
        if not self.halves:
            return Quantity.absent()
        parameters = self.select(block.parameters)
        tops = []
        for half in self.halves:
            engine = make_engine(
                half,
                parameters,
                curvature=self.options.curvature,
                engine=self.options.engine,
                memory_budget=self.options.memory_budget,
            )
            start = sphere(
                block.size,
                generator=generator(self.options.seed, block.name, "half ratio"),
                dtype=parameters[0].dtype,
                device=parameters[0].device,
            )
            shift = self.options.weight_decay
            run = lanczos(lambda v, e=engine: e(v) + shift * v, start, min(HALF_STEPS, block.size))
            tops.append(float(run.ritz().value[-1]))
        if tops[1] == 0:
            return Quantity.unresolved()
        return Quantity.estimate(tops[0] / tops[1])


def pick_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        have = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if torch.device(name).index not in (None, *range(have)) or have == 0:
            raise InputError(f"device {name} is not there ({have} CUDA devices); use --device cpu")
    return torch.device(name)


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether the model normalises over the batch when it is in train mode."""
    kinds = (nn.modules.batchnorm._BatchNorm,)
    return any(isinstance(module, kinds) for module in model.modules())


def _stored_run(output: Path | None, fingerprint: dict[str, Any], *, force: bool) -> Run | None:
    """The finished run at ``output`` when it is this one.

    Raises:
        StoreError: Something else is there, and ``force`` is not set.
    """
    if output is None or not output.exists():
        return None
    from hessdiag.store.read import read_run

    stored = read_run(output)
    if compare_fingerprints(stored.provenance.fingerprint, fingerprint, output, force=force):
        return stored
    return None
