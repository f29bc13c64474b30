"""Small JSON files that lie beside weights, read as a stranger's word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hessdiag.errors import CheckpointError

LARGEST = 64 * 2**20
"""Bytes; the largest index of a real model is a few million."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: The file cannot be read, is too large, is no JSON, says a name twice, or
            holds no object.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size > LARGEST:
            what = f"has {size:,} bytes" if path.is_file() else "is no file"
            raise CheckpointError(
                f"{path} {what}, where a JSON file of at most {LARGEST:,} bytes is expected; "
                "copy the directory again, or give the file of its weights alone"
            )
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(_broken(path, "it is not UTF-8 text")) from error
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(_broken(path, str(error))) from error
    if not isinstance(found, dict):
        raise CheckpointError(_broken(path, f"it holds a {type(found).__name__}, not an object"))
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise ValueError(f"it says {name!r} twice, with different values")
        found[name] = value
    return found


def _broken(path: Path, reason: str) -> str:
    return (
        f"{path} cannot be used: {reason}; copy the directory again, "
        "or give the file of its weights alone"
    )
