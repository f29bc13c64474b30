"""Theorem 3, neuron by neuron: a neuron's Hessian is H_e S H_eᵀ, S the curvature of its input."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hessdiag.activations import Layer, layer_inputs, watched
from hessdiag.curvature.objective import Objective, only
from hessdiag.data import row_count
from hessdiag.errors import is_out_of_memory
from hessdiag.hidden import Change, hidden_matrices, rank_and_kappa
from hessdiag.run import HiddenResult
from hessdiag.variants.scene import NotApplicable
from hessdiag_probes.random import gaussian, generator, rademacher

Array = NDArray[np.float64]

MOST_FEATURES = 511
MOST_NEURONS = 1024
MOST_NUMBERS = 5 * 10**7
"""Of inputs and curvatures of one layer, which are held at once."""
MOST_WORK = 10**12
"""Flops of one layer's backward passes and factorisations: about a minute."""
MOST_PASSES = 30_000
"""Backward passes over batches, however small these are: about a minute, too."""
ZERO = 100.0  # ε of the neuron's largest curvature: below, a curvature is rounding noise
AGREES = 1e-8  # relative, of two ways to a gradient in float64
AGREES_NARROW = 1e-4


@dataclass(frozen=True)
class Observed:
    """One layer, sample by sample.

    Attributes:
        layer: Whose neurons they are.
        rows: Inputs h_j, (samples, features), in the dtype of the analysis.
        curvature: Diagonals of S, (outputs, samples): ∂²L/∂a_ij², L being the dataset mean.
    """

    layer: Layer
    rows: Tensor
    curvature: Tensor


def explain_layers(
    objective: Objective,
    layers: Collection[Layer],
    changes: Mapping[str, Change] | None = None,
    *,
    indices: Mapping[str, int] | None = None,
    observed: dict[str, Observed | str] | None = None,
    reasons: dict[str, str] | None = None,
) -> list[HiddenResult]:
    """H_e of each layer under one variant, with the factors of its neurons where they exist.

    Args:
        objective: Model on loan, loss and batches.
        layers: Of :func:`hessdiag.activations.find_layers`.
        changes: By layer, what the variant makes of its inputs.
        indices: As for :func:`hessdiag.hidden.hidden_matrices`.
        observed: Keeps what was observed of the neurons of each layer, or why nothing was, for
            the next variant on the same network, whose S is the same.
        reasons: As for :func:`hessdiag.hidden.hidden_matrices`.
    """
    known: dict[str, Observed | str] = {} if observed is None else observed
    by_name = {layer.name: layer for layer in layers}
    found = hidden_matrices(objective, layers, changes, indices=indices, reasons=reasons)
    complete = []
    for result in found:
        if result.layer not in known:
            try:
                known[result.layer] = observe_neurons(objective, by_name[result.layer])
            except NotApplicable as reason:
                known[result.layer] = str(reason)
        seen = known[result.layer]
        if isinstance(seen, Observed):
            change = None if changes is None else changes.get(result.layer)
            complete.append(replace(result, neurons=neuron_factors(seen, change)))
        else:
            complete.append(result)
    return complete


def neuron_curvature(objective: Objective, layer: Layer) -> Tensor:
    """``∂²L/∂a_ij²`` of every neuron i and sample j, (outputs, samples).

    L is the mean over the dataset, so the entries hold the samples' shares: of N samples that
    weigh the same, 1/N times the second derivative of the sample's own loss.

    Raises:
        NotApplicable: Theorem 3 does not hold for the layer; the message says why.
    Cost:
        One forward and two backward passes per batch, and one more backward pass per neuron.
    Source:
        maths 4.1: a second derivative by an offset added to the pre-activations. That samples do
        not interact, and that the weights act through the offset place alone, is checked.
    """
    return _observe(objective, layer, keep=False).curvature


def observe_neurons(objective: Objective, layer: Layer) -> Observed:
    """The inputs and curvatures of a layer's neurons, as far as the theorem and memory allow.

    Raises:
        NotApplicable: As for :func:`neuron_curvature`, or the layer is too large.
    Cost:
        As for :func:`neuron_curvature`; samples · (features + outputs) numbers.
    """
    _check_kind(layer)
    samples, width = objective.batches.rows, layer.features + 1
    parameters = sum(parameter.numel() for parameter in objective.model.parameters())
    passes = 8 * layer.outputs * samples * parameters
    factorisations = 4 * layer.outputs * (samples + width) * width**2
    fewer = "; take fewer samples with --max-examples"
    for count, most, what, remedy in (
        (layer.features, MOST_FEATURES, "features", ""),
        (layer.outputs, MOST_NEURONS, "neurons", ""),
        (samples * (layer.features + layer.outputs), MOST_NUMBERS, "inputs and curvatures", fewer),
        (layer.outputs * len(objective.batches.items), MOST_PASSES, "backward passes", fewer),
        (passes + factorisations, MOST_WORK, "flops", fewer),
    ):
        if count > most:
            raise NotApplicable(
                f"{count:.6g} {what} are more than the {most:.6g} up to which neurons are taken "
                f"apart{remedy}"
            )
    return _observe(objective, layer, keep=True)


def _check_kind(layer: Layer) -> None:
    if layer.kind != "linear":
        raise NotApplicable("the positions of a convolution share its weights: S is not diagonal")
    if layer.shared:
        raise NotApplicable("its weights are tied to another module's: theorem 3 does not hold")


def _observe(objective: Objective, layer: Layer, *, keep: bool) -> Observed:
    _check_kind(layer)
    module: Any = layer.module
    parameters: list[nn.Parameter] = [
        p
        for p in (module._parameters.get("weight"), module._parameters.get("bias"))
        if p is not None
    ]
    rows: list[Tensor] = []
    curvatures: list[Tensor] = []
    with only(parameters):
        for batch, share in objective:
            inputs, offset, loss = _with_offset(objective, layer, batch)
            try:
                curvatures.append(_diagonal(share * loss, inputs, offset, parameters))
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise NotApplicable(
                    f"the loss has no second derivative in its outputs: {error}"
                ) from error
            if keep:
                rows.append(inputs)
    return Observed(
        layer, torch.cat(rows) if keep else torch.empty(0), torch.cat(curvatures, dim=1)
    )


def _with_offset(objective: Objective, layer: Layer, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's inputs, a zero added to its outputs, and the batch's loss that depends on it."""
    values: list[Tensor] = []
    offsets: list[Tensor] = []

    def add_offset(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        offsets.append(torch.zeros_like(output, requires_grad=True))
        return output + offsets[-1]

    handle = layer.module.register_forward_hook(add_offset)
    try:
        with watched([layer], lambda _layer, value: values.append(value.detach())):
            loss = objective.evaluate(batch)
    finally:
        handle.remove()
    if not values:
        raise NotApplicable("its forward is never called: its weights are used otherwise")
    if len(values) > 1:
        raise NotApplicable("each sample uses its weights several times: theorem 3 does not hold")
    (inputs,) = layer_inputs(layer, values[0], row_count(batch))
    if len(inputs.rows) != inputs.samples:
        raise NotApplicable(
            "the positions of a sample share its weights: S is not diagonal over positions"
        )
    return inputs.rows, offsets[0], loss


def _diagonal(loss: Tensor, rows: Tensor, offset: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """``∂²loss/∂a_ij²``, (outputs, samples of the batch)."""
    outputs = offset.shape[-1]
    if not loss.requires_grad:
        return offset.new_zeros(outputs, offset.numel() // outputs)

    def derivative(of: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(
            of, offset, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return found.detach().reshape(-1, outputs)

    first, *direct = torch.autograd.grad(
        loss,
        [offset, *parameters],
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    gradient = first.reshape(-1, outputs)
    _check_path(gradient.detach(), rows, [part.detach() for part in direct])
    if not gradient.requires_grad:
        return torch.zeros_like(gradient).T
    samples = len(gradient)
    made = generator(0, "interaction of samples")
    weight = gaussian(outputs, generator=made, dtype=loss.dtype, device=loss.device)
    sign = rademacher(samples, generator=made, dtype=loss.dtype, device=loss.device)[:, None]
    together = derivative((gradient * weight).sum())
    alone = derivative((gradient * weight * sign).sum()) * sign
    if float((together - alone).norm()) > _agreement(loss) * float(together.norm() + alone.norm()):
        raise NotApplicable(
            "the loss of a sample depends on other samples (batch normalisation in train mode, "
            "or a loss that compares samples): S is not diagonal"
        )
    return torch.stack([derivative(gradient[:, i].sum())[:, i] for i in range(outputs)])


def _agreement(value: Tensor) -> float:
    return AGREES if value.dtype == torch.float64 else AGREES_NARROW


def _check_path(gradient: Tensor, rows: Tensor, direct: list[Tensor]) -> None:
    """The weights' own gradient is Σ g_j ĥ_jᵀ where they act through the layer's outputs alone."""
    through = (gradient.T @ rows, gradient.sum(dim=0))
    sizes = (gradient.abs().T @ rows.abs(), gradient.abs().sum(dim=0))
    for have, want, size in zip(direct, through, sizes, strict=False):
        scale = float(have.norm()) + float(size.norm())
        if float((have - want).norm()) > _agreement(have) * scale:
            raise NotApplicable(
                "its weights act outside of its forward, too (a derivative by the inputs, a "
                "penalty, another use): theorem 3 does not hold"
            )


def neuron_factors(observed: Observed, change: Change | None = None) -> dict[str, Array]:
    """κ of every neuron's Hessian, of its factors, and the bound of theorem 3.

    Args:
        observed: Of the layer.
        change: What a variant makes of its inputs; S is then the same.
    Returns:
        The arrays of :class:`hessdiag.run.HiddenResult`, (neurons,) each. Samples of zero
        curvature (an inactive ReLU) are dropped: ``kappa_hidden`` is κ₊ of the other columns of
        H_e, without its row of ones where the layer has no bias; ``kappa_s`` is max |S| / min |S|
        over them. ``bound`` and ``slack`` are NaN where S has negative entries or H_e lacks full
        row rank.
    Cost:
        O(samples · features²) flops for each neuron.
    Source:
        maths 4.1, 4.2; κ₊ and its tolerance by 1.1. A neuron that is positive definite by its
        factors is solved through them, to relative accuracy (1.6 iv).
    """
    rows = observed.rows.double().cpu()
    if change is not None:
        rows = change(rows)
    if observed.layer.bias is not None:
        rows = torch.cat([torch.ones(len(rows), 1, dtype=rows.dtype), rows], dim=1)
    curvature = observed.curvature.double().cpu()
    neuron = _Neuron(rows, torch.finfo(observed.rows.dtype).eps)
    found = [neuron.factors(entries) for entries in curvature]
    return {name: np.array([each[name] for each in found]) for name in NAMES}


NAMES = (
    *("kappa_hessian", "kappa_hidden", "kappa_s", "bound", "slack"),
    *("s_positive", "s_negative", "s_zero"),
)


class _Neuron:
    """The neurons of one layer in turn; what all samples share is computed once."""

    def __init__(self, rows: Tensor, eps: float) -> None:
        self.rows = rows
        self.eps = eps
        self._all: tuple[int, float] | None = None

    def factors(self, curvature: Tensor) -> dict[str, float]:
        size = curvature.abs()
        active = size > ZERO * self.eps * size.max()
        positive, negative = int((curvature[active] > 0).sum()), int((curvature[active] < 0).sum())
        found = dict.fromkeys(NAMES, math.nan) | {
            "s_positive": float(positive),
            "s_negative": float(negative),
            "s_zero": float(len(curvature) - positive - negative),
        }
        if not positive + negative:
            return found
        rows, entries = self.rows[active], curvature[active]
        rank, kappa = self._hidden(rows)
        found["kappa_hidden"] = kappa
        found["kappa_s"] = float(entries.abs().max() / entries.abs().min())
        if negative == 0 and rank == rows.shape[1]:
            values = torch.linalg.svdvals(entries.sqrt()[:, None] * rows)
            _, root = rank_and_kappa(values, max(rows.shape), self.eps)
            found["kappa_hessian"] = root**2
            found["bound"] = kappa**2 * found["kappa_s"]
            found["slack"] = found["bound"] / found["kappa_hessian"]
        else:
            found["kappa_hessian"] = self._by_eigenvalues(rows, entries)
        return found

    def _hidden(self, rows: Tensor) -> tuple[int, float]:
        if len(rows) < len(self.rows):
            return rank_and_kappa(torch.linalg.svdvals(rows), max(rows.shape), self.eps)
        if self._all is None:
            self._all = rank_and_kappa(torch.linalg.svdvals(rows), max(rows.shape), self.eps)
        return self._all

    def _by_eigenvalues(self, rows: Tensor, entries: Tensor) -> float:
        values = torch.linalg.eigvalsh((rows.T * entries) @ rows)
        tolerance = 10 * max(len(values), 10) * self.eps * float(values.abs().max())
        above = values[values > tolerance]
        return float(above[-1] / above[0]) if len(above) else math.nan
