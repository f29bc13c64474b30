"""Names and values that programs choke on."""

from __future__ import annotations

import random
from pathlib import Path

NAMES = {
    "empty": "",
    "slashes": "encoder/layers/../../0",
    "newline": "line\nbreak\tand\rreturn",
    "markup": "[bold red]markup[/bold red][/] [link=https://example.org]x[/link] [0]",
    "open bracket": "a[",
    "closing tag": "[/]",
    "4000": "x" * 4000,
    "4000 wide": "模" * 4000,
    "surrogate": "half\ud800a pair",
    "null": "nul\0byte",
    "escape": "\x1b[31mred\x1b]0;title\x07\x1b[2J",
    "c1": "\x9b31mred\x85next",
    "right to left": "\u202egnp.exe\u2066 \u200b",
    "dots": "..",
    "one dot": ".weight",
    "quotes": "quotes \" ' \\ {json} $(id) `id` ; rm *",
    "glob": "[a-z]*?",
    "option": "--force",
    "percent": "%s %(name)s {0} {name!r}",
    "emoji": "🦉👩‍👩‍👧 Größe é",
    "control": "".join(map(chr, range(1, 32))) + "\x7f",
}

JUNK_VALUES = (
    "",
    " ",
    "-1",
    "0",
    "1e400",
    "-inf",
    "nan",
    "inf",
    "99999999999999999999999999",
    "1e-400",
    "1_0",
    "0x10",
    "½",
    "١٢",
    "\x1b[31m",
    "a\nb",
    "../../etc/passwd",
    "/dev/null",
    "x" * 5000,
    "[red]",
    "\udcff",
    "--force",
    ",",
    "=",
    "*",
    "None",
)


def bit_flipped(content: bytes, rng: random.Random, flips: int = 1) -> bytes:
    """``content`` with some bits turned over."""
    changed = bytearray(content)
    for _ in range(flips):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncated(content: bytes, rng: random.Random) -> bytes:
    """A beginning of ``content``, most often near one of its ends."""
    size = len(content)
    near = (
        rng.randrange(size),
        rng.randrange(min(size, 128)),
        size - 1 - rng.randrange(min(size, 64)),
    )
    return content[: rng.choice(near)]


def spliced(content: bytes, rng: random.Random) -> bytes:
    """``content`` with a piece cut out, doubled, zeroed or replaced by noise."""
    start = rng.randrange(len(content))
    piece = content[start : start + rng.randint(1, 64)]
    new = rng.choice(
        (b"", piece * 2, bytes(len(piece)), rng.randbytes(len(piece)), b"\xff" * len(piece))
    )
    return content[:start] + new + content[start + len(piece) :]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """``content`` after one accident, never equal to it."""
    while True:
        accident = rng.choice(("flip", "flips", "cut", "splice", "tail"))
        if accident == "flip":
            changed = bit_flipped(content, rng)
        elif accident == "flips":
            changed = bit_flipped(content, rng, rng.randint(2, 200))
        elif accident == "cut":
            changed = truncated(content, rng)
        elif accident == "splice":
            changed = spliced(content, rng)
        else:
            changed = content + rng.randbytes(rng.randint(1, 64))
        if changed != content:
            return changed


def damage_file(path: Path, rng: random.Random) -> None:
    """Let one accident happen to a file."""
    path.write_bytes(damaged(path.read_bytes(), rng))
