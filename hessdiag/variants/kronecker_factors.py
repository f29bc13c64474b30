"""The two factors of K-FAC: second moments of a layer's inputs, and curvature at its outputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.activations import Layer, layer_inputs, watched
from hessdiag.curvature.ggn import Split, split
from hessdiag.curvature.objective import only
from hessdiag.errors import TaskError
from hessdiag.variants.parts import SIDE_LIMIT
from hessdiag.variants.scene import Scene
from hessdiag_probes.random import gaussian, generator, rademacher

OUTPUT_LIMIT = 128
"""Most outputs per sample for which G is exact: each costs a backward pass."""


class _NotExactError(Exception):
    """Why G cannot be the exact Gauss–Newton one; never leaves this module."""


@dataclass(frozen=True)
class Moment:
    """A second moment: its matrix, (size, size), None beyond :data:`SIDE_LIMIT`.

    Attributes:
        size: Of the matrix.
        matrix: In float64.
        mean: Its mean eigenvalue.
    """

    size: int
    matrix: Tensor | None
    mean: float

    def without_last(self) -> Moment:
        """Of x without its last entry, where that is 1."""
        size = self.size - 1
        if self.matrix is None:
            return Moment(size, None, max(0.0, self.mean * self.size - 1) / size)
        matrix = self.matrix[:size, :size]
        return Moment(size, matrix, float(matrix.trace()) / size)


@dataclass(frozen=True)
class Factors:
    """Of one layer.

    Attributes:
        inputs: A = mean of ĥ ĥᵀ over positions, ĥ = (h, 1) where the layer has a bias, else h.
        outputs: G = ``Σ_positions Jᵀ Λ J``, a mean over samples, Λ the loss's Hessian in the
            network's outputs; or the second moment of the loss's gradients.
        calls: How often the layer's forward is called in a batch, at most.
    """

    inputs: Moment
    outputs: Moment
    calls: int


@dataclass(frozen=True)
class Collected:
    """The factors of several layers, and how G was made.

    Attributes:
        layers: By name.
        empirical: Why G is made of gradients; None where it is exact.
    """

    layers: Mapping[str, Factors]
    empirical: str | None


def collect(scene: Scene, layers: Collection[Layer]) -> Collected:
    """Factors of these layers over the dataset.

    Args:
        scene: Its objective is evaluated.
        layers: Without groups, and not shared.
    Cost:
        A pass over the data, with a backward pass per output of a sample where G is exact, else
        with one.
    Source:
        Martens, Grosse (2015) for Linear, Grosse, Martens (2016) for convolutions; G is theirs
        times the positions and A is theirs divided by them.
    """
    try:
        return Collected(_collect(scene, layers, _exact), None)
    except _NotExactError as reason:
        return Collected(_collect(scene, layers, _empirical), str(reason))


Pull = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Terms = Generator[tuple[Sequence[Tensor], float]]
"""What a batch adds to G: gradients at the layers' outputs, and their weight."""


@dataclass
class _Seen:
    """What the layers were given and gave, while a batch is evaluated."""

    layers: Sequence[Layer]
    inputs: list[tuple[Layer, Tensor]] = field(default_factory=list)
    outputs: list[tuple[Layer, Tensor]] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [
            p for layer in self.layers for p in layer.module._parameters.values() if p is not None
        ]


class _Sum:
    """A weighted sum of x xᵀ."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.matrix: Tensor | None = None
        self.trace = 0.0
        self.weight = 0.0

    def add(self, rows: Tensor, weight: float) -> None:
        """Every row x of (positions, size), each with this weight."""
        wide = rows.detach().double()
        self.trace += weight * float(wide.square().sum())
        self.weight += weight * len(wide)
        if self.size <= SIDE_LIMIT:
            product = weight * (wide.T @ wide)
            self.matrix = product if self.matrix is None else self.matrix.add_(product)

    def moment(self, weight: float) -> Moment:
        """The sum over ``weight``."""
        matrix = None if self.matrix is None else self.matrix / weight
        return Moment(self.size, matrix, self.trace / weight / self.size)


def _collect(
    scene: Scene,
    layers: Collection[Layer],
    terms: Callable[[Scene, Any, float, _Seen], Terms],
) -> dict[str, Factors]:
    inputs = {layer.name: _Sum(layer.features + (layer.bias is not None)) for layer in layers}
    outputs = {layer.name: _Sum(layer.outputs) for layer in layers}
    most = {layer.name: 0 for layer in layers}
    for batch, share in scene.objective:
        seen = _Seen(list(layers))
        with closing(terms(scene, batch, share, seen)) as each:
            for pulled, weight in each:
                for (layer, _), gradient in zip(seen.outputs, pulled, strict=True):
                    outputs[layer.name].add(_positions(layer, gradient), weight)
        calls = Counter(layer.name for layer, _ in seen.inputs)
        most = {name: max(count, calls[name]) for name, count in most.items()}
        for layer, value in seen.inputs:
            for given in layer_inputs(layer, value.detach()):
                rows = given.rows
                if layer.bias is not None:
                    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
                # A call weighs by its batch, however many positions it has.
                inputs[layer.name].add(rows, share / max(len(rows), 1))
    return {
        name: Factors(total.moment(total.weight or 1.0), outputs[name].moment(1.0), most[name])
        for name, total in inputs.items()
    }


@contextmanager
def _watched(seen: _Seen) -> Iterator[None]:
    """Note what the layers give, before anything changes it in place."""

    def leave(layer: Layer) -> Callable[[nn.Module, Any, Any], Any]:
        def note(_module: nn.Module, _inputs: Any, result: Any) -> Any:
            if not result.requires_grad:  # under no_grad: nothing comes back
                return result
            seen.outputs.append((layer, result))
            return result.clone()

        return note

    with ExitStack() as stack:
        stack.enter_context(watched(seen.layers, lambda *given: seen.inputs.append(given)))
        for layer in seen.layers:
            stack.callback(layer.module.register_forward_hook(leave(layer)).remove)
        yield


def _positions(layer: Layer, value: Tensor) -> Tensor:
    """One row per position, (positions, neurons)."""
    if layer.kind == "linear":
        return value.reshape(-1, layer.outputs)
    spatial = len(getattr(layer.module, "kernel_size"))  # noqa: B009
    batched = value if value.ndim == spatial + 2 else value.unsqueeze(0)
    return batched.movedim(1, -1).reshape(-1, layer.outputs)


def _empirical(scene: Scene, batch: Any, share: float, seen: _Seen) -> Terms:
    """The gradients of each sample's own loss, which in a mean of N are N times smaller."""
    with only(seen.parameters):
        with _watched(seen):
            loss = scene.objective.evaluate(batch)
        samples = share * scene.objective.batches.rows
        yield _pull([loss], seen)([torch.ones_like(loss)]), share * samples


def _pull(results: Sequence[Tensor], seen: _Seen) -> Pull:
    """``Jᵀ v``: from gradients of ``results`` to those of the layers' outputs."""
    ends = [tensor for _, tensor in seen.outputs]
    live = [index for index, result in enumerate(results) if result.requires_grad]

    def pull(cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        if not live or not ends:
            return [torch.zeros_like(end) for end in ends]
        return torch.autograd.grad(
            [results[index] for index in live],
            ends,
            grad_outputs=[cotangents[index] for index in live],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    return pull


def _exact(scene: Scene, batch: Any, share: float, seen: _Seen) -> Terms:
    """``Jᵀ s_k`` for Λ = Σ_k s_k s_kᵀ, sample by sample: one backward pass serves all samples."""
    with only(seen.parameters):
        try:
            with _watched(seen):
                parts = split(scene.objective, batch, seen.parameters)
        except TaskError as error:
            raise _NotExactError(str(error).partition(";")[0]) from error
        drawn = generator(scene.options.seed, "kfac", "apart")
        signs = _signs(parts, drawn)
        pull = _pull(parts.outputs, seen)
        for k, root in enumerate(_loss_roots(parts, signs, drawn)):
            pulled = pull(_like(parts.cuts, root))
            if k == 0:
                _check_apart(seen, pulled, pull(_like(parts.cuts, signs[:, None] * root)))
            yield pulled, share


def _signs(parts: Split, drawn: torch.Generator) -> Tensor:
    """A random sign for each sample, which shows whether samples meet."""
    if not parts.cuts or not parts.loss.requires_grad:
        raise _NotExactError("the loss does not depend on the layer through the network's outputs")
    leading = {cut.shape[0] if cut.ndim else 0 for cut in parts.cuts}
    samples = max(leading)
    if len(leading) > 1 or samples == 0:
        raise _NotExactError("the network's outputs have no common first dimension of samples")
    if sum(cut.numel() for cut in parts.cuts) // samples > OUTPUT_LIMIT:
        raise _NotExactError(f"a sample has more than {OUTPUT_LIMIT} outputs")
    cut = parts.cuts[0]
    return rademacher(samples, generator=drawn, dtype=cut.dtype, device=cut.device)


def _like(cuts: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Rows (samples, outputs) as cotangents of the outputs."""
    pieces = rows.split([cut[0].numel() for cut in cuts], dim=1)
    return [piece.reshape(cut.shape) for piece, cut in zip(pieces, cuts, strict=True)]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)


def _tolerance(like: Tensor) -> float:
    return math.sqrt(torch.finfo(like.dtype).eps)


def _loss_roots(parts: Split, signs: Tensor, drawn: torch.Generator) -> list[Tensor]:
    """The s_k of every sample's ``Λ = Σ_k s_k s_kᵀ``, (samples, outputs) each."""
    flat = _flat(
        torch.autograd.grad(
            parts.loss, parts.cuts, create_graph=True, allow_unused=True, materialize_grads=True
        )
    )
    if not flat.requires_grad:
        raise _NotExactError("the loss is linear in the network's outputs")

    def bent(direction: Tensor) -> Tensor:
        back = torch.autograd.grad(
            flat, parts.cuts, direction, retain_graph=True, materialize_grads=True
        )
        return _flat(back).detach()

    outputs = flat.shape[1]
    units = torch.eye(outputs, dtype=flat.dtype, device=flat.device)
    curved = torch.stack([bent(unit.expand_as(flat)) for unit in units], dim=1)
    direction = gaussian(outputs, generator=drawn, dtype=flat.dtype, device=flat.device)
    signed = bent(signs[:, None] * direction)
    apart = signs[:, None] * (direction @ curved)
    largest = float(curved.abs().max())
    if not torch.allclose(signed, apart, atol=_tolerance(flat) * largest):
        raise _NotExactError("the loss lets the samples of a batch meet")
    values, vectors = torch.linalg.eigh(curved.double())
    if bool((values < -_tolerance(flat) * largest).any()):
        raise _NotExactError("the loss is not convex in the network's outputs")
    roots = (vectors * values.clamp_min(0).sqrt()[:, None, :]).to(flat.dtype)
    return [root for root in roots.unbind(dim=2) if bool(root.any())]


def _check_apart(seen: _Seen, plain: Sequence[Tensor], signed: Sequence[Tensor]) -> None:
    """A sample's outputs depend on its own activations alone: signs cancel in every x xᵀ."""
    for (layer, _), one, other in zip(seen.outputs, plain, signed, strict=True):
        first, second = (_positions(layer, given).abs() for given in (one, other))
        if not torch.allclose(first, second, atol=_tolerance(one) * float(first.max())):
            raise _NotExactError("samples of a batch meet in the network, as in BatchNorm")
