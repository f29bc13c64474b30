"""When a stored analysis is the wanted one: the comparison of fingerprints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hessdiag.errors import StoreError

EQUAL = 1e-12
LOSS_TOLERANCE = {"float64": EQUAL, "float32": 1e-5}
"""Relative; of the same loss summed in another order of batches, or over other ranks."""


def differing(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The fields by which a stored analysis is not the wanted one."""
    loss = LOSS_TOLERANCE.get(str(wanted.get("dtype")), LOSS_TOLERANCE["float64"])
    return [
        name
        for name in dict.fromkeys((*wanted, *stored))
        if not _same(
            stored.get(name), wanted.get(name), tolerance=loss if name == "loss" else EQUAL
        )
    ]


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to take the stored analysis at ``path`` for the wanted one.

    Raises:
        StoreError: They differ; the message names the fields.
    """
    fields = differing(stored, wanted)
    if fields:
        raise StoreError(
            f"{path} holds another analysis: {', '.join(fields)} "
            f"{'differs' if len(fields) == 1 else 'differ'}; "
            "write to another file with -o, or overwrite it with --force (force=True)"
        )


def _same(stored: Any, wanted: Any, *, tolerance: float) -> bool:
    if isinstance(wanted, float) and isinstance(stored, (int, float)):
        return abs(stored - wanted) <= tolerance * abs(wanted)
    return bool(stored == wanted) or (stored is None and wanted == {})
