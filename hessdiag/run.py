"""A finished analysis: blocks × variants × quantities, with the arrays behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessdiag.quantity import Quantity

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Plain = bool | int | float | str | None | list[str] | dict[str, float]
Value = Plain | Quantity | dict[str, Quantity]

QUANTILES = ("0.5", "0.9")
THRESHOLDS = tuple(f"1e-{k:02d}" for k in range(1, 13))
HORIZONS = ("1", "10", "100", "1000")


def row_label(block: str, variant: str) -> str:
    """How records and messages call a row: of raw, by its block alone."""
    return block if variant == "raw" else f"{block} [{variant}]"


@dataclass(frozen=True, repr=False)
class VariantResult:
    """What was found for one block under one variant.

    Attributes:
        values: By the field names of ``hessdiag.store.schema``: a plain value, a
            :class:`Quantity`, or one Quantity per key of the field's axis.
        spectrum: ``eigenvalue`` (n,) ascending, or ``ritz_value, ritz_weight, ritz_bound`` (k,);
            ``vector`` (few, n) with ``vector_value`` (few,). In units of the loss.
        rows: ``norm, norm_low, norm_high, diagonal, diagonal_low, diagonal_high``, each (n,),
            in the flattened order of the block's parameters.
    """

    values: Mapping[str, Value]
    spectrum: Mapping[str, Array] = field(default_factory=dict)
    rows: Mapping[str, Array] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            near = get_close_matches(name, list(self.values), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise KeyError(f"no field {name!r}{hint}")
        return self.values[name]

    def __repr__(self) -> str:
        return f"<VariantResult {self.values.get('method')}, {self.values.get('size')} parameters>"


@dataclass(frozen=True, repr=False)
class BlockResult:
    """One row of the table: a group of parameters and its variants."""

    name: str
    parameters: tuple[str, ...]
    variants: Mapping[str, VariantResult]

    def __repr__(self) -> str:
        return f"<BlockResult {self.name!r}, {', '.join(self.variants)}>"


@dataclass(frozen=True, repr=False)
class HiddenResult:
    """H_e of one layer under one variant, and the factors of its neurons.

    Attributes:
        layer: Name of the module.
        index: The layer's block in a ``layer`` run, else its order in ``named_modules()``.
        hidden: ``row_norm`` (features + 1,), row 0 being that of ones; ``column_norm``
            (positions,), ``singular_value``, ``bias_cosine``, ``dead``, ``constant`` and the
            scalars ``kappa``, ``rank``, ``input_error``, ``centring_holds``.
        neurons: ``kappa_hessian, kappa_hidden, kappa_s, bound, slack, s_positive, s_negative,
            s_zero``, (neurons,) each; empty where theorem 3 does not apply.
    """

    layer: str
    index: int
    hidden: Mapping[str, Array]
    neurons: Mapping[str, Array] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<HiddenResult {self.layer!r}>"


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from: everything here is JSON."""

    config: dict[str, Any]
    environment: dict[str, Any]
    fingerprint: dict[str, Any]
    warnings: list[str]


@dataclass(frozen=True, repr=False)
class Run:
    """The result of one ``analyze``; what is in the HDF5 file, and nothing else.

    Attributes:
        blocks: The rows of the table.
        variants: In the order of the columns, ``raw`` first.
        provenance: Where the numbers come from.
        created_at: UTC.
        hessdiag_version: Of the release that made it.
        hidden: H_e by variant, of every layer that the variant changes.
        cosines: Along the trajectory, by the names of ``/cosines``; empty without iterates.
    """

    blocks: tuple[BlockResult, ...]
    variants: tuple[str, ...]
    provenance: Provenance
    created_at: str
    hessdiag_version: str
    hidden: Mapping[str, tuple[HiddenResult, ...]] = field(default_factory=dict)
    cosines: Mapping[str, Array] = field(default_factory=dict)

    def __getitem__(self, block: str) -> BlockResult:
        for candidate in self.blocks:
            if candidate.name == block:
                return candidate
        raise KeyError(f"no block {block!r}; there are {[b.name for b in self.blocks]}")

    def __repr__(self) -> str:
        task = self.provenance.config.get("task")
        return f"<Run {task!r}, {len(self.blocks)} blocks, {', '.join(self.variants)}>"

    def __str__(self) -> str:
        from hessdiag.tables import summary_table

        return summary_table(self)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of ``analyze --json`` as plain dictionaries and lists."""
        from hessdiag.store.document import run_document

        return run_document(self)

    def to_json(self) -> str:
        """The JSON document of ``analyze --json``; null where a number does not exist."""
        import json

        return json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per (block, variant), a column per scalar of the summary (extra ``xarray``)."""
        from hessdiag.store.document import run_dataframe

        return run_dataframe(self)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the run to an HDF5 file, all or nothing.

        Raises:
            StoreError: ``path`` exists and ``force`` is not set, or it is not a run file.
            OutOfResources: The disk is full.
        """
        from hessdiag.store.write import write_run

        write_run(self, Path(path), force=force)
