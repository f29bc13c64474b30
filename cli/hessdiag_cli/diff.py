"""``hessdiag diff``: two stored runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from hessdiag_cli import console
from hessdiag_cli.console import Debug, Json, Quiet, Verbose


def diff(
    first: Annotated[Path, Argument(metavar="RUN", help="A run file: the one to compare with.")],
    second: Annotated[Path, Argument(metavar="RUN", help="Another run file.")],
    block: Annotated[
        str | None, Option("--block", help="Every quantity of this block.", metavar="NAME")
    ] = None,
    variant: Annotated[
        str | None,
        Option("--variant", help="Compare this variant alone; --json holds all.", metavar="V"),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compare two runs block by block: both values, their ratio and whether it is certain.

    A ratio carries the interval that follows from the two certificates. Exits 0 whether or not
    the runs differ. Example: hessdiag diff step-100.h5 step-1000.h5
    """
    from hessdiag.diff import compare
    from hessdiag.store import open_run
    from hessdiag.tables import diff_table
    from hessdiag.variants.grammar import parse_variant

    found = compare(open_run(first), open_run(second))
    if variant is not None:
        known = [pair.variant for pair in found.pairs]
        variant = variant if variant in known else parse_variant(variant).key
        _check("variant", variant, known)
    if block is not None:
        _check("block", block, [pair.block for pair in found.pairs])
    if json:
        console.emit(found.to_json())
        return
    console.emit(
        diff_table(
            found,
            (str(first), str(second)),
            variant=variant,
            block=block,
            width=console.width(),
            color=console.color(),
        )
    )


def _check(what: str, name: str, known: list[str]) -> None:
    """Refuse a name that neither run has.

    Raises:
        OptionError: It is not among ``known``; the message says which are.
    """
    import difflib

    from hessdiag.errors import OptionError

    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise OptionError(
            f"neither run has a {what} {name!r}; {hint}there are: {', '.join(dict.fromkeys(known))}"
        )
