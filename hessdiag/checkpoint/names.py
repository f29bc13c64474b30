"""A file's tensors for each name of a model; whatever does not fit is listed."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from hessdiag.checkpoint.alignment import Alignment, align
from hessdiag.checkpoint.contents import EXTRA_STATE, Checkpoint, listed
from hessdiag.errors import CheckpointError

COUNTER = "num_batches_tracked"
"""BatchNorm's counter; files from before torch 0.4.1 have none."""

AVERAGED = "n_averaged"
"""How many models torch's AveragedModel (SWA, EMA) has averaged, beside ``module.*``."""

OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.masked_bias$")
"""Buffers that transformers once stored, with what each model declares itself."""

PACKED = (torch.float4_e2m1fn_x2,)
"""Kinds of several numbers to the byte: torch stores them and computes nothing with them."""

LISTED = 12


@dataclass(frozen=True)
class Matched:
    """Weights under the names of ``model.state_dict()``, and what was done to the names."""

    weights: dict[str, Tensor]
    notices: list[str] = field(default_factory=list)


def match_weights(checkpoint: Checkpoint, model: nn.Module) -> Matched:
    """Give each tensor of the model's state dict its value from the file.

    The model is only read. Tied tensors may be missing under all names but one.

    Raises:
        CheckpointError: Names or shapes do not fit, values are not finite, or kinds differ.
    """
    target = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and name.rsplit(".", 1)[-1] != EXTRA_STATE
    }
    stored, notices = _without_count(checkpoint.weights, target)
    alignment = align(stored, target, embedded=checkpoint.embedded, base=_base(model))
    if alignment.rivals:
        raise CheckpointError(_rivals(checkpoint, alignment.rivals))
    notices += _renaming(alignment)
    found = {new: stored[name] for name, new in alignment.renamed.items()}
    found, dropped = _without_disregarded(found, target, model)
    notices += dropped

    aliases: defaultdict[int, list[str]] = defaultdict(list)
    for name, value in target.items():
        aliases[id(value)].append(name)
    weights: dict[str, Tensor] = {}
    for name, value in target.items():
        present = next((alias for alias in (name, *aliases[id(value)]) if alias in found), None)
        if present is not None:
            weights[name] = found[present]
        elif name.rsplit(".", 1)[-1] == COUNTER:
            weights[name] = value.detach().clone()

    _check_fit(checkpoint, target, found, weights)
    _check_kinds(checkpoint, target, weights)
    _check_finite(checkpoint, target, weights)
    _check_tied(checkpoint, aliases.values(), found)
    return Matched(weights, notices)


def _without_count(
    weights: dict[str, Tensor], target: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights without AveragedModel's counter, unless the model is one itself."""
    count = weights.get(AVERAGED)
    averaged = count is not None and count.numel() == 1 and count.dtype == torch.int64
    others = {name: value for name, value in weights.items() if name != AVERAGED}
    if not averaged or AVERAGED in target or not all(n.startswith("module.") for n in others):
        return weights, []
    many = int(weights[AVERAGED])
    return others, [f"the weights are an average over {many} models (torch's AveragedModel)"]


def _base(model: nn.Module) -> str:
    """What files of a transformers model lack when they were saved without its head."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if isinstance(prefix, str) and prefix else ""


def _renaming(alignment: Alignment) -> list[str]:
    notices = []
    if alignment.removed:
        notices.append(f"removed {' and '.join(alignment.removed)} from the names in the file")
    if alignment.added:
        notices.append(f"put '{alignment.added}' before the names in the file")
    if alignment.outside:
        notices.append(
            f"left out {len(alignment.outside)} tensors of the file that are outside of the "
            f"network: {listed(alignment.outside, LISTED)}"
        )
    return notices


def _without_disregarded(
    found: dict[str, Tensor], target: dict[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], list[str]]:
    """Leave out the old buffers in a file that a transformers model itself would leave out."""
    declared = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    if not isinstance(declared, list | set | tuple):
        return found, []
    patterns = [re.compile(p) for p in (*declared, *OLD_BUFFERS) if isinstance(p, str)]
    extra = [n for n in found if n not in target and any(p.search(n) for p in patterns)]
    kept = {name: value for name, value in found.items() if name not in extra}
    notice = f"left out {len(extra)} buffers that the model makes itself: {listed(extra, LISTED)}"
    return kept, [notice] if extra else []


def _rivals(checkpoint: Checkpoint, prefixes: Sequence[str]) -> str:
    prefix = prefixes[0]
    code = (
        f"import torch; s = torch.load({str(checkpoint.path)!r}, map_location='cpu', "
        f"weights_only=True)['state_dict']; torch.save({{k[{len(prefix)}:]: v for k, v in "
        f"s.items() if k.startswith({prefix!r})}}, {checkpoint.path.stem + '-part.pt'!r})"
    )
    return (
        f"{checkpoint.path} holds several networks that fit the task's model, under "
        f"{' and '.join(repr(p) for p in prefixes)}; save the one to diagnose on its own, "
        f"for example\n  python -c {shlex.quote(code)}"
    )


def _check_fit(
    checkpoint: Checkpoint,
    target: dict[str, Tensor],
    found: dict[str, Tensor],
    weights: dict[str, Tensor],
) -> None:
    missing = [name for name in target if name not in weights]
    unexpected = [name for name in found if name not in target]
    misshapen = [
        f"{name} (file {_shape(value)}, model {_shape(target[name])})"
        for name, value in weights.items()
        if value.shape != target[name].shape
    ]
    if not (missing or unexpected or misshapen):
        return
    lines = [f"{checkpoint.path} does not fit the task's model"]
    for title, entries in (
        ("in the model, missing in the file", missing),
        ("in the file, unknown to the model", unexpected),
        ("of another shape", misshapen),
    ):
        if entries:
            lines.append(f"  {title} ({len(entries)}): {listed(entries, LISTED)}")
    near = _near_miss(missing, unexpected, target, found)
    if near:
        lines.append(f"  nearest: the model's {near[0]} may be {near[1]} in the file")
    lines.append("Give the task that builds the network which this file was saved from.")
    raise CheckpointError("\n".join(lines))


def _near_miss(
    missing: list[str],
    unexpected: list[str],
    target: dict[str, Tensor],
    found: dict[str, Tensor],
) -> tuple[str, str] | None:
    """A missing and an unexpected name that look alike and have one shape."""
    for name in missing[:LISTED]:
        same = [other for other in unexpected if found[other].shape == target[name].shape]
        close = get_close_matches(name, same, n=1, cutoff=0.5)
        if close:
            return name, close[0]
    return None


def _check_kinds(
    checkpoint: Checkpoint, target: dict[str, Tensor], weights: dict[str, Tensor]
) -> None:
    wrong = [
        f"{name} (file {_kind(value)}, model {_kind(target[name])})"
        for name, value in weights.items()
        if _family(value) != _family(target[name])
    ]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path} holds tensors of another kind than the model "
            f"({len(wrong)}): {listed(wrong, LISTED)}; save the weights as dense real tensors"
        )


def _check_finite(
    checkpoint: Checkpoint, target: dict[str, Tensor], weights: dict[str, Tensor]
) -> None:
    broken = []
    for name, value in weights.items():
        whole = finite(value)
        if bool(whole.all()):
            continue
        model = target[name]
        # An attention mask of -inf is a buffer that the model has built itself.
        constant = not isinstance(model, nn.Parameter) and torch.equal(
            whole, finite(model).to(whole.device)
        )
        if not constant or bool(value.isnan().any()):
            broken.append(f"{name} ({int((~whole).sum())} of {value.numel()})")
    if broken:
        raise CheckpointError(
            f"{checkpoint.path} holds NaN or infinity ({len(broken)} tensors): "
            f"{listed(broken, LISTED)}; "
            "its curvature means nothing, take a checkpoint from before the training diverged"
        )


def _check_tied(
    checkpoint: Checkpoint, groups: Iterable[list[str]], found: dict[str, Tensor]
) -> None:
    for names in groups:
        held = [name for name in names if name in found]
        for other in held[1:]:
            if not torch.equal(found[held[0]], found[other]):
                raise CheckpointError(
                    f"the task's model shares one tensor as {held[0]} and {other}, and "
                    f"{checkpoint.path} holds different values for them; untie them in the task"
                )


def finite(tensor: Tensor) -> Tensor:
    """Where a tensor of any kind is finite."""
    values = tensor.detach()
    if values.is_quantized:
        values = values.dequantize()
    if values.layout != torch.strided:
        values = values.to_dense()
    if values.dtype in PACKED:
        return torch.ones(values.shape, dtype=torch.bool)
    # The 8-bit types cannot be asked directly.
    narrow = values.is_floating_point() and values.element_size() == 1
    return torch.isfinite(values.float() if narrow else values)


def _family(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype in PACKED:
        return "special"
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "integer"


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}".replace("torch.", "")
    return str(tensor.dtype).removeprefix("torch.") + layout


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"
