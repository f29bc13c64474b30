"""The commands, registered."""

from __future__ import annotations

from typing import Annotated

import typer

from hessdiag_cli.analyze import analyze
from hessdiag_cli.crosscheck import crosscheck
from hessdiag_cli.demo import demo
from hessdiag_cli.diff import diff
from hessdiag_cli.init import init
from hessdiag_cli.inspect import inspect
from hessdiag_cli.merge import merge
from hessdiag_cli.show import show
from hessdiag_cli.validate import validate

app = typer.Typer(
    name="hessdiag",
    help="Why does this network train slowly? Hessian conditioning, with certificates.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: hessdiag demo && hessdiag analyze model.pt",
)


def _version(wanted: bool) -> None:
    if wanted:
        from hessdiag import __version__

        typer.echo(f"hessdiag {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Why does this network train slowly? Hessian conditioning, with certificates."""


for command in (demo, inspect, analyze, show, diff, crosscheck, merge, validate, init):
    app.command()(command)
