"""Two runs side by side: every quantity of the schema, its ratio and its difference."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hessdiag.comparison import difference, ratio
from hessdiag.quantity import Quantity
from hessdiag.run import BlockResult, Run, VariantResult
from hessdiag.store.document import finite
from hessdiag.store.schema import AXES, SUMMARY, Field

Path = tuple[str, ...]

FORMAT = "hessdiag-diff"
VERSION = "1.0.0"

SIGNED = frozenset({"lambda_max", "lambda_min", "trace"})
"""The quantities that may be negative; every other one is at least 0 by definition."""
EXPECTED = frozenset({"weights", "loss", "optimizer"})
"""What of the fingerprint two runs are expected to differ in: it is what is compared."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One quantity in both runs.

    Attributes:
        field: Of the schema.
        key: Of the field's axis, or None.
        first: In the first run.
        second: In the second.
        ratio: Second over first; None for counts, which have a difference.
        difference: Second minus first.
    """

    field: Field
    key: str | None
    first: Quantity
    second: Quantity
    ratio: Quantity | None
    difference: Quantity

    @property
    def name(self) -> str:
        """As the document spells it, joined by dots: ``kappa_quantile.0.5``."""
        return ".".join(_path(self.field, self.key))


@dataclass(frozen=True, slots=True)
class Pair:
    """One (block, variant); a side is None where that run does not have it."""

    block: str
    variant: str
    first: VariantResult | None
    second: VariantResult | None

    @property
    def solved(self) -> bool:
        """Both sides hold numbers."""
        return all(r is not None and r["skipped"] is None for r in (self.first, self.second))

    def quantities(self) -> Iterator[Compared]:
        """Every quantity of the schema, in its order; none where a side is missing."""
        if self.first is None or self.second is None:
            return
        for field in SUMMARY:
            if field.kind != "quantity":
                continue
            for key in _keys(field):
                yield _compared(field, key, self.first, self.second)

    def quantity(self, name: str, key: str | None = None) -> Compared:
        """One quantity by the name of its field; both sides must exist."""
        if self.first is None or self.second is None:
            raise KeyError(f"{self.block} under {self.variant} is in one run only")
        field = next(field for field in SUMMARY if field.name == name)
        return _compared(field, key, self.first, self.second)


@dataclass(frozen=True, slots=True)
class Diff:
    """Two runs, matched by block and variant.

    Attributes:
        first: A run.
        second: Another.
        settings: What of the fingerprint differs and should not, with both values.
        pairs: Blocks of the first run in its order, then those of the second alone.
    """

    first: Run
    second: Run
    settings: Mapping[str, tuple[Any, Any]]
    pairs: tuple[Pair, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of ``diff --json``."""
        ours, theirs = _documents(self.first), _documents(self.second)
        blocks: dict[str, dict[str, Any]] = {}
        for pair in self.pairs:
            where = (pair.block, pair.variant)
            compared = {_path(found.field, found.key): found for found in pair.quantities()}
            blocks.setdefault(pair.block, {})[pair.variant] = _beside(
                ours.get(where), theirs.get(where), compared
            )
        settings = {n: {"first": a, "second": b} for n, (a, b) in self.settings.items()}
        document = {
            "format": FORMAT,
            "version": VERSION,
            "settings": settings,
            "blocks": [{"name": name, "variants": found} for name, found in blocks.items()],
        }
        return {key: finite(value) for key, value in document.items()}

    def to_json(self) -> str:
        """As :meth:`to_dict`, as text."""
        return json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False)


def compare(first: Run, second: Run) -> Diff:
    """Match two runs by the names of blocks and variants, and name the settings that differ."""
    names = dict.fromkeys(block.name for run in (first, second) for block in run.blocks)
    ours, theirs = ({block.name: block for block in run.blocks} for run in (first, second))
    variants = dict.fromkeys([*first.variants, *second.variants])
    pairs = []
    for name in names:
        sides = ours.get(name), theirs.get(name)
        for variant in variants:
            a, b = (_variant(side, variant) for side in sides)
            if a is not None or b is not None:
                pairs.append(Pair(name, variant, a, b))
    return Diff(first, second, differing_settings(first, second), tuple(pairs))


def differing_settings(first: Run, second: Run) -> dict[str, tuple[Any, Any]]:
    """The fields of the two fingerprints that differ: data, structure, options."""
    ours, theirs = (run.provenance.fingerprint for run in (first, second))
    return {
        name: (ours.get(name), theirs.get(name))
        for name in dict.fromkeys([*ours, *theirs])
        if name not in EXPECTED and ours.get(name) != theirs.get(name)
    }


def _variant(block: BlockResult | None, variant: str) -> VariantResult | None:
    return None if block is None else block.variants.get(variant)


def _compared(
    field: Field, key: str | None, first: VariantResult, second: VariantResult
) -> Compared:
    a, b = (_cell(result[field.name], key) for result in (first, second))
    quotient = None
    if not field.integer:
        quotient = ratio(a, b, nonnegative=field.name not in SIGNED)
    return Compared(field, key, a, b, quotient, difference(a, b))


def _cell(value: Any, key: str | None) -> Quantity:
    found = value if key is None else value[key]
    assert isinstance(found, Quantity)  # noqa: S101 - the schema says so, for the type checker
    return found


def _keys(field: Field) -> tuple[str | None, ...]:
    return (None,) if field.axis is None else AXES[field.axis]


def _path(field: Field, key: str | None) -> Path:
    return tuple(str(key) if part == "*" else part for part in field.path)


def _documents(run: Run) -> dict[tuple[str, str], Any]:
    """By block and variant, what the JSON document of a run holds."""
    return {
        (block["name"], variant): tree
        for block in run.to_dict()["blocks"]
        for variant, tree in block["variants"].items()
    }


def _beside(
    first: Any, second: Any, compared: Mapping[Path, Compared], path: Path = ()
) -> dict[str, Any]:
    """Two documents of a variant as one: both values at each leaf, and what follows from them."""
    if path not in LEAVES:
        known = second if first is None else first
        return {
            key: _beside(
                None if first is None else first[key],
                None if second is None else second[key],
                compared,
                (*path, key),
            )
            for key in known
        }
    leaf = {"first": first, "second": second}
    if LEAVES[path].kind == "quantity":
        found = compared.get(path)
        leaf["ratio"] = None if found is None else _json(found.ratio, found.field)
        leaf["difference"] = None if found is None else _json(found.difference, found.field)
    return leaf


def _json(quantity: Quantity | None, field: Field) -> dict[str, Any] | None:
    if quantity is None or quantity.status is None:
        return None
    parts: dict[str, Any] = {**quantity.to_json()}
    if field.integer:
        for key in ("value", "low", "high"):
            if parts[key] is not None and parts[key].is_integer():
                parts[key] = int(parts[key])
    return parts


LEAVES = {_path(field, key): field for field in SUMMARY for key in _keys(field)}
