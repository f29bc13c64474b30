"""``hessdiag show``: the tables of a stored run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from hessdiag_cli import console
from hessdiag_cli.console import Debug, Json, Quiet, Verbose


def show(
    run: Annotated[Path, Argument(metavar="RUN", help="A run file, as `analyze` writes it.")],
    variant: Annotated[
        str | None, Option("--variant", help="Show this variant; by default raw, all with --json.")
    ] = None,
    hidden: Annotated[
        str | None,
        Option("--hidden", metavar="LAYER", help="Show H_e: why this layer is ill-conditioned."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Print the table of a stored run; of an unfinished one, what is done so far.

    Example: hessdiag show model.h5 --hidden encoder.0
    """
    import difflib

    from hessdiag.errors import OptionError
    from hessdiag.store import open_run
    from hessdiag.tables import summary_table
    from hessdiag.variants.grammar import parse_variant

    found = open_run(run)
    if variant is not None and variant not in found.variants:
        variant = parse_variant(variant).key
    if variant is not None and variant not in found.variants:
        near = difflib.get_close_matches(variant, found.variants, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise OptionError(
            f"{run} has no variant {variant!r}; {hint}it has: {', '.join(found.variants)}"
        )
    if hidden is not None and json:
        raise OptionError(
            "--hidden prints a table only: H_e is in the run file under /hidden and /neurons; "
            "leave out --json, or read it with h5py"
        )
    if hidden is not None:
        from hessdiag.tables.hidden import hidden_table

        width, color = console.width(), console.color()
        console.emit(hidden_table(found, hidden, variant=variant, width=width, color=color))
    elif json:
        import dataclasses

        kept = found.variants if variant is None else (variant,)
        console.emit(dataclasses.replace(found, variants=kept).to_json())
    else:
        console.emit(
            summary_table(found, variant=variant, width=console.width(), color=console.color())
        )
