"""The terminal's two streams: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, TextIO

from typer import Option

from hessdiag.plain import printable_lines

Json = Annotated[bool, Option("--json", help="Print one JSON document and nothing else.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No notices and no progress on stderr.")]
Verbose = Annotated[bool, Option("--verbose", "-v", help="Say more on stderr.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]

WIDTH_OFF_TERMINAL = 100


def width() -> int:
    """Columns to lay a table out in: ``COLUMNS``, else the terminal's, else 100."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdigit():
        return max(60, int(asked))
    if not sys.stdout.isatty():
        return WIDTH_OFF_TERMINAL
    try:
        return max(60, os.get_terminal_size(sys.stdout.fileno()).columns)
    except OSError:
        return WIDTH_OFF_TERMINAL


def color() -> bool:
    """Whether stdout is a terminal whose user has not asked for plain text."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def emit(text: str) -> None:
    """Print a result to stdout."""
    _write(sys.stdout, text if text.endswith("\n") else text + "\n")


def notice(text: str, *, quiet: bool = False) -> None:
    """Print a notice to stderr, unless the user asked for quiet."""
    if not quiet:
        _write(sys.stderr, f"{printable_lines(text)}\n")


def _write(stream: TextIO, text: str) -> None:
    """Write, also where nobody reads any more (`| head`): the command's exit code stays its own.

    Raises:
        OutOfResources: The stream is a file on a full disk.
    """
    from hessdiag.errors import OutOfResources

    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        _silence(stream)
    except OSError as error:
        _silence(stream)
        raise OutOfResources(
            f"the output cannot be written ({error.strerror}); what is stored stays"
        ) from error


def _silence(stream: TextIO) -> None:
    """Nothing that is left in the stream's buffer may fail again when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(text: str) -> None:
    """Print an error to stderr, in a panel."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    columns = None if sys.stderr.isatty() else WIDTH_OFF_TERMINAL
    screen = Console(stderr=True, width=columns, highlight=False)
    shown = Text(printable_lines(text))
    screen.print(Panel(shown, title="hessdiag: error", title_align="left", border_style="red"))
