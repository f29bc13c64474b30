"""``hessdiag merge``: the shards of an analysis to one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from hessdiag_cli import console
from hessdiag_cli.analyze import EXIT_PARTIAL
from hessdiag_cli.console import Debug, Json, Quiet, Verbose


def merge(
    runs: Annotated[
        list[Path], Argument(metavar="RUN...", help="All shards of an analysis, in any order.")
    ],
    output: Annotated[Path, Option("--output", "-o", metavar="RUN", help="Run file to write.")],
    force: Annotated[bool, Option("--force", help="Overwrite a run at the output.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Join the shards that `analyze --shard I/N` wrote, and print the table of the whole run.

    Runs of one analysis under different --variants are joined, too. The result is what an
    analysis in one piece gives: the same `analyze` without --shard takes it for its own.

    Example: hessdiag merge model.shard-*.h5 -o model.h5
    """
    from hessdiag.merging import check_place, merge_runs
    from hessdiag.tables import summary_table

    check_place(output, runs, force=force)
    run = merge_runs(runs)
    run.save(output, force=force)
    if json:
        console.emit(run.to_json())
    else:
        console.emit(summary_table(run, width=console.width(), color=console.color()))
    origins = run.provenance.environment["shards"]
    if verbose:
        for origin in origins:
            blocks = ", ".join(origin["blocks"]) or "no blocks"
            console.notice(f"{origin['file']}: {blocks}", quiet=quiet)
    console.notice(f"{len(origins)} runs stored in {output}", quiet=quiet)
    if run.provenance.environment.get("failed"):
        raise typer.Exit(EXIT_PARTIAL)
