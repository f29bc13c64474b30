"""H_e of one layer in print, and what it says about the worst layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from hessdiag.errors import OptionError
from hessdiag.plain import printable
from hessdiag.quantity import Quantity
from hessdiag.run import HiddenResult, Run
from hessdiag.tables.grid import NONE, grid, number
from hessdiag.tables.labels import shortened, some_of
from hessdiag.tables.lines import TIED, printed, wrapped
from hessdiag.tables.marks import MEANINGS, certified, near_one
from hessdiag.tables.neurons import NEURON_LEGEND, neuron_lines
from hessdiag.tables.reasons import layer_sentence, span
from hessdiag.tables.summary import run_title
from hessdiag.variants.grammar import RAW

Array = NDArray[np.float64]
EXTREMES = 3
LISTED = 12
NAME_WIDTH = 40
ALONG = 0.99  # |cosine| to the row of ones from which a feature is told to be along it
EPS = {"float64": 2.0**-52, "float32": 2.0**-23}
LEGEND = (
    "κ(H_e): largest / smallest positive singular value of H_e",
    "span: largest / smallest norm that is not zero",
    "dead: zero for every position",
    "constant: the same at every position",
)


def hidden_table(
    run: Run,
    layer: str,
    *,
    variant: str | None = None,
    width: int = 100,
    color: bool = False,
) -> str:
    """H_e of one layer under every variant that changes it: why the layer is ill-conditioned.

    Args:
        run: A run that holds H_e.
        layer: Name of a Linear or convolution layer.
        variant: Show this one alone; by default all, and the features of raw.
        width: Columns of the terminal; below about 80 the lines may run over.
        color: Use ANSI colours; without, the text is plain.
    Returns:
        Lines, each ended by a newline.
    Raises:
        OptionError: The run holds no H_e, none of this layer, or none under this variant.
    """
    found = _of_layer(run, layer)
    if variant is not None:
        if variant not in found:
            raise OptionError(
                f"variant {variant!r} does not change what layer {layer!r} sees, so it has no "
                f"H_e of its own; there is one under: {', '.join(found)}"
            )
        found = {variant: found[variant]}
    shown = variant or (RAW if RAW in found else next(iter(found)))
    eps = _eps(run)
    lines = [*wrapped(run_title(run, variant or RAW, ()), width, "bold")]
    lines += [*wrapped(_shape(found[shown], layer), width, "bold"), Text()]
    lines += [*_overview(found, eps), Text()]
    lines += [*_features(found[shown], shown, width), Text()]
    neurons = {name: result.neurons for name, result in found.items()}
    lines += neuron_lines(neurons, width)
    sentence = layer_sentence(run, layer)
    if sentence:
        lines += [Text(), *wrapped(f"{sentence[0].upper()}{sentence[1:]}.", width, "bold")]
    lines += [Text(), *wrapped(_legend(found, any(neurons.values()), eps), width, "dim")]
    owners: dict[str, list[str]] = {}
    for name, result in found.items():
        for remark in _remarks(result):
            owners.setdefault(remark, []).append(printable(name))
    for remark, names in owners.items():
        lines += wrapped(f"- {', '.join(names)}: {remark}", width, indent="  ")
    return printed(lines, width, color=color)


def _of_layer(run: Run, layer: str) -> dict[str, HiddenResult]:
    layers = list(dict.fromkeys(r.layer for results in run.hidden.values() for r in results))
    if not layers:
        raise OptionError(
            "the run holds no H_e: its network has no Linear or convolution layer whose inputs "
            "were seen, or it is older than this hessdiag; analyse the checkpoint again"
        )
    if layer not in layers:
        near = get_close_matches(layer, layers, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(
            f"the run has no H_e of a layer {layer!r}; {hint}"
            f"it has: {some_of(layers, LISTED, NAME_WIDTH)}"
        )
    return {
        variant: result
        for variant in run.variants
        for result in run.hidden.get(variant, ())
        if result.layer == layer
    }


def _eps(run: Run) -> float:
    dtypes = (r["dtype"] for block in run.blocks for r in block.variants.values())
    return next((EPS[dtype] for dtype in dtypes if dtype in EPS), EPS["float64"])


def _scalar(result: HiddenResult, name: str) -> float:
    return float(result.hidden[name]) if name in result.hidden else math.nan


def _positions(result: HiddenResult) -> int:
    """Row 0 is that of ones, so its norm is the root of their number."""
    return round(float(result.hidden["row_norm"][0]) ** 2)


def _kappa(result: HiddenResult, eps: float) -> Quantity:
    """κ₊ of H_e: exact within rounding, a lower bound with a singular value at the tolerance."""
    kappa = _scalar(result, "kappa")
    if math.isnan(kappa) or "singular_value" not in result.hidden:
        return Quantity.unresolved()
    values = result.hidden["singular_value"]
    size = max(len(result.hidden["row_norm"]), _positions(result))
    share = values / values[0] / (10 * size * eps)
    error = (len(values) * eps + float(result.hidden.get("input_error", 0.0))) * kappa
    if ((share > 0.1) & (share < 10)).any() or error >= 1:
        return Quantity.lower_bound(kappa / (1 + error))
    return Quantity.exact(kappa, max(kappa * (1 - error), 1.0), kappa / (1 - error))


def _shape(result: HiddenResult, layer: str) -> str:
    name = shortened([printable(layer)], NAME_WIDTH)[0] or "the model itself"
    features = len(result.hidden["row_norm"]) - 1
    return (
        f"H_e = [eᵀ; H] of {name}: the row of ones and {features} feature{'s' * (features != 1)}, "
        f"{_positions(result)} positions"
    )


def _overview(found: Mapping[str, HiddenResult], eps: float) -> list[Text]:
    header = [
        ("", "variant"),
        ("", "κ(H_e)"),
        ("", "rank"),
        ("rows", "span"),
        ("columns", "span"),
        ("along", "the ones"),
        ("", "dead"),
        ("con-", "stant"),
    ]
    rows = []
    for name, result in found.items():
        hidden = result.hidden
        dead, constant = hidden["dead"][1:].astype(bool), hidden["constant"][1:].astype(bool)
        along = (np.abs(hidden["bias_cosine"][1:]) > ALONG) & ~constant
        rank = _scalar(result, "rank")
        columns = hidden.get("column_norm")
        rows.append(
            [
                shortened([printable(name)], NAME_WIDTH // 2)[0],
                str(certified(_kappa(result, eps), form=near_one)),
                NONE if math.isnan(rank) else f"{rank:.0f} of {len(hidden['row_norm'])}",
                number(span(hidden["row_norm"])),
                NONE if columns is None else number(span(columns)),
                str(int(along.sum())),
                str(int(dead.sum())),
                str(int((constant & ~dead).sum())),
            ]
        )
    return grid(header, rows)


def _features(result: HiddenResult, variant: str, width: int) -> list[Text]:
    """The rows with extreme norms, and those that say nothing beside the bias."""
    hidden = result.hidden
    norms, cosines = hidden["row_norm"][1:], hidden["bias_cosine"][1:]
    dead = hidden["dead"][1:].astype(bool)
    order = [int(k) for k in np.argsort(-norms, kind="stable") if not dead[k]]
    ends = [(k, "largest") for k in order[:EXTREMES]]
    ends += [(k, "smallest") for k in order[max(len(order) - EXTREMES, len(ends)) :]]
    rows = [[str(k), number(norms[k]), f"{cosines[k]:.4f}", word] for k, word in ends]
    rows.append(["ones", number(float(hidden["row_norm"][0])), "1.0000", "the bias"])
    lines = [Text(f"Rows of H_e under {printable(variant)}; feature k is weight.flatten(1)[:, k]")]
    lines += grid([("", "feature"), ("", "norm"), ("cosine to", "the ones"), ("", "")], rows)
    constant = hidden["constant"][1:].astype(bool) & ~dead
    along = (np.abs(cosines) > ALONG) & ~constant
    nearest = sorted(np.flatnonzero(along), key=lambda k: -abs(cosines[k]))
    for what, which in (
        (f"Along the ones, |cosine| > {ALONG}", nearest),
        ("Constant", list(np.flatnonzero(constant))),
        ("Dead", list(np.flatnonzero(dead))),
    ):
        if which:
            names = some_of([str(k) for k in which], LISTED, NAME_WIDTH)
            lines += wrapped(f"{what}: {names}.", width, indent="  ")
    return lines


def _remarks(result: HiddenResult) -> list[str]:
    rows = len(result.hidden["row_norm"])
    rank = _scalar(result, "rank")
    if math.isnan(rank):
        return [f"{rows - 1} features are too many for singular values"]
    found = []
    if rank < rows:
        found.append(
            f"{rows - rank:.0f} of the {rows} rows add nothing (dead, constant, or a combination "
            "of others); κ is over the rest"
        )
    if _scalar(result, "centring_holds") == 0:
        found.append(
            "centring the features raises κ(H_e) here; theorem 4 is for H_e of full row rank"
        )
    return found


def _legend(found: Mapping[str, HiddenResult], neurons: bool, eps: float) -> str:
    kinds = {certified(_kappa(result, eps)).kind for result in found.values()}
    marks = [f"{kind}{TIED}{meaning}" for kind, meaning in MEANINGS.items() if kind in kinds]
    return " · ".join([*LEGEND, *(NEURON_LEGEND if neurons else ()), *marks])
