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
from hessdiag.feature_range import Range, stretch
from hessdiag.hidden import Change, hidden_matrices, rank_and_kappa
from hessdiag.neuron_passes import SECONDS, Passes, diagonal
from hessdiag.run import HiddenResult
from hessdiag.variants.scene import NotApplicable

Array = NDArray[np.float64]

MOST_FEATURES = 511
MOST_NEURONS = 1024
MOST_NUMBERS = 5 * 10**7
"""Of inputs and curvatures of one layer, which are held at once."""
MOST_WORK = 4 * 10**11
"""Flops of one layer's backward passes and factorisations: about 20 s of a core."""
RESOLVED = 0.005
"""What rounding of the inputs may do to κ, relatively: the last of three digits."""
ZERO = 100.0  # ε of the neuron's largest curvature: below, a curvature is rounding noise


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
    return _observe(objective, layer, None, keep=False).curvature


def observe_neurons(objective: Objective, layer: Layer) -> Observed:
    """The inputs and curvatures of a layer's neurons, as far as the theorem and memory allow.

    Raises:
        NotApplicable: As for :func:`neuron_curvature`, the layer is too large, or its backward
            passes turn out to take more than 20 s.
    Cost:
        As for :func:`neuron_curvature`, 20 s at most; samples · (features + outputs) numbers.
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
        (passes + factorisations, MOST_WORK, "flops", fewer),
    ):
        if count > most:
            raise NotApplicable(
                f"{count:.6g} {what} are more than the {most:.6g} up to which neurons are taken "
                f"apart{remedy}"
            )
    return _observe(objective, layer, SECONDS, keep=True)


def _check_kind(layer: Layer) -> None:
    if layer.kind != "linear":
        raise NotApplicable("the positions of a convolution share its weights: S is not diagonal")
    if layer.shared:
        raise NotApplicable("its weights are tied to another module's: theorem 3 does not hold")


def _observe(objective: Objective, layer: Layer, seconds: float | None, *, keep: bool) -> Observed:
    _check_kind(layer)
    module: Any = layer.module
    parameters: list[nn.Parameter] = [
        p
        for p in (module._parameters.get("weight"), module._parameters.get("bias"))
        if p is not None
    ]
    rows: list[Tensor] = []
    curvatures: list[Tensor] = []
    passes = Passes.of(objective, layer, seconds)
    with only(parameters):
        for batch, share in objective:
            inputs, offset, loss = _with_offset(objective, layer, batch)
            try:
                curvatures.append(diagonal(share * loss, inputs, offset, parameters, passes))
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
        row rank. Where rounding of the inputs (``ε |h| / s`` after a change that stretches
        them by 1/s) reaches the third digit of κ, κ of H_e and of the Hessian, bound and slack
        are NaN.
    Cost:
        O(samples · features²) flops for each neuron.
    Source:
        maths 4.1, 4.2; κ₊ and its tolerance by 1.1. A neuron that is positive definite by its
        factors is solved through them, to relative accuracy (1.6 iv).
    """
    given = observed.rows.double().cpu()
    eps = torch.finfo(observed.rows.dtype).eps
    rows, rounding = given, torch.zeros(len(given), dtype=torch.float64)
    if change is not None:
        rows = change(given)
        before, after = Range(), Range()
        before.add(given)
        after.add(rows)
        rounding = eps * (given * stretch(before, after)).norm(dim=1)
    if observed.layer.bias is not None:
        rows = torch.cat([torch.ones(len(rows), 1, dtype=rows.dtype), rows], dim=1)
    curvature = observed.curvature.double().cpu()
    neuron = _Neuron(rows, rounding, eps)
    found = [neuron.factors(entries) for entries in curvature]
    return {name: np.array([each[name] for each in found]) for name in NAMES}


NAMES = (
    *("kappa_hessian", "kappa_hidden", "kappa_s", "bound", "slack"),
    *("s_positive", "s_negative", "s_zero"),
)


class _Neuron:
    """The neurons of one layer in turn; what all samples share is computed once."""

    def __init__(self, rows: Tensor, rounding: Tensor, eps: float) -> None:
        self.rows = rows
        self.rounding = rounding  # of each row, its 2-norm
        self.eps = eps
        self._all: tuple[int, float, float] | None = None

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
        rounding = self.rounding[active]
        found["kappa_s"] = float(entries.abs().max() / entries.abs().min())
        rank, kappa, top = self._hidden(rows)
        if float(rounding.norm()) * kappa > RESOLVED * top:
            return found
        found["kappa_hidden"] = kappa
        roots = entries.abs().sqrt()
        error = 2 * float((roots * rounding).norm())
        if negative == 0 and rank == rows.shape[1]:
            values = torch.linalg.svdvals(roots[:, None] * rows)
            _, root = rank_and_kappa(values, max(rows.shape), self.eps)
            if error * root > RESOLVED * float(values[0]):
                return found
            found["kappa_hessian"] = root**2
            found["bound"] = kappa**2 * found["kappa_s"]
            found["slack"] = found["bound"] / found["kappa_hessian"]
        else:
            kappa, top = self._by_eigenvalues(rows, entries)
            if error * float((roots[:, None] * rows).norm()) * kappa <= RESOLVED * top:
                found["kappa_hessian"] = kappa
        return found

    def _hidden(self, rows: Tensor) -> tuple[int, float, float]:
        """Rank, κ₊ and the largest singular value."""
        if len(rows) == len(self.rows) and self._all is not None:
            return self._all
        values = torch.linalg.svdvals(rows)
        found = (*rank_and_kappa(values, max(rows.shape), self.eps), float(values[0]))
        if len(rows) == len(self.rows):
            self._all = found
        return found

    def _by_eigenvalues(self, rows: Tensor, entries: Tensor) -> tuple[float, float]:
        """κ₊, and the largest eigenvalue."""
        values = torch.linalg.eigvalsh((rows.T * entries) @ rows)
        tolerance = 10 * max(len(values), 10) * self.eps * float(values.abs().max())
        above = values[values > tolerance]
        return (float(above[-1] / above[0]), float(above[-1])) if len(above) else (math.nan, 0.0)
