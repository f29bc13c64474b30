"""A run file against the schema and against itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from hessdiag.quantity import STATUSES, Quantity
from hessdiag.run import VariantResult
from hessdiag.store.coherence import cosine_problems, hidden_problems
from hessdiag.store.journal import is_unfinished, open_run
from hessdiag.store.read import load, read_run, run_file
from hessdiag.store.schema import (
    ARRAYS,
    AXES,
    COORDINATES,
    COSINES,
    LAYERS,
    PARAMETERS,
    PROVENANCE,
    SUMMARY,
    Dataset,
    Field,
    datasets,
)

SOURCES = (None, "state", "iterates", "minibatches", "hessian", "activations")
SHARE_ROUNDING = 1e-9
ATTRIBUTES = ("created_at", "hessdiag_version")
KINDS = {"float": "f", "int": "i", "bool": "i"}

NEEDED: dict[str | None, tuple[frozenset[str], frozenset[str]]] = {
    "exact": (frozenset({"value", "low", "high", "confidence"}), frozenset()),
    "interval": (frozenset({"value", "low", "high", "confidence"}), frozenset()),
    "lower-bound": (frozenset({"value", "low", "confidence"}), frozenset({"high"})),
    "upper-bound": (frozenset({"value", "high", "confidence"}), frozenset({"low"})),
    "estimate": (frozenset({"value"}), frozenset()),
    "unresolved": (frozenset(), frozenset({"value", "low", "high", "confidence"})),
    "zero": (frozenset(), frozenset({"value", "low", "high", "confidence"})),
    None: (frozenset(), frozenset({"value", "low", "high", "confidence"})),
}
"""By status: the parts that a quantity must have, and those that it must not."""


def validate_run(path: str | Path) -> list[str]:
    """Every way in which the file departs from its format, one sentence each; empty when valid.

    Of an unfinished run the parts are looked into.

    Groups and datasets that the schema does not name are allowed, but must carry units and a
    long name like all others.

    Raises:
        StoreError: The file is no run or too damaged to be looked into.
        UnknownSchema: Another major version wrote it.
    """
    if is_unfinished(path):
        run = open_run(path)
    else:
        with run_file(path) as file:
            problems = [*_structure(file)]
        if problems:
            return problems
        run = read_run(path)
    problems = []
    if run.variants[:1] != ("raw",):
        problems.append(f"the variants are {', '.join(run.variants)}; raw comes first")
    for block in run.blocks:
        for variant, result in block.variants.items():
            where = f"block {block.name!r}, variant {variant!r}"
            problems += [f"{where}: {problem}" for problem in _result(result)]
    for variant, results in run.hidden.items():
        for found in results:
            where = f"layer {found.layer!r}, variant {variant!r}"
            problems += [f"{where}: {problem}" for problem in hidden_problems(found)]
    return [*problems, *(f"cosines: {problem}" for problem in cosine_problems(run.cosines))]


def _structure(file: h5py.File) -> Iterator[str]:
    """Names, types, shapes, scales and attributes: what reading relies on."""
    for name in ATTRIBUTES:
        if name not in file.attrs:
            yield f"/ lacks the attribute {name}"
    for root in ("summary", "provenance", *ARRAYS):
        if not isinstance(file.get(root), h5py.Group):
            yield f"/{root} is missing"
            return
    summary = file["summary"]
    for dataset in (*COORDINATES, PARAMETERS, *(d for f in SUMMARY for d in datasets(f))):
        yield from _dataset(summary, dataset)
    for axis, keys in AXES.items():
        if axis in summary and not {float(key) for key in keys} <= set(summary[axis][:].tolist()):
            yield f"/summary/{axis} lacks some of {', '.join(keys)}"
    for field in SUMMARY:
        yield from _statuses(summary, field)
    for name, (kind, long_name) in PROVENANCE.items():
        dataset = Dataset(name, (), "", long_name, "text")
        wrong = [*_dataset(file["provenance"], dataset)]
        yield from wrong or _json(file["provenance"], name, kind)
    if "block" in summary and "variant" in summary:
        names = [str(name) for name in summary["block"].asstr()[:]]
        variants = {str(name) for name in summary["variant"].asstr()[:]}
        for root, table in ARRAYS.items():
            yield from _groups(file[root], table, names, variants)
        yield from _layers(file, variants)
    yield from _cosines(file)
    yield from _unlabelled(file)


def _dataset(group: h5py.Group, dataset: Dataset) -> Iterator[str]:
    stored = group.get(dataset.name)
    where = f"{group.name}/{dataset.name}"
    if not isinstance(stored, h5py.Dataset):
        yield f"{where} is missing"
        return
    try:
        load(stored, dataset)
    except ValueError as error:
        yield str(error)
        return
    if dataset.dtype != "text" and stored.dtype.kind != KINDS[dataset.dtype]:
        yield f"{where} holds {stored.dtype}, expected {dataset.dtype}"
    for position, dim in enumerate(dataset.dims):
        scale = group.get(dim)
        if not isinstance(scale, h5py.Dataset) or not scale.is_scale:
            yield f"{where}: {group.name}/{dim} is not a dimension scale"
        elif stored.shape[position] != scale.shape[0]:
            yield f"{where} has length {stored.shape[position]} along {dim}, not {scale.shape[0]}"
        elif stored != scale and scale not in stored.dims[position].values():
            yield f"{where} is not attached to the dimension scale {dim}"


def _statuses(summary: h5py.Group, field: Field) -> Iterator[str]:
    stored = summary.get(f"{field.name}_status")
    if field.kind == "quantity" and stored is not None and h5py.check_string_dtype(stored.dtype):
        for status in sorted({str(text) for text in stored.asstr()[...].flat} - {*STATUSES, ""}):
            yield f"{stored.name} holds the unknown status {status!r}"


def _json(group: h5py.Group, name: str, kind: type) -> Iterator[str]:
    try:
        value = json.loads(group[name].asstr()[()])
    except ValueError:
        value = None
    if not isinstance(value, kind):
        yield f"{group.name}/{name} is not a JSON {kind.__name__}"


def _groups(
    root: h5py.Group, table: tuple[Dataset, ...], names: list[str], variants: set[str]
) -> Iterator[str]:
    for variant, group in root.items():
        if variant not in variants:
            yield f"{group.name}: there is no such variant in /summary/variant"
        for index, arrays in group.items():
            if index not in {str(i) for i in range(len(names))}:
                yield f"{arrays.name}: there is no such index in /summary/block"
            elif arrays.attrs.get("block") != names[int(index)]:
                yield f"{arrays.name}: its attribute block is not {names[int(index)]!r}"
            for dataset in table:
                if dataset.name in arrays:
                    yield from _dataset(arrays, dataset)


def _layers(file: h5py.File, variants: set[str]) -> Iterator[str]:
    arrays = [
        (variant, index, group, table)
        for root, table in LAYERS.items()
        for variant, indices in file.get(root, {}).items()
        for index, group in indices.items()
    ]
    for variant, index, group, table in arrays:
        if variant not in variants:
            yield f"{group.name}: there is no such variant in /summary/variant"
        if not (index.isdecimal() and str(int(index)) == index):
            yield f"{group.name}: {index!r} is no index of a layer"
        if not isinstance(group.attrs.get("layer"), str):
            yield f"{group.name} lacks the attribute layer"
        if f"hidden/{variant}/{index}" not in file:
            yield f"{group.name}: there is no /hidden/{variant}/{index}"
        for dataset in table:
            if dataset.name in group:
                yield from _dataset(group, dataset)


def _cosines(file: h5py.File) -> Iterator[str]:
    for dataset in COSINES if "cosines" in file else ():
        yield from _dataset(file["cosines"], dataset)


def _unlabelled(file: h5py.File) -> list[str]:
    problems: list[str] = []

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            problems.extend(
                f"/{name} lacks the attribute {attribute}"
                for attribute in ("units", "long_name")
                if not item.attrs.get(attribute)
            )

    file.visititems(visit)
    return problems


def _result(result: VariantResult) -> Iterator[str]:
    """What the numbers of one (block, variant) say about each other."""
    for field in SUMMARY:
        value = result[field.name]
        quantities = value if isinstance(value, dict) and field.axis else {"": value}
        for key, quantity in quantities.items():
            if isinstance(quantity, Quantity):
                name = f"{field.name}[{key}]" if key else field.name
                yield from (f"{name} {problem}" for problem in _quantity(quantity))
    yield from _counts(result)
    yield from _vectors(result)
    yield from _origins(result)


def _origins(result: VariantResult) -> Iterator[str]:
    """What says where the coordinates come from."""
    if result["source"] not in SOURCES:
        yield f"source is {result['source']!r}, none of {', '.join(filter(None, SOURCES))}"
    if not 0 <= result["zero_state"] <= max(result["size"], 0):
        yield f"zero_state is {result['zero_state']} of {result['size']} parameters"
    shares = result["off_diagonality"] or {}
    for name, share in shares.items():
        if not 0 <= share <= 1 + SHARE_ROUNDING:
            yield f"off_diagonality_{name} is {share!r}, no share of one"


def _quantity(quantity: Quantity) -> Iterator[str]:
    parts = quantity.to_json()
    needed, forbidden = NEEDED[quantity.status]
    for part in ("value", "low", "high", "confidence"):
        number = parts[part]
        if number is None and part in needed:
            yield f"is {quantity.status} without {part}"
        elif number is not None and part in forbidden:
            yield f"is {quantity.status or 'absent'} but has {part} {number!r}"
        elif number is not None and math.isinf(number):
            yield f"has the infinite {part} {number!r}"
    value, low, high = quantity.value, quantity.low, quantity.high
    if low is not None and high is not None and low > high:
        yield f"has low {low!r} above high {high!r}"
    elif value is not None and (
        (low is not None and value < low) or (high is not None and value > high)
    ):
        yield f"has value {value!r} outside [{low!r}, {high!r}]"
    if quantity.confidence is not None and not 0 < quantity.confidence <= 1:
        yield f"has confidence {quantity.confidence!r}, which is no level"


def _counts(result: VariantResult) -> Iterator[str]:
    size, inactive = result["size"], result["inactive"]
    if not 0 <= inactive <= size:
        yield f"inactive is {inactive} of size {size}"
    counts = [result[name] for name in ("n_positive", "n_negative", "n_zero")]
    if all(count.status == "exact" for count in counts):
        total = sum(count.value or 0 for count in counts)
        if total != size:
            yield f"n_positive + n_negative + n_zero is {total:g}, not size {size}"


def _vectors(result: VariantResult) -> Iterator[str]:
    size = result["size"]
    lengths: tuple[tuple[str, Any], ...] = (
        ("eigenvalue", result.spectrum.get("eigenvalue")),
        *result.rows.items(),
    )
    for name, array in lengths:
        if array is not None and len(array) != size:
            yield f"{name} has {len(array)} entries, not size {size}"
    for name in ("eigenvalue", "ritz_value"):
        values = result.spectrum.get(name)
        if values is not None and (values[1:] < values[:-1]).any():
            yield f"{name} is not ascending"
    for name in ("norm", "diagonal"):
        for low, high in ((f"{name}_low", name), (name, f"{name}_high")):
            both = low in result.rows and high in result.rows
            if both and (result.rows[low] > result.rows[high]).any():
                yield f"{low} exceeds {high}"
