"""Files that appear whole or not at all, and what to say when the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

from hessdiag.errors import OutOfResources, StoreError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
TEMPORARY = re.compile(r"\.hessdiag-[0-9a-f]{16}\.tmp")


def replace_file(
    path: Path,
    *content: bytes | memoryview,
    scratch: Path | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Make ``path`` hold ``content``; a crash at any instant leaves the old file or the new.

    The bytes go to a file of a random name, which is flushed to the disk and moved over
    ``path``; then the folder is flushed. On failure that file is removed.

    Args:
        path: The file to be.
        *content: Its bytes, in pieces.
        scratch: Folder of the temporary file, on the same file system; None takes that of
            ``path``.
        check: Called with the flushed temporary file; what it raises keeps the old file.

    Raises:
        OutOfResources: The disk, the quota or the file-size limit is full.
        StoreError: The folder does not exist or cannot be written.
    """
    temporary = (scratch or path.parent) / f".hessdiag-{secrets.token_hex(8)}.tmp"
    try:
        try:
            with temporary.open("xb") as file:
                for piece in content:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if check is not None:
                check(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise explained(error, path, sum(len(piece) for piece in content)) from error
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the new name durable; file systems that cannot flush a folder are let be."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def explained(error: OSError, path: Path, size: int) -> StoreError | OutOfResources:
    """What to tell the user when ``size`` bytes cannot be written to ``path``."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return OutOfResources(
            f"no room for {path}, which needs {size} bytes ({reason}); "
            f"free some space, or choose another place with -o/--output"
        )
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return StoreError(
            f"the folder of {path} does not exist; create it, or choose another place "
            f"with -o/--output"
        )
    return StoreError(f"{path} cannot be written ({reason}); choose another place with -o/--output")
