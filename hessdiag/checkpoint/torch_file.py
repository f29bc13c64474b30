"""Files of ``torch.save``, zip and legacy, read without running what is in them."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from hessdiag.checkpoint.archive import check_records
from hessdiag.checkpoint.contents import Checkpoint, interpret
from hessdiag.checkpoint.pickles import refused_globals
from hessdiag.errors import CheckpointError, UnsafeCheckpoint
from hessdiag.importing import on_path

ZIP = b"PK\x03\x04"
LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""torch's magic number as pickled by every protocol, two or more bytes into the file."""


def is_legacy(head: bytes) -> bool:
    """Whether a file that begins so was written by ``torch.save`` before torch 1.6."""
    return LEGACY in head[:32]


def read_zip(path: Path, *, trust: bool) -> Checkpoint:
    """Read what ``torch.save`` has written since torch 1.6, memory-mapped."""
    return interpret(load(path, trust=trust), path, "torch zip")


def read_legacy(path: Path, *, trust: bool) -> Checkpoint:
    """Read what ``torch.save`` wrote before torch 1.6."""
    return interpret(load(path, trust=trust), path, "legacy torch pickle")


def load(path: Path, *, trust: bool) -> Any:
    """Load a file of ``torch.save`` on the CPU; one that asks for imports only if it is trusted.

    Raises:
        UnsafeCheckpoint: The file would run code; its imports are named.
        CheckpointError: The file is damaged, or its classes cannot be imported.
    """
    try:
        with path.open("rb") as file:
            legacy = not file.read(len(ZIP)).startswith(ZIP)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not legacy:
        check_records(path)
    try:
        # Old files warn about their storage classes, which is nothing a user can act on.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=not legacy)
    except pickle.UnpicklingError as error:
        if not trust:
            raise UnsafeCheckpoint(_refusal(path, error, legacy=legacy)) from error
    except Exception as error:
        raise CheckpointError(_damaged(path, error)) from error
    try:
        with warnings.catch_warnings(), on_path(Path.cwd()):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{path} was pickled with classes that cannot be imported here ({error}); run where "
            "they can be, or save model.state_dict() instead of the model"
        ) from error
    except Exception as error:
        raise CheckpointError(_damaged(path, error)) from error


def _refusal(path: Path, error: Exception, *, legacy: bool) -> str:
    names = refused_globals(path, legacy=legacy)
    if names:
        reason = f"it would import {', '.join(names)}"
    else:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
    return (
        f"{path} may run code when it is loaded: {reason}. Nothing was loaded. Save the weights "
        "alone, with torch.save(model.state_dict(), FILE); or, if you know who made this file "
        "and trust them, add --trust"
    )


def _damaged(path: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).split("\n")[0].split(". ")[0]
    return f"{path} is damaged or cut short ({reason}); copy or save it again"
