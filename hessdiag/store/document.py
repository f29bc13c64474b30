"""A run as the JSON document of ``--json`` and as a pandas table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hessdiag.errors import MissingExtra
from hessdiag.quantity import Quantity
from hessdiag.run import Run, VariantResult
from hessdiag.store.cells import NULL, encode
from hessdiag.store.schema import AXES, FORMAT, SUMMARY, VERSION, Dtype, Field, datasets

if TYPE_CHECKING:
    import pandas as pd


def run_document(run: Run) -> dict[str, Any]:
    """The JSON document: plain dictionaries, lists and numbers, in the order of design.md.

    A number that is not finite is null. After the contract's keys come ``checkpoint``,
    ``checks`` (the self-checks of the analysis, null when they were not recorded) and
    ``warnings``.
    """
    provenance = run.provenance
    config = provenance.config
    document = {
        "format": FORMAT,
        "version": VERSION,
        **{key: config.get(key) for key in ("task", "curvature", "device", "seed")},
        **({"shard": config["shard"]} if config.get("shard") else {}),
        "blocks": [
            {
                "name": block.name,
                "parameters": list(block.parameters),
                "variants": {
                    name: _variant(block.variants[name])
                    for name in run.variants
                    if name in block.variants
                },
            }
            for block in run.blocks
        ],
        "checkpoint": config.get("checkpoint"),
        "checks": provenance.environment.get("checks"),
        "warnings": provenance.warnings,
    }
    return {key: finite(value) for key, value in document.items()}


def finite(value: Any) -> Any:
    """``value`` with None for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _variant(result: VariantResult) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for field in SUMMARY:
        value = result[field.name]
        if field.axis is None:
            _insert(tree, field.path, _json(field, value))
            continue
        for key in AXES[field.axis]:
            path = tuple(key if part == "*" else part for part in field.path)
            _insert(tree, path, _json(field, value[key]))
    return tree


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *parents, leaf = path
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def _json(field: Field, value: Any) -> Any:
    if not isinstance(value, Quantity):
        return value
    if field.nullable and value.status is None:
        return None
    parts: dict[str, Any] = {**value.to_json()}
    if field.integer:
        for key in ("value", "low", "high"):
            parts[key] = _integer(parts[key])
    return parts


def _integer(number: float | None) -> float | int | None:
    return int(number) if number is not None and float(number).is_integer() else number


def run_dataframe(run: Run) -> pd.DataFrame:
    """A row per (block, variant) that exists, a column per scalar of the summary.

    Columns carry the names of the HDF5 summary, with the key of the axis before the suffix:
    ``kappa``, ``kappa_low``, ``kappa_quantile_0.5``, ``kappa_quantile_0.5_status``. Lists are
    JSON text, as in the file; booleans are pandas' nullable ones.

    Raises:
        MissingExtra: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingExtra(
            "a data frame needs pandas, which is not installed; "
            "install it with: pip install 'hessdiag[xarray]'"
        ) from error

    pairs = [
        (block.name, name, block.variants[name])
        for block in run.blocks
        for name in run.variants
        if name in block.variants
    ]
    results = [result for _, _, result in pairs]
    columns: dict[str, Any] = {}
    for field in SUMMARY:
        for key in (None,) if field.axis is None else AXES[field.axis]:
            stem = field.name if key is None else f"{field.name}_{key}"
            values = [result[field.name] for result in results]
            cells = [encode(field, value if key is None else value[key]) for value in values]
            for position, dataset in enumerate(datasets(field)):
                name = stem + dataset.name.removeprefix(field.name)
                column = [cell[position] for cell in cells]
                columns[name] = _series(column, dataset.dtype)
    index = pd.MultiIndex.from_tuples(
        [(block, variant) for block, variant, _ in pairs], names=["block", "variant"]
    )
    return pd.DataFrame(columns, index=index)


def _series(column: list[Any], dtype: Dtype) -> Any:
    import pandas as pd

    match dtype:
        case "float":
            return pd.array(column, dtype="float64")
        case "int":
            return pd.array(column, dtype="int64")
        case "bool":
            truths = [None if cell == NULL["bool"] else bool(cell) for cell in column]
            return pd.array(truths, dtype="boolean")
        case "text":
            return pd.array([cell or None for cell in column], dtype="object")
