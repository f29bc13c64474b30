"""Lines of a table: wrapped to the terminal's width and printed, in colour or plain."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from hessdiag.plain import printable

TIED = "\N{NO-BREAK SPACE}"
"""A space at which :func:`wrapped` does not break."""
LONGEST_TEXT = 240


def brief(text: str) -> str:
    """A reason or a note of others in print: no longer than a few lines."""
    shown = printable(text)
    return shown if len(shown) <= LONGEST_TEXT else f"{shown[: LONGEST_TEXT - 1]}…"


def wrapped(text: str, width: int, style: str = "", *, indent: str = "") -> list[Text]:
    """Lines of at most ``width``; a :data:`TIED` space does not break."""
    return [
        Text(line.replace(TIED, " "), style=style)
        for line in textwrap.wrap(text, max(width, 20), subsequent_indent=indent)
    ]


def printed(lines: Iterable[Text], width: int, *, color: bool) -> str:
    """The lines as text, each ended by a newline; ANSI colours where ``color`` is set."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        legacy_windows=False,
    )
    with console.capture() as capture:
        for line in lines:
            line.rstrip()
            console.print(line, soft_wrap=True, highlight=False)
    return capture.get()
