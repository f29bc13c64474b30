"""``hessdiag demo``: a trained network to try everything on."""

from __future__ import annotations

import json as json_format
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from hessdiag_cli import console
from hessdiag_cli.console import Debug, Json, Quiet, Verbose

if TYPE_CHECKING:
    from hessdiag.demos import Trained


def demo(
    name: Annotated[
        str, Argument(metavar="NAME", help="mlp, convnet (BatchNorm) or transformer (LayerNorm).")
    ] = "mlp",
    output: Annotated[
        Path, Option("--output", "-o", metavar="DIR", help="Directory to write to.")
    ] = Path(),
    force: Annotated[bool, Option("--force", help="Replace the demo that lies there.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Train a small network on handwritten digits, in seconds, to try hessdiag on.

    Writes model.pt (weights, optimizer state, the task's name) and ten iterates/step-*.pt.

    Example: hessdiag demo && hessdiag analyze model.pt
    """
    from rich.console import Console
    from rich.progress import Progress

    from hessdiag.demos import train

    on_terminal = sys.stderr.isatty() and not quiet
    with Progress(console=Console(stderr=True), transient=True, disable=not on_terminal) as bar:
        line = bar.add_task("training", total=None)

        def follow(step: int, steps: int) -> None:
            bar.update(line, completed=step, total=steps)
            if step == 1 and not on_terminal:
                console.notice(f"training, {steps:,} steps", quiet=quiet)

        trained = train(name, output, force=force, progress=follow)
    if verbose:
        for path in trained.iterates:
            console.notice(f"wrote {path}", quiet=quiet)
    console.emit(_document(trained) if json else _sentences(trained))


def _document(trained: Trained) -> str:
    """The result as JSON."""
    return json_format.dumps(
        {
            "task": trained.task,
            "path": str(trained.path),
            "iterates": [str(path) for path in trained.iterates],
            "parameters": trained.parameters,
            "loss": trained.loss,
            "accuracy": trained.accuracy,
            "steps": trained.steps,
            "seconds": trained.seconds,
        },
        indent=2,
    )


def _sentences(trained: Trained) -> str:
    """The result for a reader, ending in the command to type next."""
    iterates = trained.iterates
    return (
        f"trained {trained.task}: {trained.parameters:,} parameters, {trained.steps:,} steps of "
        f"Adam on 1,797 handwritten digits, {trained.seconds:.1f} s\n"
        f"loss {trained.loss:.4g}, {trained.accuracy:.2%} of the digits right\n"
        f"wrote {trained.path} and {len(iterates)} iterates, "
        f"{iterates[0]} to {iterates[-1].name}\n"
        f"next: hessdiag analyze {shlex.quote(str(trained.path))}"
    )
