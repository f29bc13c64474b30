"""The folder of an unfinished analysis, ``RUN.h5.parts``: its names, its lock, its end.

Only files of the names below are ever removed, and only from a folder that is ours: one with a
header, or with nothing but what a killed beginning leaves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

from hessdiag.errors import StoreError
from hessdiag.store.atomic import TEMPORARY, explained
from hessdiag.store.write import refuse_link

SUFFIX = ".parts"
HEADER = "header"
LOCK = "lock"
MATRIX = "whole-matrix"
ATTEMPTS = 100
BLOCK = re.compile(r"block-\d{4,}-[^/]+\.part")


def parts_folder(path: Path) -> Path:
    """Where the parts of the run at ``path`` are kept until it is complete."""
    return path.parent / f"{path.name}{SUFFIX}"  # with_name refuses `.`


def block_name(index: int, variant: str) -> str:
    """The file of one (block, variant)."""
    return f"block-{index:04d}-{variant}.part"


def is_ours(name: str) -> bool:
    """Whether hessdiag writes files of this name into the folder."""
    return (
        name in {HEADER, LOCK, MATRIX}
        or BLOCK.fullmatch(name) is not None
        or TEMPORARY.fullmatch(name) is not None
    )


def check_folder(path: Path) -> None:
    """Refuse a run at ``path`` whose parts would go into something that is not ours.

    Raises:
        StoreError: A link, a file or somebody else's folder has the name.
    """
    folder = parts_folder(path)
    refuse_link(folder)
    if not os.path.lexists(folder):
        return
    names = listed(folder)
    if HEADER not in names and any(
        name != LOCK and not TEMPORARY.fullmatch(name) for name in names
    ):
        raise StoreError(
            f"{folder} is not a folder of hessdiag (it has no {HEADER}), so nothing is written "
            f"there; move it away, or choose another place with -o/--output"
        )


def listed(folder: Path) -> list[str]:
    """The names in ``folder``.

    Raises:
        StoreError: It is no folder, or cannot be looked into.
    """
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names are wanted, not paths
    except NotADirectoryError as error:
        raise StoreError(
            f"{folder} is a file, where the finished blocks would be kept; move it away, "
            f"or choose another place with -o/--output"
        ) from error
    except OSError as error:
        raise explained(error, folder, 0) from error


def clear(folder: Path, *, keep: frozenset[str] = frozenset()) -> list[str]:
    """Remove what hessdiag wrote, then the folder if nothing else is in it.

    The header goes after the parts and the lock goes last, so that a kill on the way leaves a
    folder that is still known as ours, and locked by nobody else.

    Returns:
        Names of what is not ours, and stays.
    """
    last = (HEADER, LOCK)
    names = listed(folder)
    for name in sorted(names, key=lambda name: last.index(name) if name in last else -1):
        if is_ours(name) and name not in keep:
            remove(folder / name)
    if not keep:
        with contextlib.suppress(OSError):
            folder.rmdir()
    return [name for name in names if not is_ours(name)]


def remove(path: Path) -> None:
    """Remove a file of ours.

    Raises:
        StoreError: Something else has its name, or the folder cannot be written.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise explained(error, path, 0) from error


def take_lock(path: Path) -> int:
    """Make the folder of ``path`` and lock it; the kernel frees the lock of a killed process.

    Returns:
        A descriptor to close.
    Raises:
        StoreError: Another process holds it; or the folder cannot be written.
        OutOfResources: The disk is full.
    """
    folder = parts_folder(path)
    for attempt in range(ATTEMPTS):
        try:
            folder.mkdir(exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError as error:
            # Whoever had it may have just removed the folder; /proc always says this.
            if not path.parent.is_dir() or attempt == ATTEMPTS - 1:
                raise explained(error, folder, 0) from error
            continue
        except OSError as error:
            raise explained(error, folder, 0) from error
        try:
            if not _locked(descriptor):
                os.close(descriptor)
                break
            if _is_still(descriptor, folder / LOCK):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise StoreError(
        f"another hessdiag is analysing into {path} at this moment; wait until it ends, or choose "
        f"another place with -o/--output"
    )


def _locked(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # a system without such locks
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system that knows no locks must not stand in the way.
        return error.errno not in {errno.EWOULDBLOCK, errno.EACCES}
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the locked file is the one of that name: its last owner may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
