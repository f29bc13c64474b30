"""The files of an unfinished analysis: a line of JSON, the arrays that it lists, a seal.

The first line can be read by eye (``head -1``). Numbers are little-endian, in C order. A run
file would do as well, but takes a hundred times as long to write as a small block to solve.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hessdiag.errors import OutOfResources, StoreError, UnknownSchema
from hessdiag.run import BlockResult, Value, VariantResult
from hessdiag.store.atomic import replace_file
from hessdiag.store.cells import decode, encode
from hessdiag.store.schema import ARRAYS, AXES, SUMMARY
from hessdiag.store.seal import seal, unsealed

FORMAT = "hessdiag-part"
VERSION = "1.0.0"
DTYPES = ("<f8", "<f4")
WRONG = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading nonsense raises."""


@dataclass(frozen=True)
class Finished:
    """One (block, variant) that is done, and what its analysis recorded.

    Attributes:
        block: Its row, with this variant alone.
        variant: The variant.
        engine: What computed its products.
        seconds: Wall time.
        max_seconds: The limit that it was analysed under.
    """

    block: BlockResult
    variant: str
    engine: str | None
    seconds: float
    max_seconds: float | None

    @property
    def result(self) -> VariantResult:
        """The numbers."""
        return self.block.variants[self.variant]


def write_part(
    path: Path, document: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Write one file of the folder, all or nothing.

    Raises:
        OutOfResources: The disk is full.
        StoreError: It cannot be written.
    """
    little = {
        name: np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
        for name, array in (arrays or {}).items()
    }
    table = {name: [array.dtype.str, list(array.shape)] for name, array in little.items()}
    head = {"format": FORMAT, "version": VERSION, **document, "arrays": table}
    pieces: list[bytes | memoryview] = [json.dumps(head, default=_plain).encode() + b"\n"]
    pieces += [array.reshape(-1).view(np.uint8).data for array in little.values()]
    replace_file(path, *pieces, seal(*pieces))


def _plain(number: Any) -> Any:
    """A numpy scalar as Python's own."""
    return number.item()


def read_part(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The document and the arrays of :func:`write_part`.

    Raises:
        StoreError: The file is damaged, or cannot be read.
        UnknownSchema: Another major version wrote it.
        OutOfResources: It does not fit into memory.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise StoreError(
                f"{path} is not a regular file; remove it, and the same command goes on"
            )
        with path.open("rb") as file:
            content = bytearray(file.seek(0, 2))
            file.seek(0)
            file.readinto(content)
        body = unsealed(memoryview(content))
        end = content.index(b"\n")
        head = json.loads(bytes(body[:end]))
        if head["format"] != FORMAT:
            raise ValueError("it is no part of a run")
        if str(head["version"]).split(".", maxsplit=1)[0] != VERSION.split(".", maxsplit=1)[0]:
            raise UnknownSchema(
                f"{path} holds version {head['version']} of the parts, this hessdiag reads "
                f"{VERSION}; go on with the release that began the analysis, or begin anew with "
                f"--force"
            )
        return head, _arrays(head["arrays"], body[end + 1 :])
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise OutOfResources(f"not enough memory to read {path}") from error
    except WRONG as error:
        raise damaged(path, error) from error


def damaged(path: Path, reason: object) -> StoreError:
    """The refusal of a part that cannot be trusted."""
    return StoreError(
        f"{path} is damaged ({reason}); remove it, and the same command computes again what it "
        f"held; or begin anew with --force"
    )


def _arrays(table: Mapping[str, Any], body: memoryview) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    start = 0
    for name, (kind, shape) in table.items():
        if kind not in DTYPES:
            raise ValueError(f"{name} has the type {kind}")
        dtype = np.dtype(kind)
        end = start + prod(shape) * dtype.itemsize
        arrays[name] = np.frombuffer(body[start:end], dtype=dtype).reshape(shape)
        start = end
    if start != len(body):
        raise ValueError("its arrays do not fill it")
    return arrays


def write_block(path: Path, done: Finished, fingerprint: Mapping[str, Any]) -> None:
    """Store one finished (block, variant).

    Raises:
        OutOfResources: The disk is full.
        StoreError: It cannot be written.
    """
    document = {
        "block": done.block.name,
        "parameters": list(done.block.parameters),
        "variant": done.variant,
        "engine": done.engine,
        "seconds": done.seconds,
        "max_seconds": done.max_seconds,
        "fingerprint": fingerprint,
        "values": _encoded(done.result.values),
    }
    groups = {"spectra": done.result.spectrum, "rows": done.result.rows}
    arrays = {
        f"{root}/{dataset.name}": np.asarray(groups[root][dataset.name], dtype=np.float64)
        for root, table in ARRAYS.items()
        for dataset in table
        if dataset.name in groups[root]
    }
    write_part(path, document, arrays)


def read_block(path: Path) -> tuple[Finished, dict[str, Any]]:
    """What :func:`write_block` stored, and the fingerprint of its analysis.

    Raises:
        StoreError: The file is damaged, or cannot be read.
    """
    document, arrays = read_part(path)
    try:
        groups: dict[str, dict[str, NDArray[Any]]] = {root: {} for root in ARRAYS}
        for name, array in arrays.items():
            root, _, dataset = name.partition("/")
            groups[root][dataset] = array
        result = VariantResult(_decoded(document["values"]), groups["spectra"], groups["rows"])
        variant = document["variant"]
        block = BlockResult(document["block"], tuple(document["parameters"]), {variant: result})
        done = Finished(
            block, variant, document["engine"], document["seconds"], document["max_seconds"]
        )
        return done, document["fingerprint"]
    except WRONG as error:
        raise damaged(path, error) from error


def _encoded(values: Mapping[str, Value]) -> dict[str, Any]:
    encoded: dict[str, Any] = {}
    for field in SUMMARY:
        value: Any = values[field.name]
        if field.axis is None:
            encoded[field.name] = encode(field, value)
        else:
            encoded[field.name] = {key: encode(field, value[key]) for key in AXES[field.axis]}
    return encoded


def _decoded(encoded: Mapping[str, Any]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for field in SUMMARY:
        cells = encoded[field.name]
        if field.axis is None:
            values[field.name] = decode(field, cells)
        else:
            values[field.name] = {key: decode(field, cells[key]) for key in AXES[field.axis]}
    return values
