"""One value of the summary as the scalars that a file or a table column holds, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, cast

from hessdiag.quantity import STATUSES, Quantity, Status
from hessdiag.store.schema import PARTS, Dtype, Field

Cell = float | int | str

NULL: dict[Dtype, Cell] = {"float": math.nan, "int": -1, "bool": -1, "text": ""}
"""What a missing value is stored as; design.md, "HDF5"."""


def encode(field: Field, value: Any) -> tuple[Cell, ...]:
    """The parts of ``value``, in the order of ``PARTS[field.kind]``; None gives nulls."""
    parts: tuple[Any, ...]
    match field.kind:
        case "quantity" if value is not None:
            parts = (value.value, value.low, value.high, value.status, value.confidence)
        case "before-after" if value is not None:
            parts = (value["before"], value["after"])
        case "list" if value is not None:
            parts = (json.dumps(value),)
        case "quantity" | "before-after":
            parts = (None,) * len(PARTS[field.kind])
        case _:
            parts = (value,)
    return tuple(
        NULL[dtype] if part is None else part
        for part, (_, dtype, _) in zip(parts, PARTS[field.kind], strict=True)
    )


def decode(field: Field, cells: Sequence[Cell]) -> Any:
    """The value whose parts are ``cells``.

    Raises:
        ValueError: A status or a JSON text is not one.
    """
    match field.kind:
        case "quantity":
            value, low, high, status, confidence = cells
            if status not in (*STATUSES, ""):
                raise ValueError(f"{field.name} has the unknown status {status!r}")
            return Quantity(
                _number(value),
                _number(low),
                _number(high),
                cast("Status", status) if status else None,
                _number(confidence),
            )
        case "before-after":
            before, after = map(_number, cells)
            return None if before is None else {"before": before, "after": after}
        case "list":
            texts = json.loads(str(cells[0]))
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{field.name} is not a list of texts")
            return texts
        case "float":
            return _number(cells[0])
        case "bool":
            return None if cells[0] == NULL["bool"] else bool(cells[0])
        case "int":
            return int(cells[0])
        case "text":
            return None if field.nullable and cells[0] == "" else str(cells[0])


def _number(cell: Cell) -> float | None:
    number = float(cell)
    return None if math.isnan(number) else number
