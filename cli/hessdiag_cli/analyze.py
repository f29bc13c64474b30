"""``hessdiag analyze``: the main job."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from hessdiag_cli import console
from hessdiag_cli.console import Debug, Json, Quiet, Verbose
from hessdiag_cli.ranks import together
from hessdiag_cli.several import Job, Tasks, check_all, kept, plan

if TYPE_CHECKING:
    from hessdiag.run import Run

EXIT_PARTIAL = 4


def analyze(
    checkpoint: Annotated[
        list[Path],
        Argument(metavar="CKPT...", help="Checkpoint to analyse; several get a run file each."),
    ],
    task: Annotated[
        str | None, Option(metavar="TASK", help="FILE.py[:NAME], pkg.mod[:NAME] or demo:NAME.")
    ] = None,
    task_arg: Annotated[
        list[str] | None,
        Option(metavar="KEY=VALUE", help="key=value for the task function; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None,
        Option(
            "--output", "-o", help="Run file (of several: their folder); default <stem>.h5 here."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        Option(metavar="FILE", help="Tokens for a Hugging Face directory: .npy, .pt or .txt."),
    ] = None,
    trust: Annotated[
        bool, Option("--trust", help="Load a pickled module, which runs its code.")
    ] = False,
    force: Annotated[bool, Option("--force", help="Overwrite another run at the output.")] = False,
    variants: Annotated[
        str | None,
        Option(
            help="Views of the problem, comma-separated: network, coordinates or "
            "network+coordinates (default: raw,optimizer,bnp)."
        ),
    ] = None,
    blocks: Annotated[
        str, Option(help="layer, parameter, whole, GLOB or NAME=GLOB, comma-separated.")
    ] = "layer",
    curvature: Annotated[
        str, Option(metavar="hessian|ggn", help="hessian or ggn (Gauss–Newton).")
    ] = "hessian",
    exact_limit: Annotated[
        int | None,
        Option(help="Largest block solved exactly (default: 4096, on CUDA 16384; 0: never)."),
    ] = None,
    steps: Annotated[
        int, Option(help="Most products for the ends of a larger block's spectrum.")
    ] = 40,
    probes: Annotated[
        int, Option(help="Random probes of a larger block: trace, diagonal, row norms (0: none).")
    ] = 20,
    density: Annotated[
        bool, Option("--density", help="Spectral density of larger blocks: 600 more products each.")
    ] = False,
    tolerance: Annotated[
        float, Option(help="Certified width of λ_max and λ_min, relative to ‖H‖, that will do.")
    ] = 1e-3,
    eigensolver: Annotated[
        str,
        Option(metavar="lanczos|power", help="lanczos, or power (ten vectors of memory)."),
    ] = "lanczos",
    max_seconds: Annotated[
        float | None, Option(help="End after S seconds with what is certified by then.")
    ] = None,
    device: Annotated[str, Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, Option(metavar="float64|float32", help="float64 or float32.")
    ] = "float64",
    seed: Annotated[int, Option(help="Of random vectors and of the drawn subset.")] = 0,
    batch_size: Annotated[int | None, Option(help="Cut the data into batches of N rows.")] = None,
    max_examples: Annotated[int | None, Option(help="Analyse N rows, drawn with the seed.")] = None,
    weight_decay: Annotated[float, Option(help="λ added to the Hessian's diagonal.")] = 0.0,
    damping: Annotated[float | None, Option(help="Absolute μ of kappa_damped.")] = None,
    iterates: Annotated[
        str | None,
        Option(metavar="GLOB", help="Checkpoints along a training: cosines, replayed optimizers."),
    ] = None,
    reference: Annotated[
        str | None,
        Option(metavar="CKPT", help="Point p* of the cosines (default: the analysed one)."),
    ] = None,
    engine: Annotated[
        str,
        Option(
            metavar="auto|kept|linearized|recompute|difference",
            help="How a product is computed; difference: for models without double backward.",
        ),
    ] = "auto",
    memory_budget: Annotated[
        str | None, Option(help="For kept graphs, such as 8G (default: half of what is free).")
    ] = None,
    shard: Annotated[
        str | None,
        Option(metavar="I/N", help="Compute part I of N of the blocks only; `merge` joins them."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Condition numbers of every layer of CKPT, with certificates; stored in an HDF5 file.

    Several checkpoints give a run file each, and one table over training steps.

    Example: hessdiag analyze model.pt --task train.py:task --max-examples 1000
    """
    from hessdiag.options import make_options

    options: dict[str, Any] = {
        "variants": variants,
        "blocks": blocks,
        "curvature": curvature,
        "exact_limit": exact_limit,
        "steps": steps,
        "probes": probes,
        "density": density,
        "tolerance": tolerance,
        "eigensolver": eigensolver,
        "max_seconds": max_seconds,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "batch_size": batch_size,
        "max_examples": max_examples,
        "weight_decay": weight_decay,
        "damping": damping,
        "iterates": iterates,
        "reference": reference,
        "engine": engine,
        "memory_budget": memory_budget,
        "shard": shard,
    }
    chosen = make_options(**options)
    with together(device) as group:
        jobs = plan(checkpoint, output, chosen.shard)
        tasks = Tasks(task, task_arg or [], data)
        if len(jobs) > 1:
            with redirect_stdout(sys.stderr):
                check_all(jobs, tasks, trust=trust)
        runs: list[Run] = []
        told: set[str] = set()
        for position, job in enumerate(jobs):
            try:
                if len(jobs) > 1:
                    count = f"checkpoint {position + 1}/{len(jobs)}"
                    console.notice(f"{count}  {job.checkpoint}", quiet=quiet)
                shared = {**options, "group": group}
                runs.append(
                    _analyze(job, tasks, shared, trust=trust, force=force, quiet=quiet, told=told)
                )
            except BaseException as error:
                if len(jobs) > 1:
                    error.add_note(kept(jobs, position))
                raise
            if verbose:
                engines = runs[-1].provenance.environment.get("engine")
                console.notice(f"engines: {engines}", quiet=quiet)
            if len(jobs) > 1:
                console.notice(f"stored in {job.output}", quiet=quiet)
    console.emit(_printed(runs, json=json))
    if len(jobs) == 1:
        console.notice(f"stored in {jobs[0].output}", quiet=quiet)
    if any(run.provenance.environment.get("failed") for run in runs):
        raise typer.Exit(EXIT_PARTIAL)


def _analyze(
    job: Job,
    tasks: Tasks,
    options: Mapping[str, Any],
    *,
    trust: bool,
    force: bool,
    quiet: bool,
    told: set[str],
) -> Run:
    """One checkpoint to its run; notices that were ``told`` before are not told again."""
    from hessdiag.analysis import analyze as run_analysis
    from hessdiag.checkpoint import read_checkpoint
    from hessdiag_cli.progress import progress

    source = read_checkpoint(job.checkpoint, trust=trust)
    found = tasks.find(source)
    lines = [f"task {found.reference} ({found.source})"]
    _tell(lines, told, quiet=quiet)
    # What the user's code prints is no part of the result.
    with progress(quiet=quiet) as report, redirect_stdout(sys.stderr):
        run = run_analysis(
            tasks.load(found),
            checkpoint=source,
            output=job.output,
            force=force,
            report=report,
            **options,
        )
    _tell([f"notice: {warning}" for warning in run.provenance.warnings], told, quiet=quiet)
    return run


def _tell(lines: list[str], told: set[str], *, quiet: bool) -> None:
    for line in lines:
        if line not in told:
            told.add(line)
            console.notice(line, quiet=quiet)


def _printed(runs: list[Run], *, json: bool) -> str:
    """The document or the table: of one run, or of several over training steps."""
    from hessdiag.series import runs_json
    from hessdiag.tables import steps_table, summary_table

    if len(runs) == 1:
        run = runs[0]
        if json:
            return run.to_json()
        return summary_table(run, width=console.width(), color=console.color())
    if json:
        return runs_json(runs)
    return steps_table(runs, width=console.width(), color=console.color())
