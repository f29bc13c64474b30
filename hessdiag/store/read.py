"""An HDF5 file back to a run; a file that is not one is refused, never half read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hessdiag.errors import HessdiagError, OutOfResources, StoreError, UnknownSchema
from hessdiag.run import BlockResult, HiddenResult, Provenance, Run, VariantResult
from hessdiag.store.cells import NULL, decode
from hessdiag.store.contained import check_contained
from hessdiag.store.schema import (
    ARRAYS,
    AXES,
    COSINES,
    FORMAT,
    HIDDEN,
    NEURONS,
    PARAMETERS,
    PROVENANCE,
    SUMMARY,
    VERSION,
    Dataset,
    Field,
    datasets,
)
from hessdiag.store.seal import check_seal

SIGNATURE = b"\x89HDF\r\n\x1a\n"


def is_run(path: str | Path) -> bool:
    """Whether ``path`` is a readable HDF5 file that calls itself a run, of whatever version."""
    try:
        if not Path(path).is_file():
            return False
        check_seal(Path(path))
        with h5py.File(path, "r", locking=False) as file:
            return bool(file.attrs.get("encoding-type") == FORMAT)
    except Exception:  # whatever h5py makes of foreign bytes: not a run
        return False


@contextmanager
def run_file(path: str | Path) -> Iterator[h5py.File]:
    """Open ``path`` as a run of this major version; whatever fails inside means damage.

    Raises:
        StoreError: There is no such file, it is foreign, or it is damaged.
        UnknownSchema: Another major version wrote it.
    """
    path = Path(path)
    try:
        there = path.exists()
    except (OSError, ValueError) as error:
        raise StoreError(f"{str(path)[:100]} is no path of a file ({error})") from error
    if not there:
        raise StoreError(f"{path} does not exist; `hessdiag analyze` writes run files")
    if not path.is_file():
        raise StoreError(f"{path} is not a file; name the .h5 file of a run")
    try:
        check_seal(path)
        with h5py.File(path, "r", locking=False) as file:
            _check_version(path, file)
            check_contained(path, file)
            yield file
    except HessdiagError:
        raise
    except PermissionError as error:
        raise StoreError(f"{path} cannot be read: permission denied") from error
    except MemoryError as error:
        raise OutOfResources(f"not enough memory to read {path}") from error
    except Exception as error:
        if not _signed(path):
            raise StoreError(
                f"{path} is not a run file (it has no HDF5 signature). Is it a checkpoint? Then: "
                f"hessdiag analyze {path.name}"
            ) from error
        raise StoreError(
            f"{path} is not a hessdiag run, or it is damaged ({error}); "
            f"restore it from a copy, or analyse the checkpoint again"
        ) from error


def _signed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def _check_version(path: Path, file: h5py.File) -> None:
    encoding = file.attrs.get("encoding-type")
    if encoding != FORMAT:
        raise StoreError(
            f"{path} is an HDF5 file but not a hessdiag run (encoding-type {encoding!r}); "
            f"`hessdiag analyze` writes run files"
        )
    version = str(file.attrs["encoding-version"])
    if version.split(".", maxsplit=1)[0] != VERSION.split(".")[0]:
        raise UnknownSchema(
            f"{path} holds schema version {version}, this hessdiag reads {VERSION}; "
            f"install the release that wrote it, or analyse the checkpoint again"
        )


def read_run(path: str | Path) -> Run:
    """Read what :func:`hessdiag.store.write.write_run` wrote.

    Groups and datasets that this release does not know are left out: a later minor version
    may have added them.

    Raises:
        StoreError: There is no such file, it is foreign, or it is damaged.
        UnknownSchema: Another major version wrote it.
    """
    with run_file(path) as file:
        summary = file["summary"]
        names = _texts(summary["block"])
        variants = tuple(_texts(summary["variant"]))
        parameters = [tuple(json.loads(text)) for text in _texts(summary[PARAMETERS.name])]
        columns = {field.name: _columns(summary, field) for field in SUMMARY}
        blocks = []
        for i, (name, owned) in enumerate(zip(names, parameters, strict=True)):
            results = {
                variant: VariantResult(
                    {field.name: _value(field, columns[field.name], i, j) for field in SUMMARY},
                    spectrum=_arrays(file, "spectra", variant, i),
                    rows=_arrays(file, "rows", variant, i),
                )
                for j, variant in enumerate(variants)
                if columns["size"][0][i, j, 0] != NULL["int"]
            }
            blocks.append(BlockResult(name, owned, results))
        return Run(
            blocks=tuple(blocks),
            variants=variants,
            provenance=_provenance(file["provenance"]),
            created_at=str(file.attrs["created_at"]),
            hessdiag_version=str(file.attrs["hessdiag_version"]),
            hidden=_hidden(file, variants),
            cosines=_known(file["cosines"], COSINES) if "cosines" in file else {},
        )


def _columns(summary: h5py.Group, field: Field) -> list[Any]:
    """The parts of ``field``, each over (block, variant, key of the axis)."""
    parts = [load(summary[dataset.name], dataset).astype(object) for dataset in datasets(field)]
    if field.axis is None:
        return [part[:, :, None] for part in parts]
    stored = summary[field.axis][:].tolist()
    order = [stored.index(float(key)) for key in AXES[field.axis]]
    return [part[:, :, order] for part in parts]


def _value(field: Field, parts: list[Any], i: int, j: int) -> Any:
    if field.axis is None:
        return decode(field, [part[i, j, 0] for part in parts])
    return {
        key: decode(field, [part[i, j, k] for part in parts])
        for k, key in enumerate(AXES[field.axis])
    }


def load(stored: h5py.Dataset, dataset: Dataset) -> Any:
    """The numbers or texts of a dataset.

    Raises:
        ValueError: They are of another type or number of dimensions than the schema says.
    """
    if stored.ndim != len(dataset.dims):
        raise ValueError(f"{stored.name} has {stored.ndim} dimensions, not {dataset.dims}")
    if (dataset.dtype == "text") != (h5py.check_string_dtype(stored.dtype) is not None):
        raise ValueError(f"{stored.name} holds {stored.dtype}, expected {dataset.dtype}")
    return stored.asstr()[...] if dataset.dtype == "text" else stored[...]


def _texts(stored: h5py.Dataset) -> list[str]:
    return [str(text) for text in stored.asstr()[:]]


def _arrays(file: h5py.File, root: str, variant: str, index: int) -> dict[str, Any]:
    path = f"{root}/{variant}/{index}"
    return _known(file[path], ARRAYS[root]) if path in file else {}


def _known(group: h5py.Group, table: tuple[Dataset, ...]) -> dict[str, Any]:
    held = group.keys()
    return {
        dataset.name: _numbers(load(group[dataset.name], dataset), dataset)
        for dataset in table
        if dataset.name in held
    }


def _numbers(stored: Any, dataset: Dataset) -> Any:
    """Masks as truth values; all else, null truths too, as float64 with NaN."""
    if dataset.dtype != "bool":
        return np.asarray(stored, dtype=np.float64)
    if dataset.dims:
        return stored == 1
    return np.asarray(np.nan if stored == NULL["bool"] else stored, dtype=np.float64)


def _hidden(file: h5py.File, variants: tuple[str, ...]) -> dict[str, tuple[HiddenResult, ...]]:
    """Of every variant that has any, by the index of the layer."""
    found: dict[str, tuple[HiddenResult, ...]] = {}
    for variant in variants:
        if f"hidden/{variant}" not in file:
            continue
        hidden, neurons = file[f"hidden/{variant}"], f"neurons/{variant}"
        found[variant] = tuple(
            HiddenResult(
                str(hidden[index].attrs["layer"]),
                int(index),
                _known(hidden[index], HIDDEN),
                _known(file[f"{neurons}/{index}"], NEURONS) if f"{neurons}/{index}" in file else {},
            )
            for index in sorted(hidden, key=int)
        )
    return found


def _provenance(group: h5py.Group) -> Provenance:
    parts = {}
    for name, (kind, _) in PROVENANCE.items():
        parts[name] = json.loads(group[name].asstr()[()])
        if not isinstance(parts[name], kind):
            raise ValueError(f"{group.name}/{name} is not a JSON {kind.__name__}")
    if not all(isinstance(warning, str) for warning in parts["warnings"]):
        raise ValueError(f"{group.name}/warnings holds other than texts")
    return Provenance(**parts)
