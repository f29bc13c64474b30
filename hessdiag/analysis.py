"""The pipeline that ``analyze`` runs: a task and options in, a run out."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
from hessdiag.curvature.loan import bare, exact_arithmetic, loan
from hessdiag.curvature.objective import Objective
from hessdiag.data import halves, load_batches
from hessdiag.errors import HessdiagError, InputError, OptionError, is_out_of_memory
from hessdiag.fingerprint import check_same, hash_tensors, make_fingerprint
from hessdiag.names import clean_name
from hessdiag.network import Network
from hessdiag.options import Options, make_options
from hessdiag.progress import Event, Report
from hessdiag.provenance import environment
from hessdiag.quantity import Quantity
from hessdiag.run import BlockResult, Provenance, Run, Value, VariantResult
from hessdiag.selfcheck import run_selfchecks
from hessdiag.solve import skipped_fields
from hessdiag.store.read import is_run, read_run
from hessdiag.store.write import check_target
from hessdiag.task import Task, as_loss, units

# What a block may die of without taking the others along.
FAILURES = (HessdiagError, ArithmeticError, ValueError, RuntimeError, MemoryError)


def _silent(_event: Event) -> None:
    return None


def analyze(
    task: Task,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    output: str | Path | None = None,
    trust: bool = False,
    force: bool = False,
    report: Report | None = None,
    **options: Any,
) -> Run:
    """Condition numbers of every block, with certificates.

    Args:
        task: Model, data and loss.
        checkpoint: File (or one already read) whose weights are loaded for the analysis; None
            takes the model's present ones.
        output: HDF5 file to write; None writes none. An identical finished run there is
            returned as it is.
        trust: Allow a checkpoint that is a pickled module, which runs code when it is loaded.
        force: Analyse again, and overwrite the run at ``output``.
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
    if isinstance(checkpoint, (str, Path)):
        checkpoint = read_checkpoint(checkpoint, trust=trust)
    if output is not None:
        # A run that is there may be this very one, so only what can never be written is refused.
        check_target(output, force=True)
    analysis = Analysis(task, chosen, checkpoint, report or _silent)
    run = analysis.run(Path(output) if output is not None else None, force=force)
    if output is not None and not analysis.reprinted:
        run.save(output, force=force or analysis.redone)
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
    redone: bool = False

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
                order_matters=has_batch_statistics(model),
            )
            self.warnings += batches.notices
            objective = Objective(model, as_loss(self.task), batches)
            network = Network(model, objective, options, self.report)
            if has_batch_statistics(model) and len(batches.items) > 1:
                self.warnings.append(
                    f"BatchNorm uses the statistics of the batch: the loss is the mean over these "
                    f"{len(batches.items)} batches, each normalised by its own"
                )
            weights = hash_tensors({**network.named, **dict(model.named_buffers())})
            loss = objective.value()
            fingerprint = make_fingerprint(
                self.task, weights, batches, optimizer, loss, device.type, options
            )
            stored = _stored_run(output, fingerprint, force=force)
            if stored is not None and not stored.provenance.environment.get("failed"):
                self.reprinted = True
                return stored
            # The same analysis with blocks that failed is not complete: it is done again.
            self.redone = stored is not None
            wanted = [block for block in blocks if block.skipped is None]
            names = list(dict.fromkeys(name for block in wanted for name in block.parameters))
            self.report(Event(message="self-checks"))
            checks = run_selfchecks(
                objective, network.select(names), curvature=options.curvature, seed=options.seed
            )
            self.warnings += checks.notices
            parts = halves(batches, count) if options.max_examples is not None else None
            network.prepare(
                loss, checks, [Objective(model, objective.loss, p) for p in parts or ()]
            )
            results = tuple(self._rows(network, blocks))
            record = environment(
                device, switches, checks.to_json(), self.engines, self.timings, self.failed
            )
            record["optimizer"] = _optimizer_record(optimizer)
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
        except FAILURES as error:
            self.failed.append(block.name)
            reason = " ".join(f"failed: {type(error).__name__}: {error}".split())
            if is_out_of_memory(error):
                reason = "failed: out of memory; lower --exact-limit or --memory-budget"
            return VariantResult(skipped_fields() | fixed | {"skipped": reason})
        try:
            fixed["half_ratio"] = network.half_ratio(block, solved)
        except FAILURES as error:
            fixed["half_ratio"] = Quantity.unresolved()
            self.warnings.append(f"half_ratio of {block.name} failed: {error}")
        fixed["products"] = products
        fixed["seconds"] = time.perf_counter() - started
        return VariantResult(fixed | solved.values, solved.spectrum, solved.rows)


def _optimizer_record(state: OptimizerState | None) -> dict[str, Any] | None:
    """What the checkpoint's optimizer state is and how it was mapped to parameters."""
    if state is None:
        return None
    return {
        "class": state.class_name,
        "mapped_by": state.mapped_by,
        "unmappable": state.unmappable,
        "parameters": len(state.state),
    }


def pick_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and len(name) > len("cuda:") + 4:
        raise InputError(f"device {name} is not there; use --device cpu")
    if name.startswith("cuda"):
        have = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if torch.device(name).index not in (None, *range(have)) or have == 0:
            raise InputError(f"device {name} is not there ({have} CUDA devices); use --device cpu")
    return torch.device(name)


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether the model, in its present mode, normalises by the statistics of the batch."""
    kinds = (nn.modules.batchnorm._BatchNorm,)
    return any(
        isinstance(module, kinds) and (module.training or module.running_mean is None)
        for module in model.modules()
    )


def _stored_run(output: Path | None, fingerprint: dict[str, Any], *, force: bool) -> Run | None:
    """The finished run at ``output`` when it is this one; None to analyse.

    Raises:
        StoreError: Another analysis is there, and ``force`` is not set.
    """
    if output is None or force or not is_run(output):
        return None
    stored = read_run(output)
    check_same(stored.provenance.fingerprint, fingerprint, output)
    return stored
