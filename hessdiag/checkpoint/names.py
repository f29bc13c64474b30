"""The names of a file made the names of a model; whatever does not fit is listed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from hessdiag.checkpoint.contents import EXTRA_STATE, Checkpoint
from hessdiag.errors import CheckpointError

ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Components that torch's wrappers put into names, also of submodules."""

PARALLEL = "module"
"""What DataParallel and its kin put before every name; a submodule may be called so too."""

COUNTER = "num_batches_tracked"
"""BatchNorm's counter; files from before torch 0.4.1 have none."""

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
    renamed, removed = align(checkpoint.weights, target)
    found = {renamed[name]: value for name, value in checkpoint.weights.items()}
    notices = [f"removed {' and '.join(removed)} from the names in the file"] if removed else []

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


def align(names: Iterable[str], wanted: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Rename ``names`` so that as many as possible are among ``wanted``, removing wrappers only.

    Returns:
        The new name of each, which is the model's own where it fits, and the prefixes that
        were removed from the names in the file.
    """
    own, theirs = list(names), list(wanted)
    best: dict[str, str] = {name: name for name in own}
    best_score = len(set(own) & set(theirs))
    removed: list[str] = []
    for here in _unwrapped(own):
        for there in _unwrapped(theirs):
            back = dict(zip(there, theirs, strict=True))
            score = len(set(here) & set(back))
            if score > best_score and len(set(here)) == len(here) and len(back) == len(theirs):
                best_score = score
                best = {name: back.get(new, new) for name, new in zip(own, here, strict=True)}
                removed = _removed(own, here)
    return best, removed


def _unwrapped(names: Sequence[str]) -> Iterator[list[str]]:
    """The names as they are, without wrappers, and without one, two, … common ``module.``."""
    yield list(names)
    bare = [".".join(part for part in name.split(".") if part not in ANYWHERE) for name in names]
    yield bare
    while bare and all(name.startswith(f"{PARALLEL}.") for name in bare):
        bare = [name.removeprefix(f"{PARALLEL}.") for name in bare]
        yield bare


def _removed(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The wrappers that are in some name before and not after, as a person would write them."""
    lost: dict[str, None] = {}
    for old, new in zip(before, after, strict=True):
        for part in (PARALLEL, *ANYWHERE):
            if old.split(".").count(part) > new.split(".").count(part):
                lost[f"'{part}.'"] = None
    return list(lost)


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
            lines.append(f"  {title} ({len(entries)}): {_listed(entries)}")
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
            f"({len(wrong)}): {_listed(wrong)}; save the weights as dense real tensors"
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
            f"{checkpoint.path} holds NaN or infinity ({len(broken)} tensors): {_listed(broken)}; "
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
    # The 8-bit types cannot be asked directly.
    narrow = values.is_floating_point() and values.element_size() == 1
    return torch.isfinite(values.float() if narrow else values)


def _family(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "special"
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "integer"


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}".replace("torch.", "")
    return str(tensor.dtype).removeprefix("torch.") + layout


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _listed(entries: Sequence[str]) -> str:
    return ", ".join(entries[:LISTED]) + (", …" if len(entries) > LISTED else "")
