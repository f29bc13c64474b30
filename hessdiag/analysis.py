"""The pipeline that ``analyze`` runs: a task and options in, a run out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hessdiag
from hessdiag.along import cosines_at, find_trajectory
from hessdiag.backoff import fitting
from hessdiag.blocks import WHOLE, find_blocks
from hessdiag.checkpoint import Checkpoint, match_weights, read_checkpoint
from hessdiag.checkpoint.optimizer import OptimizerState, map_optimizer
from hessdiag.curvature.loan import bare, exact_arithmetic, has_batch_statistics, loan
from hessdiag.curvature.objective import Objective
from hessdiag.data import halves, load_batches
from hessdiag.distributed import Alone, Group
from hessdiag.distributed.stored import begin_together
from hessdiag.errors import InputError, OptionError
from hessdiag.explained import Explained
from hessdiag.fingerprint import hash_tensors, make_fingerprint
from hessdiag.names import clean_name
from hessdiag.network import Network
from hessdiag.options import DEFAULT_VARIANTS, Options, make_options, with_variants
from hessdiag.progress import Event, Report
from hessdiag.provenance import environment
from hessdiag.resume import Begun, begin, now, tell_left
from hessdiag.rows import Rows
from hessdiag.run import Provenance, Run
from hessdiag.selfcheck import run_selfchecks
from hessdiag.sharding import share_of
from hessdiag.stages import compute_stages
from hessdiag.store.folder import check_folder
from hessdiag.store.write import check_target
from hessdiag.task import Task, Units, as_loss, units
from hessdiag.variants.decay import trained_decoupled
from hessdiag.variants.grammar import RAW
from hessdiag.variants.optimizers import NO_FIXED_M

NO_STATE = (
    "the checkpoint holds no optimizer state, so the variant optimizer is left out; "
    "--variants raw,adam,bnp replays Adam's M from gradients"
)


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
    group: Group | None = None,
    **options: Any,
) -> Run:
    """Condition numbers of every block, with certificates.

    Args:
        task: Model, data and loss.
        checkpoint: File (or one already read) whose weights are loaded for the analysis; None
            takes the model's present ones.
        output: HDF5 file to write; None writes none. An identical finished run there is
            returned as it is; an unfinished one goes on after its finished blocks.
        trust: Allow a checkpoint that is a pickled module, which runs code when it is loaded.
        force: Analyse again, and overwrite the run at ``output``. An unfinished analysis is begun
            anew, unless it is the same and was begun with ``force`` too.
        report: Called with an :class:`Event` now and then.
        group: The processes that share the data, as :func:`hessdiag.distributed.launch.joined`
            yields them: each calls this with the same arguments, rank 0 reads and writes
            ``output``, and all return the run. None for this process alone.
        **options: Those of the command line, with underscores; see
            :class:`hessdiag.options.Options`.
    Returns:
        The run. The model is bit for bit what it was.
    Raises:
        HessdiagError: One of the tree in :mod:`hessdiag.errors`, each with its remedy. Whatever
            ends the analysis, KeyboardInterrupt too, finished blocks are kept at ``output``, and
            a note of the exception says so.
    Cost:
        n products for a block of n ≤ ``exact_limit`` parameters (the whole network's serve all
        its layers, and a change of parameters takes no more); at most ``steps`` + 20 +
        ``probes`` for a larger one and each of its variants, 600 more with ``density``, 20 on
        each half of the data with ``max_examples``. A change of the network costs all that
        again. About 14 products of self-checks, 8 per row for its noise, and some for
        symmetries; a pass over the data for H_e of each variant that changes it, and a
        backward pass per neuron of a Linear layer; a product and a gradient per iterate.
    """
    if not isinstance(task, Task):
        raise OptionError(f"analyze needs a hessdiag.Task, not {type(task).__name__}")
    chosen = make_options(**options)
    if isinstance(checkpoint, (str, Path)):
        checkpoint = read_checkpoint(checkpoint, trust=trust)
    target = None if output is None else Path(output)
    if target is not None:
        # A run that is there may be this very one, so only what can never be written is refused.
        (group or Alone()).first(lambda: _check_output(target))
    analysis = Analysis(task, chosen, checkpoint, report or _silent, trust, group or Alone())
    try:
        return analysis.run(target, force=force)
    except BaseException as error:
        analysis.note_kept(error)
        raise
    finally:
        analysis.release()


def _check_output(target: Path) -> None:
    check_target(target, force=True)
    check_folder(target)


@dataclass
class Analysis:
    """One run in the making."""

    task: Task
    options: Options
    checkpoint: Checkpoint | None
    report: Report
    trust: bool = False
    group: Group = field(default_factory=Alone)
    warnings: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    begun: Begun | None = None

    def run(self, output: Path | None, *, force: bool) -> Run:
        """The stored run, or a new one, which is stored block by block."""
        found, rows = self._on_loan(output, force=force)
        if output is not None and rows is not None and rows.journal is not None:
            left = rows.journal.finish(
                found,
                force=self.begun is not None and self.begun.replace,
                keep_matrix=bool(rows.failed),
            )
            tell_left(self.report, output, left)
        return found

    def note_kept(self, error: BaseException) -> None:
        """Tell in a note of ``error`` that finished blocks are kept, where there are any."""
        kept = self.begun.journal.kept() if self.begun and self.begun.journal else None
        if kept:
            error.add_note(kept)

    def release(self) -> None:
        """Let another process write to the same output."""
        if self.begun is not None and self.begun.journal is not None:
            self.begun.journal.release()

    def _on_loan(self, output: Path | None, *, force: bool) -> tuple[Run, Rows | None]:
        """Everything between the loan of the model and its return."""
        model = bare(self.task.model)
        blocks = find_blocks(model, self.options.blocks)
        whole = find_blocks(model, (WHOLE,))[0]
        optimizer = self._optimizer_state(model)
        given = self.options
        options = self.options = with_variants(given, has_state=optimizer is not None)
        if options.variants != DEFAULT_VARIANTS and given.variants is None:
            self.warnings.append(NO_STATE)
        listed = options.variants or (RAW,)
        device = pick_device(options.device)
        dtype = torch.float64 if options.dtype == "float64" else torch.float32
        with (
            loan([model], mode=self.task.mode, dtype=dtype, device=device),
            exact_arithmetic([model], dtype) as switches,
        ):
            count = units(self.task)
            network = self._network(model, count, dtype, device)
            objective, batches = network.objective, network.objective.batches
            weights = hash_tensors({**network.named, **dict(model.named_buffers())})
            trajectory = find_trajectory(options, model, trust=self.trust)
            loss = objective.value()
            share = share_of(blocks, options, device.type, rows=batches.rows, total=whole.size)
            wanted = [block for block in share.blocks if block.skipped is None]
            constrained = network.constrained(wanted)
            fingerprint = (
                make_fingerprint(
                    self.task, weights, batches, optimizer, loss, device.type, options, constrained
                )
                | trajectory.fingerprint
            )
            config = self._config(str(device))
            self.group.same(fingerprint)
            self.begun = begin_together(
                self.group,
                lambda: begin(
                    output, fingerprint, config, wanted, options, self.report, force=force
                ),
            )
            if self.begun.run is not None:
                return self.begun.run, None
            # All blocks, whoever computes them: so every shard finds the same.
            names = list(dict.fromkeys(name for block in blocks for name in block.parameters))
            self.report(Event(message="self-checks"))
            checks = run_selfchecks(
                fitting(network),
                network.select(names),
                curvature=options.curvature,
                seed=options.seed,
                engine=options.engine,
            )
            self.warnings += checks.notices
            parts = halves(batches, count) if options.max_examples is not None else None
            network.prepare(
                loss, checks, [replace(objective, batches=part) for part in parts or ()]
            )
            if options.max_seconds is not None:
                network.deadline = self.started + options.max_seconds
            rows = Rows(
                self.begun.finished,
                self.begun.journal,
                optimizer=optimizer,
                iterates=trajectory.readers(model),
                max_seconds=options.max_seconds,
                count=len(wanted) * len(listed),
            )
            explained = Explained(blocks, by_layer="layer" in options.blocks, share=share)
            self.warnings += compute_stages(rows, network, share, explained, count)
            along: dict[str, Any] = {}
            if trajectory.iterates and share.leads:
                along, told = cosines_at(network, trajectory, whole, rows)
                self.warnings += told
            record = environment(
                device,
                switches,
                checks.to_json(),
                rows.engines,
                rows.engine_timings,
                rows.timings,
                rows.failed,
            )
            record |= {
                "optimizer": _optimizer_record(optimizer),
                "hidden": explained.reasons,
                "symmetry_products": rows.symmetry_products,
                "limited": rows.limited,
                "blocks": [block.name for block in blocks],
                "distributed": objective.distributed(),
            }
        run = Run(
            blocks=rows.results(share.blocks, listed),
            variants=listed,
            provenance=Provenance(
                config=config,
                environment=record,
                fingerprint=fingerprint,
                warnings=self.warnings,
            ),
            created_at=now(),
            hessdiag_version=hessdiag.__version__,
            hidden=explained.results,
            cosines=along,
        )
        return run, rows

    def _network(
        self, model: nn.Module, count: Units, dtype: torch.dtype, device: torch.device
    ) -> Network:
        """The network, on loan, with the weights and the data of the analysis."""
        options = self.options
        self._load_weights(model)
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
        self.warnings += [*self.task.notices, *batches.notices]
        objective = Objective(model, as_loss(self.task), batches, self.group, count)
        if has_batch_statistics(model) and len(batches.items) > 1:
            self.warnings.append(
                f"BatchNorm uses the statistics of the batch: the loss is the mean over these "
                f"{len(batches.items)} batches, each normalised by its own"
            )
        self.warnings += objective.shared_unevenly()
        return Network(objective, options, self.report)

    def _config(self, device: str) -> dict[str, Any]:
        options = self.options
        config = {name: getattr(options, name) for name in options.__dataclass_fields__}
        return config | {
            "task": self.task.name or type(bare(self.task.model)).__name__,
            "checkpoint": self.checkpoint.path.name if self.checkpoint else None,
            "step": self.checkpoint.step if self.checkpoint else None,
            "mode": self.task.mode,
            "device": device,
            "variants": list(options.variants or ()),
            "blocks": list(options.blocks),
        }

    def _optimizer_state(self, model: nn.Module) -> OptimizerState | None:
        if self.checkpoint is None or self.checkpoint.optimizer is None:
            return None
        state = map_optimizer(self.checkpoint.optimizer, model, self.task.optimizer)
        # Of a class without an M nothing would be read, however it was mapped.
        if state.unmappable and state.class_name not in NO_FIXED_M:
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


def _optimizer_record(state: OptimizerState | None) -> dict[str, Any] | None:
    """What the checkpoint's optimizer state is and how it was mapped to parameters."""
    if state is None:
        return None
    return {
        "class": state.class_name,
        "decoupled": trained_decoupled(state),
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
