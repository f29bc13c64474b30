"""Files that appear whole or not at all, and what to say when the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

from hessdiag.errors import OutOfResources, StoreError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def replace_file(path: Path, content: bytes) -> None:
    """Make ``path`` hold ``content``; a crash at any instant leaves the old file or the new.

    The bytes go to a file of a random name in the same folder, which is flushed to the disk and
    moved over ``path``; then the folder is flushed. On failure that file is removed.

    Raises:
        OutOfResources: The disk, the quota or the file-size limit is full.
        StoreError: The folder does not exist or cannot be written.
    """
    temporary = path.parent / f".hessdiag-{secrets.token_hex(8)}.tmp"
    try:
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _explained(error, path, len(content)) from error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name durable; file systems that cannot flush a folder are let be."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explained(error: OSError, path: Path, size: int) -> StoreError | OutOfResources:
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
