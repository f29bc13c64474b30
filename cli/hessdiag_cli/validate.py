"""``hessdiag validate``: a run file against the format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from hessdiag_cli import console
from hessdiag_cli.console import Debug, Json, Quiet, Verbose


def validate(
    run: Annotated[Path, Argument(metavar="RUN", help="A run file, as `analyze` writes it.")],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Check that a run file keeps to the format, and its numbers to each other.

    Example: hessdiag validate model.h5
    """
    from hessdiag.errors import StoreError
    from hessdiag.plain import printable
    from hessdiag.store import is_unfinished, open_run, validate_run
    from hessdiag.store.schema import FORMAT, VERSION

    unfinished = is_unfinished(run)
    problems = validate_run(run)
    found = None if problems else open_run(run)
    if json:
        import json as encoder

        document = {
            "file": str(run),
            "valid": not problems,
            "format": FORMAT,
            "version": VERSION,
            "blocks": None if found is None else len(found.blocks),
            "variants": None if found is None else len(found.variants),
            "unfinished": unfinished,
            "problems": problems,
        }
        console.emit(encoder.dumps(document, ensure_ascii=False))
    elif found is not None:
        blocks, variants = len(found.blocks), len(found.variants)
        console.emit(
            f"valid {FORMAT} {VERSION}: {blocks} block{'s' * (blocks != 1)}, "
            f"{variants} variant{'s' * (variants != 1)}"
            f"{'; unfinished: the same analyze resumes' * unfinished}"
        )
    else:
        console.emit("\n".join(map(printable, problems)))
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) != 1)}"
        raise StoreError(
            f"{run} does not keep to {FORMAT} {VERSION}: {count}; "
            f"analyse the checkpoint again, or ask whoever changed the file"
        )
