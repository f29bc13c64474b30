"""Synthetic runs: every kind of value, certificate and name that a run can hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from hessdiag.quantity import Quantity
from hessdiag.run import (
    HORIZONS,
    QUANTILES,
    THRESHOLDS,
    BlockResult,
    HiddenResult,
    Provenance,
    Run,
    VariantResult,
)

EVERY_STATUS = {
    "exact": Quantity(2.5e5, 2.4999e5, 2.5001e5, "exact", 1.0),
    "interval": Quantity(3.0, 2.0, 4.0, "interval", 0.999),
    "lower-bound": Quantity.lower_bound(1e11),
    "upper-bound": Quantity.upper_bound(7.5),
    "estimate": Quantity.estimate(12.5, 10.0, 15.0, 0.95),
    "bare estimate": Quantity.estimate(1 / 3),
    "unresolved": Quantity.unresolved(),
    "zero": Quantity.zero(),
    "absent": Quantity.absent(),
}

NASTY_NAMES = (
    "encoder/layers/0",
    "line\nbreak\tand tab",
    "[bold red]markup[/bold red] [0]",
    "quotes \" ' \\ {json}",
    "Größe 模型 🦉 é",
    "x" * 4000,
    " leading and trailing ",
)


def values(size: int = 4, **known: Any) -> dict[str, Any]:
    """All fields of an exact block with eigenvalues 4, 2, 1, -1 (or of that ``size``)."""
    fields: dict[str, Any] = {
        "size": size,
        "inactive": 0,
        "skipped": None,
        "same_function": True,
        "loss": 0.0017,
        "gradient_norm": 0.003,
        "dtype": "float64",
        "method": "exact",
        "products": size,
        "seconds": 0.4,
        "lambda_max": Quantity.exact(4.0),
        "lambda_min": Quantity.exact(-1.0),
        "lambda_min_positive": Quantity.exact(1.0),
        "kappa": Quantity.exact(4.0, 4.0 - 1e-12, 4.0 + 1e-12),
        "kappa_abs": Quantity.exact(4.0),
        "kappa_quantile": {key: Quantity.exact(2.0) for key in QUANTILES},
        "kappa_damped": Quantity.absent(),
        "n_positive": Quantity.exact(float(size - 1)),
        "n_negative": Quantity.exact(1.0),
        "n_zero": Quantity.exact(0.0),
        "ambiguous": False,
        "margin_above": 1e5,
        "margin_below": 0.01,
        "trace": Quantity.exact(6.0),
        "frobenius": Quantity.exact(22**0.5),
        "stable_rank": Quantity.exact(22 / 16),
        "negative_count": Quantity.exact(1 / size),
        "negative_mass": Quantity.exact(0.125),
        "negative_depth": Quantity.exact(0.25),
        "profile_n_positive": {key: Quantity.exact(size - 1.0) for key in THRESHOLDS},
        "profile_n_negative": {key: Quantity.exact(1.0) for key in THRESHOLDS},
        "profile_kappa": {key: Quantity.exact(4.0) for key in THRESHOLDS},
        "gd_rate": Quantity.exact(0.6),
        "gd_iterations_per_decade": Quantity.exact(4.5),
        "gd_rate_applies": False,
        **{
            f"forecast_{part}": {key: Quantity.exact(float(key) / 1e4) for key in HORIZONS}
            for part in ("positive", "null", "negative", "total")
        },
        "diagonal_gap": Quantity.absent(),
        "half_ratio": Quantity.absent(),
        "source": None,
        "optimizer_class": None,
        "zero_state": 0,
        "symmetries": [],
        "off_diagonality": None,
        "notes": [],
    }
    assert not set(known) - set(fields)
    return fields | known


def skipped_values(reason: str, size: int = 0) -> dict[str, Any]:
    """A block that was not analysed: no quantity exists."""
    fields = values(4)
    for name, value in fields.items():
        if isinstance(value, Quantity):
            fields[name] = Quantity.absent()
        elif isinstance(value, dict):
            fields[name] = {key: Quantity.absent() for key in value}
    return fields | {
        "size": size,
        "skipped": reason,
        "loss": None,
        "gradient_norm": None,
        "method": "",
        "products": 0,
        "seconds": 0.0,
        "ambiguous": None,
        "margin_above": None,
        "margin_below": None,
        "gd_rate_applies": None,
    }


def exact_arrays(size: int) -> dict[str, Any]:
    """Spectrum and rows of an exact block."""
    ramp = np.linspace(-1.0, 4.0, size)
    return {
        "spectrum": {
            "eigenvalue": ramp,
            "vector": np.arange(2.0 * size).reshape(2, size) / 7,
            "vector_value": ramp[[0, -1]],
        },
        "rows": {
            "norm": np.abs(ramp) + 1,
            "norm_low": np.abs(ramp) + 0.5,
            "norm_high": np.abs(ramp) + 2,
            "diagonal": ramp,
            "diagonal_low": ramp - 1,
            "diagonal_high": ramp + 1,
        },
    }


def provenance(**config: Any) -> Provenance:
    """What an analysis of the built-in task would record."""
    return Provenance(
        config={
            "task": "demo:mlp",
            "checkpoint": "model.pt",
            "curvature": "hessian",
            "device": "cpu",
            "seed": 0,
            **config,
        },
        environment={"torch": "2.13", "checks": {"symmetry": 1e-16}, "timings": {"total": 1.5}},
        fingerprint={"weights": "ab" * 32, "dtype": "float64", "exact_limit": 4096},
        warnings=["demo text, not your data"],
    )


def run(
    blocks: tuple[BlockResult, ...], variants: tuple[str, ...] = ("raw",), **config: Any
) -> Run:
    """A run of ``blocks``."""
    return Run(blocks, variants, provenance(**config), "2026-11-21T12:00:00+00:00", "0.1.0")


def small_run() -> Run:
    """Two exact layers and ``whole``, one variant: valid."""
    return run(
        tuple(
            BlockResult(
                name, (f"{name}.weight",), {"raw": VariantResult(values(n), **exact_arrays(n))}
            )
            for name, n in (("0", 4), ("2", 6), ("whole", 10))
        )
    )


def rich_run() -> Run:
    """Every status, nasty names, arrays of both kinds, a skipped and a missing pair."""
    blocks = []
    for position, name in enumerate(NASTY_NAMES):
        statuses = list(EVERY_STATUS.values())
        turned = statuses[position:] + statuses[:position]
        fields = values(
            10,
            inactive=position,
            kappa=turned[0],
            kappa_quantile=dict(zip(QUANTILES, turned, strict=False)),
            kappa_damped=turned[1],
            diagonal_gap=turned[2],
            n_zero=turned[3],
            same_function=position % 2 == 0,
            ambiguous=(None, True, False)[position % 3],
            loss=(None, 5e-324, 1.7e308)[position % 3],
            source=(None, "state")[position % 2],
            optimizer_class=(None, "torch.optim.AdamW")[position % 2],
            symmetries=["relu scale", name],
            off_diagonality=(None, {"before": 0.1 + 0.2, "after": 0.0})[position % 2],
            notes=["a note", 'with "quotes"\nand lines', name],
        )
        variants = {"raw": VariantResult(fields, **exact_arrays(10))}
        if position % 2:
            ritz = np.array([-1.0, 0.5, 4.0])
            variants["bn+adam"] = VariantResult(
                fields | {"method": "lanczos"},
                spectrum={"ritz_value": ritz, "ritz_weight": ritz**2, "ritz_bound": ritz * 0},
            )
        elif position:
            variants["bn+adam"] = VariantResult(skipped_values(f"no state for {name}", 10))
        blocks.append(BlockResult(name, (f"{name}.weight", f"{name}.bias"), variants))
    blocks.append(BlockResult("frozen", (), {"raw": VariantResult(skipped_values("all frozen"))}))
    return run(tuple(blocks), ("raw", "bn+adam"), data="Größe\n[x]", nested={"a": [1, None, 2.5]})


def hidden_layer(layer: str = "0", index: int = 0, **known: Any) -> HiddenResult:
    """H_e of two features over three positions, one feature dead, and two neurons."""
    hidden = {
        "row_norm": np.sqrt([3.0, 12.0, 0.0]),
        "column_norm": np.sqrt([5.0, 5.0, 5.0]),
        "singular_value": np.sqrt([15.0, 0.0, 0.0]),
        "bias_cosine": np.array([1.0, 1.0, np.nan]),
        "dead": np.array([False, False, True]),
        "constant": np.array([True, True, True]),
        "kappa": np.asarray(1.0),
        "rank": np.asarray(1.0),
        "input_error": np.asarray(1e-15),
        "centring_holds": np.asarray(0.0),
    }
    counts = ("s_positive", "s_negative", "s_zero")
    kappas = ("kappa_hessian", "kappa_hidden", "kappa_s", "bound", "slack")
    neurons = {
        **{name: np.array([1.5 + k, np.nan]) for k, name in enumerate(kappas)},
        **{name: np.array([1.0, k]) for k, name in enumerate(counts)},
    }
    return HiddenResult(layer, index, hidden | known, neurons)


def cosines(iterates: int = 3, size: int = 4, **known: Any) -> dict[str, Any]:
    """The last iterate is p* itself, and the last row of the Hessian is zero."""
    cosine = np.linspace(-0.9, 0.9, iterates * size).reshape(iterates, size)
    cosine[-1] = cosine[:, -1] = np.nan
    norm = np.append(np.arange(1.0, size), 0.0)
    moving = np.append(np.linspace(0.5, 0.1, iterates - 1), np.nan)
    arrays = {
        "step": 100.0 * np.arange(1, iterates + 1),
        "distance": np.append(np.linspace(2.0, 1.0, iterates - 1), 0.0),
        "cosine": cosine,
        "cosine_low": cosine - 0.05,
        "cosine_high": cosine + 0.05,
        "valid": ~np.isnan(cosine),
        "row_norm": norm,
        "row_norm_low": norm * 0.9,
        "row_norm_high": norm * 1.1,
        "gradient_rms": np.arange(float(size)),
        "quadratic_residual": moving,
        "fraction_above": moving,
    }
    return arrays | known


def full_run(variants: tuple[str, ...] = ("raw", "bnp")) -> Run:
    """The small run with H_e of two layers under each variant, and cosines: valid."""
    small = small_run()
    blocks = tuple(
        replace(block, variants=dict.fromkeys(variants, block.variants["raw"]))
        for block in small.blocks
    )
    layers = (hidden_layer("0", 0), replace(hidden_layer("encoder/2", 10), neurons={}))
    return replace(
        small,
        blocks=blocks,
        variants=variants,
        hidden=dict.fromkeys(variants, layers),
        cosines=cosines(),
    )


def differences(left: Run, right: Run) -> list[str]:
    """Where two runs differ, bit for bit; arrays compare with ``==``, types included."""
    found = [
        name
        for name in ("variants", "provenance", "created_at", "hessdiag_version")
        if getattr(left, name) != getattr(right, name)
    ]
    found += [] if _same_arrays(left.cosines, right.cosines) else ["cosines"]
    found += [] if _same_hidden(left, right) else ["hidden"]
    if [b.name for b in left.blocks] != [b.name for b in right.blocks]:
        return [*found, "block names"]
    for ours, theirs in zip(left.blocks, right.blocks, strict=True):
        if ours.parameters != theirs.parameters or set(ours.variants) != set(theirs.variants):
            found.append(f"{ours.name}: parameters or variants")
            continue
        for variant, result in ours.variants.items():
            other = theirs.variants[variant]
            where = f"{ours.name}, {variant}"
            if dict(result.values) != dict(other.values):
                found += [
                    f"{where}: {name}"
                    for name in {*result.values, *other.values}
                    if result.values.get(name, "?") != other.values.get(name, "?")
                ]
            for kind in ("spectrum", "rows"):
                same = _same_arrays(getattr(result, kind), getattr(other, kind))
                found += [] if same else [f"{where}: {kind}"]
    return found


def _same_arrays(mine: Any, its: Any) -> bool:
    return mine.keys() == its.keys() and all(
        mine[name].dtype == its[name].dtype
        and np.array_equal(mine[name], its[name], equal_nan=mine[name].dtype.kind == "f")
        for name in mine
    )


def _same_hidden(left: Run, right: Run) -> bool:
    def flat(run: Run) -> list[tuple[str, str, int]]:
        return [(v, f.layer, f.index) for v, found in run.hidden.items() for f in found]

    return flat(left) == flat(right) and all(
        _same_arrays(ours.hidden, theirs.hidden) and _same_arrays(ours.neurons, theirs.neurons)
        for variant in left.hidden
        for ours, theirs in zip(left.hidden[variant], right.hidden[variant], strict=True)
    )
