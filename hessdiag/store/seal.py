"""A checksum behind the HDF5 data, so that damage is seen before HDF5 sees it.

HDF5 guards numbers and metadata, not texts: one flipped bit among them can change a name, or
keep the library in an endless loop (HDF5 2.0, global heap). The seal is 48 bytes behind the end
that HDF5 knows of: a mark and the SHA-256 of everything before it. Whoever edits the file
through HDF5 drops it, because the library cuts a file to its known end on closing; such a file
is read without.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

MARK = b"hessdiag-sha256:"
LENGTH = len(MARK) + hashlib.sha256().digest_size


def seal(*content: bytes | memoryview) -> bytes:
    """What to append to ``content``, which may come in pieces."""
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return MARK + digest.digest()


def unsealed(content: memoryview) -> memoryview:
    """``content`` without its seal.

    Raises:
        ValueError: It carries none, or one of other content.
    """
    body, mark = content[:-LENGTH], content[-LENGTH:]
    if mark[: len(MARK)] != MARK:
        raise ValueError("it does not end in its checksum")
    if mark != seal(body):
        raise ValueError("its content does not match its checksum")
    return body


def check_seal(path: Path) -> None:
    """Compare the seal with the content; a file without one passes.

    Raises:
        ValueError: The content is not what was sealed.
    """
    with path.open("rb") as file:
        rest = file.seek(0, 2) - LENGTH
        if rest < 0:
            return
        file.seek(rest)
        expected = file.read()
        if not expected.startswith(MARK):
            return
        file.seek(0)
        digest = hashlib.sha256()
        while rest > 0:
            chunk = file.read(min(rest, 1 << 20))
            digest.update(chunk)
            rest -= len(chunk)
    if expected != MARK + digest.digest():
        raise ValueError("its content does not match its checksum")
