"""A run to an HDF5 file, all or nothing.

The file is built in memory and written by :func:`hessdiag.store.atomic.replace_file`: HDF5
itself crashes the interpreter when the disk fills up below it (h5py 3.16, HDF5 2.0).
A flipped bit is refused on reading: by the seal of the file, and where an edit dropped that, by
the Fletcher checksums of the numbers and those of the metadata (format 1.10).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hessdiag.errors import OutOfResources, StoreError
from hessdiag.run import Run
from hessdiag.store.atomic import replace_file
from hessdiag.store.cells import NULL, encode
from hessdiag.store.document import finite
from hessdiag.store.read import is_run, read_run
from hessdiag.store.schema import (
    ARRAYS,
    AXES,
    CONTEXT,
    COORDINATES,
    COSINES,
    FORMAT,
    LAYERS,
    NONE,
    PARAMETERS,
    PROVENANCE,
    SUMMARY,
    VERSION,
    Dataset,
    Dtype,
    Field,
    datasets,
)
from hessdiag.store.seal import seal

TEXT = h5py.string_dtype()
STORED: dict[Dtype, Any] = {"float": np.float64, "int": np.int64, "bool": np.int8, "text": TEXT}


def write_run(
    run: Run, path: str | Path, *, force: bool = False, scratch: Path | None = None
) -> None:
    """Write ``run`` to ``path``; an existing file is whole until the new one takes its place.

    Args:
        run: What to store.
        path: A file in an existing folder. A symbolic link is refused, with or without
            ``force``: neither the link nor what it points to is replaced behind its name.
        force: Replace an existing run. A file that is no run is never replaced.
        scratch: Folder for the temporary file; None takes that of ``path``.

    Raises:
        StoreError: ``path`` is taken, or its folder cannot be written.
        OutOfResources: The disk or the memory is full.
        ValueError: An array is not of the schema, or not of its shape.
    """
    path = Path(path)
    check_target(path, force=force)
    _check_names(run)
    try:
        content = _serialised(run).getbuffer()
    except MemoryError as error:
        raise OutOfResources(
            f"not enough memory to lay out {path}; close other programs, or analyse fewer blocks"
        ) from error

    def reads_back(temporary: Path) -> None:
        try:
            read_run(temporary)
        except StoreError as error:
            raise StoreError(
                f"what was written for {path} does not read back ({error}); "
                f"check the disk, or choose another place with -o/--output"
            ) from error

    replace_file(path, content, scratch=scratch, check=reads_back)


def check_target(path: str | Path, *, force: bool) -> None:
    """Refuse a ``path`` that :func:`write_run` would refuse, before any long work.

    Raises:
        StoreError: ``path`` is taken, or its folder does not exist.
    """
    path = Path(path)
    refuse_link(path)
    if not path.parent.is_dir():
        raise StoreError(
            f"the folder of {path} does not exist; create it, or choose another place "
            f"with -o/--output"
        )
    if not os.path.lexists(path):
        return
    if not is_run(path):
        raise StoreError(
            f"{path} exists and is not a hessdiag run, or a damaged one, so it is not replaced; "
            f"choose another name with -o/--output, or remove it yourself"
        )
    if not force:
        raise StoreError(
            f"{path} exists; replace it with --force (force=True), or choose another name "
            f"with -o/--output"
        )


def refuse_link(path: Path) -> None:
    """Refuse a ``path`` that is a symbolic link, or no path at all.

    Raises:
        StoreError: It is one; or the system takes no such path.
    """
    try:
        linked = path.is_symlink()
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{str(path)[:100]} is no path of a file ({error}); choose another with -o/--output"
        ) from error
    if linked:
        raise StoreError(
            f"{path} is a symbolic link to {path.readlink()}; name the file itself, "
            f"so that nothing is replaced by surprise"
        )


def _check_names(run: Run) -> None:
    layers = (found.layer for results in run.hidden.values() for found in results)
    for name in (*(block.name for block in run.blocks), *run.variants, *layers):
        if "\0" in name or name != name.encode(errors="replace").decode():
            raise StoreError(
                f"the name {name!r} cannot be stored: HDF5 texts hold no null character and no "
                f"lone surrogate; rename the module"
            )
    for variant in run.variants:
        if "/" in variant or variant in {"", "."}:
            raise StoreError(f"the variant {variant!r} cannot be stored: it names an HDF5 group")
    strangers = sorted(set(run.hidden) - set(run.variants))
    if strangers:
        raise ValueError(f"the run has H_e under {strangers}, which are none of its variants")


def _serialised(run: Run) -> io.BytesIO:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        file.attrs["encoding-type"] = FORMAT
        file.attrs["encoding-version"] = VERSION
        file.attrs["created_at"] = run.created_at
        file.attrs["hessdiag_version"] = run.hessdiag_version
        _summary(file.create_group("summary"), run)
        _arrays(file, run)
        _layers(file, run)
        if run.cosines:
            _cosines(file.create_group("cosines"), run.cosines)
        group = file.create_group("provenance")
        for name, (_, long_name) in PROVENANCE.items():
            text = json.dumps(finite(getattr(run.provenance, name)))
            _add(group, Dataset(name, (), NONE, long_name, "text"), np.array(text, dtype=object))
    with buffer.getbuffer() as content:
        mark = seal(content)
    buffer.seek(0, io.SEEK_END)
    buffer.write(mark)
    return buffer


def _summary(group: h5py.Group, run: Run) -> None:
    values: dict[str, list[Any]] = {
        "block": [block.name for block in run.blocks],
        "variant": list(run.variants),
        **{axis: [float(key) for key in keys] for axis, keys in AXES.items()},
    }
    for coordinate in COORDINATES:
        data = np.array(values[coordinate.name], dtype=_memory(coordinate.dtype))
        _add(group, coordinate, data).make_scale(coordinate.name)
    names = [json.dumps(list(block.parameters)) for block in run.blocks]
    _add(group, PARAMETERS, np.array(names, dtype=object))
    for field in SUMMARY:
        for dataset, data in zip(datasets(field), _columns(field, run), strict=True):
            _add(group, dataset, data)


def _columns(field: Field, run: Run) -> list[NDArray[Any]]:
    """The arrays of ``field`` over (block, variant[, axis]); nulls where a pair is missing."""
    keys = (None,) if field.axis is None else AXES[field.axis]
    shape = (len(run.blocks), len(run.variants), len(keys))
    columns = [np.empty(shape, dtype=_memory(dataset.dtype)) for dataset in datasets(field)]
    for i, block in enumerate(run.blocks):
        for j, variant in enumerate(run.variants):
            result = block.variants.get(variant)
            value = None if result is None else result[field.name]
            for k, key in enumerate(keys):
                cells = encode(field, value if key is None or value is None else value[key])
                for column, cell in zip(columns, cells, strict=True):
                    column[i, j, k] = cell
    return [column[:, :, 0] if field.axis is None else column for column in columns]


def _arrays(file: h5py.File, run: Run) -> None:
    for root, table in ARRAYS.items():
        file.create_group(root)
        for index, block in enumerate(run.blocks):
            for variant, result in block.variants.items():
                arrays = result.spectrum if root == "spectra" else result.rows
                if arrays:
                    group = file.create_group(f"{root}/{variant}/{index}")
                    group.attrs["block"] = block.name
                    _fill(group, table, arrays)


def _layers(file: h5py.File, run: Run) -> None:
    for variant, results in run.hidden.items():
        for found in results:
            for root, table in LAYERS.items():
                arrays = found.hidden if root == "hidden" else found.neurons
                if arrays or root == "hidden":
                    group = file.create_group(f"{root}/{variant}/{found.index}")
                    group.attrs["layer"] = found.layer
                    _fill(group, table, arrays)


def _cosines(group: h5py.Group, arrays: Mapping[str, Any]) -> None:
    missing = [dataset.name for dataset in COSINES if dataset.name not in arrays]
    if missing:
        raise ValueError(f"the cosines lack {missing}")
    group.attrs["coordinates"] = " ".join(CONTEXT)
    _fill(group, COSINES, arrays)


def _fill(group: h5py.Group, table: tuple[Dataset, ...], arrays: Mapping[str, Any]) -> None:
    unknown = sorted(set(arrays) - {dataset.name for dataset in table})
    if unknown:
        raise ValueError(f"{group.name} has no place for {unknown}")
    for dataset in table:
        if dataset.name not in arrays:
            continue
        data = _numbers(dataset, arrays[dataset.name])
        for dim, length in zip(dataset.dims, data.shape, strict=True):
            if dim not in group:
                scale = Dataset(dim, (dim,), NONE, "0-based position", "int")
                _add(group, scale, np.arange(length)).make_scale(dim)
        _add(group, dataset, data)


def _numbers(dataset: Dataset, value: Any) -> NDArray[Any]:
    data = np.asarray(value)
    if dataset.dtype != "bool":
        return data.astype(np.float64, copy=False)
    if data.dtype != np.bool_:
        number = data.astype(np.float64)  # None becomes NaN
        data = np.where(np.isnan(number), NULL["bool"], number)
    return data.astype(np.int8)


def _add(group: h5py.Group, dataset: Dataset, data: NDArray[Any]) -> h5py.Dataset:
    """Create ``dataset`` with its units, long name and dimension scales."""
    filters: dict[str, Any] = {}
    if data.ndim and data.size and dataset.dtype != "text":  # a scalar takes no filter
        filters["fletcher32"] = True
        positions = dataset.dims == (dataset.name,) and dataset.dtype == "int"
        if positions or dataset.dtype == "bool":
            filters |= {"compression": "gzip", "shuffle": True}
    stored = group.create_dataset(dataset.name, data=data, dtype=STORED[dataset.dtype], **filters)
    stored.attrs["units"] = dataset.units
    stored.attrs["long_name"] = dataset.long_name
    for position, dim in enumerate(dataset.dims):
        if dim != dataset.name:
            stored.dims[position].attach_scale(group[dim])
    return stored


def _memory(dtype: Dtype) -> Any:
    return object if dtype == "text" else STORED[dtype]
