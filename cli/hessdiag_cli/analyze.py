"""``hessdiag analyze``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from hessdiag_cli import console
from hessdiag_cli.console import Debug, Json, Quiet, Verbose

EXIT_PARTIAL = 4


def analyze(
    checkpoint: Annotated[Path, Argument(metavar="CKPT", help="Checkpoint to analyse.")],
    task: Annotated[
        str | None, Option(metavar="TASK", help="FILE.py[:NAME], pkg.mod[:NAME] or demo:NAME.")
    ] = None,
    task_arg: Annotated[
        list[str] | None,
        Option(metavar="KEY=VALUE", help="key=value for the task function; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="Run file; default <stem>.h5 here.")
    ] = None,
    trust: Annotated[
        bool, Option("--trust", help="Load a pickled module, which runs its code.")
    ] = False,
    force: Annotated[bool, Option("--force", help="Overwrite another run at the output.")] = False,
    variants: Annotated[
        str, Option(help="Views of the problem, comma-separated; this release knows raw.")
    ] = "raw",
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
        Option(metavar="lanczos|power", help="lanczos, or power (two vectors of memory)."),
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
    engine: Annotated[
        str, Option(metavar="auto|kept|recompute", help="auto, kept or recompute.")
    ] = "auto",
    memory_budget: Annotated[
        str | None, Option(help="For kept graphs, such as 8G (default: half of what is free).")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Condition numbers of every layer of CKPT, with certificates; stored in an HDF5 file.

    Example: hessdiag analyze model.pt --task train.py:task --max-examples 1000
    """
    from hessdiag.analysis import analyze as run_analysis
    from hessdiag.checkpoint import read_checkpoint
    from hessdiag.options import make_options
    from hessdiag.tables import summary_table
    from hessdiag_cli.progress import progress
    from hessdiag_cli.resolution import find_task

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
        "engine": engine,
        "memory_budget": memory_budget,
    }
    make_options(**options)
    path = Path(f"{checkpoint.stem}.h5") if output is None else output
    source = read_checkpoint(checkpoint, trust=trust)
    found = find_task(source, task, task_arg or [])
    console.notice(f"task {found.reference} ({found.source})", quiet=quiet)
    with progress(quiet=quiet) as report:
        run = run_analysis(
            found.load(),
            checkpoint=source,
            output=path,
            force=force,
            report=report,
            **options,
        )
    for warning in run.provenance.warnings:
        console.notice(f"notice: {warning}", quiet=quiet)
    if verbose:
        console.notice(f"engines: {run.provenance.environment.get('engine')}", quiet=quiet)
    console.emit(
        run.to_json() if json else summary_table(run, width=console.width(), color=console.color())
    )
    console.notice(f"stored in {path}", quiet=quiet)
    if run.provenance.environment.get("failed"):
        raise typer.Exit(EXIT_PARTIAL)
