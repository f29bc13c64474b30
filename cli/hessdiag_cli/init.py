"""``hessdiag init``: a task file to start from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

from typer import Option

from hessdiag_cli import console
from hessdiag_cli.console import Debug, Quiet, Verbose


def init(
    output: Annotated[Path, Option("--output", "-o", help="File to write.", metavar="FILE")] = Path(
        "hessdiag_task.py"
    ),
    force: Annotated[bool, Option("--force", help="Replace the file if it exists.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a commented task, which works as it is and shows where your own parts go.

    Example: hessdiag init
    """
    from hessdiag.errors import InputError

    template = files("hessdiag_cli") / "templates" / "hessdiag_task.py.txt"
    text = template.read_text(encoding="utf-8")
    try:
        with output.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InputError(
            f"{output} exists already; add --force to replace it, or -o FILE to write another"
        ) from error
    except OSError as error:
        raise InputError(
            f"{output} cannot be written: {error.strerror}; choose another -o"
        ) from error
    console.emit(str(output))
    console.notice(
        f"wrote {output}; put your network, data and loss into it, then: hessdiag analyze CKPT"
        + ("" if output == Path("hessdiag_task.py") else f" --task {output}"),
        quiet=quiet,
    )
