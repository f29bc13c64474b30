"""Scales and shifts of normalisation layers, folded into the weights of their neighbours."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.activations import Layer
from hessdiag.curvature.objective import Objective
from hessdiag.variants.edits import Edits
from hessdiag.variants.scene import NotApplicable
from hessdiag.variants.tracing import BATCH_NORMS, Trace


@dataclass
class Folded:
    """What was folded.

    Attributes:
        gone: First names of parameters that are constants now, each with the reason.
        notes: For the table.
        changed: Layers whose inputs are others now.
    """

    gone: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)


def fold_affine(trace: Trace, edits: Edits) -> Folded:
    """Fold the weights and biases of normalisation layers into the Linear layers they feed.

    ``Ŵ = W diag γ``, ``b̂ = b + W β``, ``γ = 1``, ``β = 0``: the function stays. A normalisation
    layer is left as it is, with a note, where its output goes anywhere but straight into Linear
    layers that are called once and own their weights, or where one without a bias would have to
    take up ``β ≠ 0``.

    Source:
        Ye, section 4 after eq. (22); maths.md 4.4.
    """
    folded = Folded()
    kept: list[str] = []
    for name, norm in trace.norms.items():
        gamma, beta = norm._parameters.get("weight"), norm._parameters.get("bias")
        own = [parameter for parameter in (gamma, beta) if parameter is not None]
        if not own or not trace.passages[norm].calls:
            continue
        layers = trace.fed_by(norm)
        shift = beta is not None and bool((beta.data != 0).any())
        if (
            any(trace.owners[id(parameter)] > 1 for parameter in own)
            or not _feeds_only(trace, norm, layers)
            or (shift and any(layer.bias is None for layer in layers))
        ):
            kept += [name] if layers else []  # elsewhere it is no change of a layer's input
            continue
        for layer in layers:
            _fold_before(
                edits,
                layer.module,
                scale=None if gamma is None else gamma.data,
                shift=beta.data if beta is not None and shift else None,
            )
        into = ", ".join(layer.name for layer in layers)
        for parameter, value in ((gamma, 1.0), (beta, 0.0)):
            if parameter is not None:
                edits.set_data(parameter, torch.full_like(parameter.data, value))
                folded.gone[trace.names[id(parameter)]] = f"folded into {into}"
        folded.changed.update(layer.name for layer in layers)
    if kept:
        folded.notes.append(
            f"weight and bias kept: {', '.join(kept)} (not into Linear layers alone that could "
            "take them up)"
        )
    return folded


def fold_batchnorm(objective: Objective, trace: Trace, edits: Edits) -> Folded:
    """Fold the BatchNorm layers away: into the layer before, else into the Linear layers after.

    With ``a = γ / √(σ² + ε)`` and ``c = β - μ a``, the layer before becomes ``diag(a) W`` and
    ``a b + c``; those after become ``W diag(a)`` and ``b + W c``. μ and σ² are the running
    statistics, or in train mode those of the batch, which are constants from then on. A layer
    without a bias gets one where it takes up a shift.

    Raises:
        NotApplicable: There is no BatchNorm, or one has no neighbour to take it up.
    """
    folded = Folded()
    found = {
        name: norm
        for name, norm in trace.norms.items()
        if isinstance(norm, BATCH_NORMS) and trace.passages[norm].calls
    }
    if not found:
        raise NotApplicable("the network has no BatchNorm layer that the loss runs")
    holders = Counter(
        id(parameter)
        for norm in found.values()
        for parameter in norm._parameters.values()
        if parameter is not None
    )
    for name, norm in found.items():
        scale, shift = _batchnorm_map(objective, trace, name, norm)
        before, after = _layer_before(trace, norm), trace.fed_by(norm)
        if before is not None:
            _fold_after(edits, before, scale, shift)
            into = before.name
        elif _feeds_only(trace, norm, after):
            for layer in after:
                _fold_before(edits, layer.module, scale, shift)
            into = ", ".join(layer.name for layer in after)
            folded.changed.update(layer.name for layer in after)
        else:
            raise NotApplicable(
                f"BatchNorm {name} cannot be folded: it neither takes the output of a Linear or "
                "convolution layer alone, nor gives its own to Linear layers alone"
            )
        edits.set_attribute(norm, "forward", _identity)
        for parameter in norm._parameters.values():
            if parameter is None or holders[id(parameter)] < trace.owners[id(parameter)]:
                continue  # something else still uses it
            folded.gone.setdefault(trace.names[id(parameter)], f"folded into {into}")
    made = [
        layer.name
        for layer in trace.layers.values()
        if layer.bias is None and layer.module._parameters.get("bias") is not None
    ]
    if made:
        folded.notes.append(f"new biases take up a BatchNorm's shift in {', '.join(made)}")
    return folded


def _identity(given: Tensor) -> Tensor:
    return given


def _feeds_only(trace: Trace, norm: nn.Module, layers: list[Layer]) -> bool:
    """Whether these Linear layers see every feature of ``norm`` as theirs, and nobody else does."""
    made = trace.passages[norm].made
    if made is None or not layers:
        return False
    by_sample = isinstance(norm, (BATCH_NORMS, nn.GroupNorm))  # its features are dimension 1
    if by_sample and made.ndim != 2:
        return False
    own = norm._parameters.get("weight")
    return (
        (own is None or own.shape == made.shape[-1:])
        and trace.uses[norm] == len(layers)
        and all(layer.kind == "linear" and _free(trace, layer) for layer in layers)
    )


def _layer_before(trace: Trace, norm: nn.Module) -> Layer | None:
    """The layer whose neurons or channels ``norm`` scales, and whose output nobody else takes."""
    source = trace.passages[norm].source
    for layer in trace.layers.values():
        if layer.module is source:
            made = trace.passages[source].made
            kernel: Any = getattr(source, "kernel_size", ())
            by_channel = made is not None and made.ndim == 2 + len(kernel)
            alone = trace.uses[source] == 1 and _free(trace, layer)
            return layer if by_channel and alone else None
    return None


def _free(trace: Trace, layer: Layer) -> bool:
    return trace.passages[layer.module].calls == 1 and not layer.shared


def _batchnorm_map(
    objective: Objective, trace: Trace, name: str, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """``a`` and ``c`` of the layer as the map ``h -> a h + c`` of each channel."""
    batchnorm: Any = norm
    passage = trace.passages[norm]
    if passage.calls != 1 or passage.given is None:
        raise NotApplicable(f"BatchNorm {name} is called {passage.calls} times in a forward pass")
    if norm.training or batchnorm.running_mean is None:
        if len(objective.batches.items) > 1:
            raise NotApplicable(
                f"BatchNorm {name} normalises each of {len(objective.batches.items)} batches by "
                "its own statistics, which no constants can stand for; give the data as one "
                "batch, or analyse in eval mode"
            )
        over = [dim for dim in range(passage.given.ndim) if dim != 1]
        variance, mean = torch.var_mean(passage.given, dim=over, correction=0)
    else:
        mean, variance = batchnorm.running_mean, batchnorm.running_var
    scale = torch.rsqrt(variance + batchnorm.eps)
    if batchnorm.weight is not None:
        scale = scale * batchnorm.weight.data
    shift = -mean * scale
    if batchnorm.bias is not None:
        shift = shift + batchnorm.bias.data
    return scale, shift


def _fold_before(
    edits: Edits, module: nn.Module, scale: Tensor | None, shift: Tensor | None
) -> None:
    """Let a Linear layer do what was done to its input: ``h -> scale h + shift``."""
    linear: Any = module
    weight = linear.weight.data
    if shift is not None:
        _shift_bias(edits, module, weight @ shift)
    if scale is not None:
        edits.set_data(linear.weight, weight * scale)


def _fold_after(edits: Edits, layer: Layer, scale: Tensor, shift: Tensor) -> None:
    """Let a layer do what was done to its output: ``a -> scale a + shift``."""
    module: Any = layer.module
    weight = module.weight.data
    edits.set_data(module.weight, weight * scale.view(-1, *[1] * (weight.ndim - 1)))
    if module.bias is not None:
        edits.set_data(module.bias, module.bias.data * scale)
    _shift_bias(edits, module, shift)


def _shift_bias(edits: Edits, module: nn.Module, by: Tensor) -> None:
    bias = module._parameters.get("bias")
    if bias is None:
        edits.add_bias(module, by)
    else:
        edits.set_data(bias, bias.data + by)
