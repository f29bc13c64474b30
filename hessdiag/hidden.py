"""H_e = [eᵀ; H], what the weights of a layer meet: why the layer is ill-conditioned."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.activations import Inputs, Layer, visit_inputs
from hessdiag.curvature.objective import Objective
from hessdiag.feature_range import Range, stretch
from hessdiag.names import clean_name
from hessdiag.run import HiddenResult
from hessdiag.streamed_qr import SLAB, StreamedQR
from hessdiag.variants.affine import Affine
from hessdiag.variants.coordinates import Coordinates, Joined
from hessdiag_probes.random import gaussian, generator

Array = NDArray[np.float64]
Change = Callable[[Tensor], Tensor]
"""The inputs of a layer, (positions, features), to those under a variant, of the same shape."""

MOST_FEATURES = 6144
"""Above, singular values are left out: two dense problems of that size take a minute."""
MOST_WORK = 5 * 10**11
"""Above so many positions times squared features, they are left out, too: a minute on a core."""
MOST_COLUMNS = 10**6
"""Above, the norms of the columns are not kept."""
MEMORY = 2**30
"""Bytes for the triangular factors of one pass over the data."""
NUMBERS = 2**22
"""Of inputs that are looked at together."""
CONSTANT = 10.0  # ε of the largest entry: a feature that varies less is constant
CENTRED = 100.0  # ε of the raw feature: what centring leaves of a constant one
SLACK = 100.0  # n ε (κ + κ'): what rounding may do to the comparison of two κ
SAME = 1e-9


def hidden_matrices(
    objective: Objective,
    layers: Collection[Layer],
    changes: Mapping[str, Change] | None = None,
    *,
    indices: Mapping[str, int] | None = None,
    reasons: dict[str, str] | None = None,
    memory: int = MEMORY,
) -> list[HiddenResult]:
    """H_e of each layer over the whole dataset, (features + 1, positions), never held at once.

    The columns are all positions of all samples in all calls, unweighted. Of a convolution they
    are its patches; of one with groups, H_e is that of the group with the largest κ. Row 0 is
    there for a layer without a bias, too.

    Args:
        objective: Model on loan, loss and batches.
        layers: Of :func:`hessdiag.activations.find_layers`.
        changes: By layer, what a variant makes of its inputs (see :func:`affine_change`); others
            are taken as they are.
        indices: Of the results, by layer; by default the layer's place in ``named_modules()``.
        reasons: Takes, by layer, why it has no result, or no singular values.
        memory: Bytes for triangular factors; layers beyond it get a pass of their own.
    Returns:
        One result per layer that was called, in the order of ``layers``, without neurons. Above
        6144 features, and above 5e11 numbers times features, ``singular_value`` is left out and κ,
        rank and ``centring_holds`` are NaN;
        above a million positions ``column_norm`` is left out.
    Cost:
        One forward pass (more where ``memory`` asks for them), O(N n²) flops for N positions of n
        features, O(n²) numbers for each layer of the pass.
    Source:
        maths 4.3. QR instead of the Gram matrix, which squares κ and is useless above 1e8.
    """
    places = {clean_name(n): i for i, (n, _) in enumerate(objective.model.named_modules())}
    told: dict[str, str] = {} if reasons is None else reasons
    results = []
    for together in _passes(layers, memory):
        found: dict[str, dict[int, Streamed]] = {layer.name: {} for layer in together}

        def visit(
            layer: Layer, inputs: Inputs, found: dict[str, dict[int, Streamed]] = found
        ) -> None:
            change = None if changes is None else changes.get(layer.name)
            features = inputs.rows.shape[1]
            streamed = found[layer.name].setdefault(inputs.group, Streamed(features, change))
            streamed.add(inputs.rows)

        visit_inputs(objective, together, visit)
        for layer in together:
            groups = [streamed for streamed in found.pop(layer.name).values() if streamed.positions]
            if not groups:
                told[layer.name] = "its forward is never called: its weights are used otherwise"
                continue
            if not all(streamed.finite for streamed in groups):
                told[layer.name] = "its inputs are not finite"
                continue
            if groups[0].factor is None:
                told[layer.name] = (
                    f"singular values are left out for {layer.features} features at "
                    f"{groups[0].positions} positions; --max-examples takes fewer"
                )
            index = places[layer.name] if indices is None else indices[layer.name]
            results.append(HiddenResult(layer.name, index, _worst(groups)))
    return results


def _passes(layers: Collection[Layer], memory: int) -> Iterator[list[Layer]]:
    """The layers in groups whose triangular factors fit, each at least one layer."""
    together: list[Layer] = []
    held = working = 0
    for layer in layers:
        size = layer.features + 1
        factored = size <= MOST_FEATURES
        rows = size + max(SLAB, size)  # the factor, and what waits to be folded into it
        needs = 8 * layer.groups * size * rows if factored else 0
        # LAPACK works on a copy of both, of one layer at a time.
        folding = 16 * size * rows if factored else 0
        if together and held + needs + max(working, folding) > memory:
            yield together
            together, held, working = [], 0, 0
        together.append(layer)
        held += needs
        working = max(working, folding)
    if together:
        yield together


def _worst(groups: list[Streamed]) -> dict[str, Array]:
    """Of the group with the largest κ; of the first where none has one."""
    every = [streamed.arrays() for streamed in groups]
    return max(every, key=lambda arrays: float(np.nan_to_num(arrays["kappa"])))


class Streamed:
    """One H_e in the making: statistics of its rows and columns, and its triangular factor."""

    def __init__(self, features: int, change: Change | None = None) -> None:
        self.change = change
        self.positions = 0
        self.eps = torch.finfo(torch.float64).eps
        self.factor = None if features + 1 > MOST_FEATURES else StreamedQR(features + 1)
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._sizes: Tensor | float = 0.0  # of the inputs before the change, squared
        self._given = Range()
        self._changed = Range()
        self._columns: list[Tensor] = []

    @property
    def finite(self) -> bool:
        """Whether all inputs were."""
        return self._given.finite and self._changed.finite

    def add(self, rows: Tensor) -> None:
        """More columns of H_e, given as rows without their 1, (positions, features)."""
        self.eps = torch.finfo(rows.dtype).eps
        for part in rows.split(max(1, NUMBERS // (rows.shape[1] + 1))):
            if len(part):
                self._add(part.double())

    def _add(self, given: Tensor) -> None:
        seen = given if self.change is None else self.change(given)
        self.positions += len(given)
        self._given.add(given)
        self._changed.add(seen)
        self._sum = self._sum + seen.sum(dim=0)
        squares = seen.square()
        self._squares = self._squares + squares.sum(dim=0)
        if self.change is not None:
            self._sizes = self._sizes + given.square().sum(dim=0)
        if self.positions <= MOST_COLUMNS:
            self._columns.append((squares.sum(dim=1) + 1).sqrt().cpu())
        if self.positions * (seen.shape[1] + 1) ** 2 > MOST_WORK:
            self.factor = None
        if self.factor is not None:
            self.factor.add(torch.cat([torch.ones_like(seen[:, :1]), seen], dim=1))

    def arrays(self) -> dict[str, Array]:
        """What a :class:`hessdiag.run.HiddenResult` holds of H_e."""
        dead = self._dead()
        one = torch.ones(1, dtype=torch.float64)
        norm = _vector(self._squares).sqrt().masked_fill(dead, 0.0)
        row_norm = torch.cat([one * math.sqrt(self.positions), norm])
        cosine = _vector(self._sum) / (math.sqrt(self.positions) * norm)
        cosine = cosine.clamp(-1, 1).masked_fill(dead, math.nan)
        constant = self._changed.constant(CONSTANT * self.eps) | dead
        found: dict[str, Tensor] = {
            "row_norm": row_norm,
            "bias_cosine": torch.cat([one, cosine]),
            "dead": torch.cat([one < 0, dead]),
            "constant": torch.cat([one > 0, constant]),
        }
        if self.positions <= MOST_COLUMNS:
            found["column_norm"] = torch.cat(self._columns)
        found |= self._spectrum(dead)
        return {name: np.asarray(value.numpy()) for name, value in found.items()}

    def _dead(self) -> Tensor:
        """Zero rows, and what rounding leaves of a constant feature that was centred."""
        zero = self._changed.peak == 0
        if self.change is None:
            return zero
        rounding = CENTRED * self.eps * self._given.peak
        left = ~self._changed.constant(CONSTANT * self.eps) | (self._changed.peak <= rounding)
        return zero | (self._given.constant(CONSTANT * self.eps) & left)

    def _spectrum(self, dead: Tensor) -> dict[str, Tensor]:
        nothing = torch.tensor(math.nan, dtype=torch.float64)
        if self.factor is None:
            return {"kappa": nothing, "rank": nothing, "centring_holds": nothing}
        factor = self.factor.result()
        factor[:, torch.cat([dead.new_zeros(1), dead]).to(factor.device)] = 0.0
        values = torch.linalg.svdvals(factor)
        rank, kappa = rank_and_kappa(values, max(factor.shape[1], self.positions), self.eps)
        # Column 0 of H_eᵀ is e, so row 0 of R holds the means, and centring is to zero them.
        centred = factor.clone()
        centred[0, 1:] = 0.0
        after = torch.linalg.svdvals(centred)
        least = float(after[rank - 1])
        reached = float(after[0]) / least if least > 0 else math.inf
        slack = SLACK * factor.shape[1] * self.eps * (kappa + reached)
        return {
            "singular_value": values.cpu(),
            "input_error": torch.tensor(
                self._input_error(dead) / float(values[0]), dtype=torch.float64
            ),
            "kappa": torch.tensor(kappa, dtype=torch.float64),
            "rank": torch.tensor(float(rank), dtype=torch.float64),
            "centring_holds": torch.tensor(
                float(reached <= kappa * (1 + slack)), dtype=torch.float64
            ),
        }

    def _input_error(self, dead: Tensor) -> float:
        """What ε of the inputs, and of the mean that is taken off them, is in H_e: its 2-norm.

        Where nothing is changed that is ε of H_e itself, which every factorisation errs by.
        """
        if self.change is None:
            return 0.0
        by = stretch(self._given, self._changed).masked_fill(dead, 0.0)
        return self.eps * float((by * _vector(self._sizes).sqrt()).norm())


def _vector(value: Tensor | float) -> Tensor:
    return value.cpu() if isinstance(value, Tensor) else torch.zeros(0, dtype=torch.float64)


def rank_and_kappa(values: Tensor, size: int, eps: float) -> tuple[int, float]:
    """The rank and κ₊ at the tolerance 10 · size · ε · s₁, ``size`` being max(rows, columns).

    Args:
        values: Singular values, descending.
        size: The larger dimension of the matrix.
        eps: Of the entries.
    Returns:
        κ₊ = s₁ / the least above the tolerance; NaN for a zero matrix, whose rank is 0.
    """
    top = float(values[0]) if len(values) else 0.0
    above = values[values > 10 * size * eps * top]
    return len(above), top / float(above[-1]) if len(above) else math.nan


def affine_change(coordinates: Coordinates, weight: Tensor, bias: Tensor | None) -> Change | None:
    """What P does to the inputs of a layer, where it is a map of them: ``h' = D (h - mu)``.

    Then ``PᵀHP`` is the Hessian of the layer with the inputs h' and folded parameters, so that
    H_e' = PᵀH_e for every neuron.

    Args:
        coordinates: P of a block that holds the layer.
        weight: Places of the weights in the block's vector, (outputs, features).
        bias: Places of the biases, (outputs,), or None.
    Returns:
        The map, which takes mu off first: ``D h + c`` would lose what the mean hides. None where
        P is no such map, differs between neurons, or changes nothing.
    Cost:
        Three products with Pᵀ.
    Source:
        Of an :class:`hessdiag.variants.affine.Affine` mu is its own, to the last bit; of others
        ``-c / D``, within three roundings.
    """
    size, device = coordinates.size, weight.device

    def unit(places: Tensor) -> Tensor:
        vector = torch.zeros(size, dtype=torch.float64, device=device)
        vector[places] = 1.0
        return coordinates.transposed(vector)

    scale = unit(weight[0])[weight[0]]
    shift = torch.zeros_like(scale) if bias is None else unit(bias[:1])[weight[0]]
    probe = gaussian(size, generator=generator(0, "affine change"), device=device)
    found = coordinates.transposed(probe)
    scaled = probe[weight] * scale
    shifted = torch.zeros_like(scaled)
    if bias is not None:
        shifted = probe[bias, None] * shift
        if bool(((found[bias] - probe[bias]).abs() > SAME * probe[bias].abs()).any()):
            return None
    error = (found[weight] - scaled - shifted).abs()
    if bool((error > SAME * (scaled.abs() + shifted.abs())).any()):
        return None
    if bool((scale == 1).all() and (shift == 0).all()):
        return None
    own = None if bias is None else _own_mean(coordinates, torch.cat([weight.reshape(-1), bias]))
    mean = -shift / scale if own is None else own
    return lambda rows: (rows - mean.to(rows)) * scale.to(rows)


def _own_mean(coordinates: Coordinates, places: Tensor) -> Tensor | None:
    """Mu of the part of P that is an ``Affine`` of just these places."""
    if isinstance(coordinates, Joined):
        for where, part in coordinates.parts:
            if isinstance(part, Affine) and torch.equal(where.to(places), places):
                return part.mean[0]
    whole = torch.arange(coordinates.size, device=places.device)
    if isinstance(coordinates, Affine) and torch.equal(whole, places):
        return coordinates.mean[0]
    return None
