"""Text of others, as a terminal shows it and does not obey it."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with every character that a terminal would act on written as an escape."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def printable_lines(text: str) -> str:
    """As :func:`printable`, line by line."""
    return "\n".join(map(printable, text.split("\n")))
