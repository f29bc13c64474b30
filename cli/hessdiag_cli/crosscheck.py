"""``hessdiag crosscheck``: PyHessian's top eigenvalue and trace beside our certified ones."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from hessdiag_cli import console
from hessdiag_cli.console import Debug, Json, Quiet, Verbose


def crosscheck(
    checkpoint: Annotated[Path, Argument(metavar="CKPT", help="Checkpoint to check.")],
    task: Annotated[
        str | None, Option(help="FILE.py[:NAME], pkg.mod[:NAME] or demo:NAME.", metavar="TASK")
    ] = None,
    task_arg: Annotated[
        list[str] | None, Option(help="key=value for the task; repeatable.", metavar="KEY=VALUE")
    ] = None,
    data: Annotated[
        Path | None,
        Option(metavar="FILE", help="Tokens for a Hugging Face directory: .npy, .pt or .txt."),
    ] = None,
    trust: Annotated[
        bool, Option("--trust", help="Load a pickled module, which runs code from the file.")
    ] = False,
    curvature: Annotated[
        str, Option(metavar="hessian|ggn", help="hessian; PyHessian has no ggn.")
    ] = "hessian",
    exact_limit: Annotated[
        int | None,
        Option(help="Largest network whose every eigenvalue is found, too (0: never)."),
    ] = None,
    steps: Annotated[int, Option(help="Most products of our Lanczos and power iteration.")] = 100,
    probes: Annotated[int, Option(help="Random probes of our trace.")] = 20,
    tolerance: Annotated[
        float, Option(help="Certified width of λ_max and λ_min, relative to ‖H‖, that will do.")
    ] = 1e-3,
    device: Annotated[str, Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, Option(metavar="float64|float32", help="float64 or float32.")
    ] = "float64",
    seed: Annotated[int, Option(help="Of random vectors and of the drawn subset.")] = 0,
    batch_size: Annotated[int | None, Option(help="Cut the data into batches of N rows.")] = None,
    max_examples: Annotated[int | None, Option(help="Take N rows, drawn with the seed.")] = None,
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
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compare PyHessian with hessdiag on the whole network of CKPT, in one process.

    Top eigenvalue and trace by PyHessian and by our power iteration, beside our certified ones:
    value, certificate, deviation, products and seconds. Where PyHessian raises, its line says
    so, and the exit code is 0. Example: hessdiag crosscheck model.pt
    """
    from hessdiag.checkpoint import read_checkpoint
    from hessdiag.crosscheck import crosscheck as run_crosscheck
    from hessdiag.options import make_options
    from hessdiag.tables.crosscheck import crosscheck_table
    from hessdiag_cli.progress import progress
    from hessdiag_cli.resolution import find_task

    options: dict[str, Any] = {
        "curvature": curvature,
        "exact_limit": exact_limit,
        "steps": steps,
        "probes": probes,
        "tolerance": tolerance,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "batch_size": batch_size,
        "max_examples": max_examples,
        "engine": engine,
        "memory_budget": memory_budget,
    }
    make_options(**options)
    source = read_checkpoint(checkpoint, trust=trust)
    resolved = find_task(source, task, task_arg or [], data)
    console.notice(f"task {resolved.reference} ({resolved.source})", quiet=quiet)
    # What the user's code prints is no part of the result.
    with progress(quiet=quiet) as report, redirect_stdout(sys.stderr):
        found = run_crosscheck(resolved.load(), source, trust=trust, report=report, **options)
    if json:
        import json as encoder

        console.emit(encoder.dumps(found.to_dict(), ensure_ascii=False, allow_nan=False))
        return
    console.emit(crosscheck_table(found, width=console.width(), color=console.color()))
