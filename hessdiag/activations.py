"""The inputs of Linear and convolution layers, sample by sample, over the dataset."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.nn import functional

from hessdiag.curvature.objective import Objective
from hessdiag.data import row_count
from hessdiag.names import clean_name, named_parameters

Kind = Literal["linear", "conv"]

PATCH_NUMBERS = 2**23
"""Of patches that are in memory at once, unless one sample has more."""


@dataclass(frozen=True)
class Layer:
    """A layer whose output is linear in its weight and bias: ``a = W h + b`` at every position.

    Attributes:
        name: Of the module, as in the table of blocks.
        module: ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d``, or a class derived from one that
            computes its output in the same way.
        kind: Which.
        weight: First name of the weight in :func:`hessdiag.names.named_parameters`.
        bias: That of the bias, or None.
        shared: Its weight or bias is another module's, too.
    """

    name: str
    module: nn.Module
    kind: Kind
    weight: str
    bias: str | None
    shared: bool

    @property
    def tensor(self) -> Tensor:
        """The weight, (outputs, inputs of a neuron, kernel…)."""
        return cast("Tensor", self.module.weight)

    @property
    def outputs(self) -> int:
        """Number of neurons, or of output channels."""
        return self.tensor.shape[0]

    @property
    def features(self) -> int:
        """Rows of H: weights of one neuron, in the flattened order of ``weight[i]``."""
        return self.tensor[0].numel() if len(self.tensor) else 0

    @property
    def groups(self) -> int:
        """Of the convolution: output channels of different groups see different features."""
        return int(getattr(self.module, "groups", 1))


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """The Linear and convolution layers of the network, by name, in its order."""
    first: dict[int, str] = {}
    owners: dict[int, int] = {}
    for name, parameter in named_parameters(model, aliases=True):
        first.setdefault(id(parameter), name)
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found: dict[str, Layer] = {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None:
            continue
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None:  # a parametrization makes it
            continue
        shared = any(owners[id(p)] > 1 for p in (weight, bias) if p is not None)
        bias_name = None if bias is None else first[id(bias)]
        label = clean_name(name)
        found[label] = Layer(label, module, kind, first[id(weight)], bias_name, shared)
    return found


def _kind(module: nn.Module) -> Kind | None:
    """What kind of layer it is; None where a derived class does more than multiply and add."""
    kind: Any = type(module)
    if isinstance(module, nn.Linear):
        return "linear" if kind.forward is nn.Linear.forward else None
    for base in (nn.Conv1d, nn.Conv2d):
        if isinstance(module, base):
            same = kind.forward is base.forward and kind._conv_forward is base._conv_forward
            return "conv" if same else None
    return None


@dataclass(frozen=True)
class Inputs:
    """What one call of a layer was given.

    Attributes:
        rows: The vectors h that the weights meet, (positions, features): a row of H_eᵀ without
            its 1. Of a convolution: its patches, padding included.
        samples: Number of samples in the batch, or in this part of it; positions = samples ·
            positions per sample, in the order of the layer's input.
        group: Of a convolution with groups, else 0.
    """

    rows: Tensor
    samples: int
    group: int


Visit = Callable[[Layer, Inputs], None]


def visit_inputs(objective: Objective, layers: Collection[Layer], visit: Visit) -> dict[str, int]:
    """Show ``visit`` the inputs of these layers, batch by batch, in one pass over the data.

    A batch of a convolution may come in several parts, of consecutive samples.

    Returns:
        How often each layer's forward is called in a batch, at most: 0 where its weights are used
        in another way (``out_proj`` of torch's attention), more than 1 where it is shared over
        time.
    Cost:
        One forward pass. Patches of a convolution are made for some samples at a time, 2²³ numbers
        unless a sample has more.
    """
    most = {layer.name: 0 for layer in layers}
    for batch, _ in objective:
        calls = dict.fromkeys(most, 0)
        rows = row_count(batch)

        def seen(
            layer: Layer, value: Tensor, calls: dict[str, int] = calls, rows: int = rows
        ) -> None:
            calls[layer.name] += 1
            for part, count in _parts(layer, value.detach(), rows):
                for inputs in layer_inputs(layer, part, count):
                    visit(layer, inputs)

        with watched(layers, seen):
            objective.evaluate(batch)
        most = {name: max(most[name], count) for name, count in calls.items()}
    return most


def _parts(layer: Layer, value: Tensor, rows: int) -> Iterator[tuple[Tensor, int | None]]:
    """Slices of a layer's input whose patches fit, each with the samples of the batch in it."""
    if layer.kind == "linear" or value.ndim == layer.tensor.ndim - 1 or not len(value):
        yield value, rows
        return
    # A place of the input is in at most as many patches as the kernel has places.
    numbers = value[0].numel() * layer.tensor[0, 0].numel()
    fits = PATCH_NUMBERS // max(numbers, 1)
    per_sample, rest = divmod(len(value), rows) if rows else (1, 0)
    if rest or not per_sample:
        per_sample, rows = 1, 0
    size = max(fits - fits % per_sample, per_sample)
    if size >= len(value):
        yield value, rows or None
        return
    for part in value.split(size):
        yield part, len(part) // per_sample if rows else None


@contextmanager
def watched(layers: Collection[Layer], seen: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Call ``seen`` with the input of every layer's forward, as it is, graph included."""
    handles = []
    for layer in layers:

        def enter(
            _module: nn.Module,
            args: tuple[Any, ...],
            kwargs: Mapping[str, Any],
            layer: Layer = layer,
        ) -> None:
            value = args[0] if args else kwargs.get("input")
            if isinstance(value, Tensor):
                seen(layer, value)

        handles.append(layer.module.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_inputs(layer: Layer, value: Tensor, rows: int | None = None) -> Iterator[Inputs]:
    """The vectors that the weights of ``layer`` meet in ``value``, one entry per group.

    Args:
        layer: Whose input ``value`` is.
        value: As its forward was given it.
        rows: Of the batch, which are its samples; None, or a number that does not divide the
            positions, takes the first dimension of ``value``.
    """
    if layer.kind == "linear":
        vectors = value.reshape(-1, value.shape[-1])
        first = value.shape[0] if value.ndim > 1 else 1
        yield Inputs(vectors, _samples(len(vectors), first, rows), 0)
        return
    patches = unfold(layer.module, value)
    for group, part in enumerate(patches.chunk(layer.groups, dim=1)):
        vectors = part.mT.reshape(-1, part.shape[1])
        yield Inputs(vectors, _samples(len(vectors), len(patches), rows), group)


def _samples(positions: int, first: int, rows: int | None) -> int:
    return rows if rows and positions % rows == 0 else first


def unfold(module: nn.Module, value: Tensor) -> Tensor:
    """The patches of a convolution's input, (samples, channels · kernel, positions)."""
    convolution: Any = module
    spatial = len(convolution.kernel_size)
    if value.ndim == spatial + 1:  # without a batch
        value = value.unsqueeze(0)
    pads = convolution._reversed_padding_repeated_twice
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    if any(pads):
        value = functional.pad(value, pads, mode=mode)
    flat = spatial == 1
    kernel, stride, dilation = (
        (1, *given) if flat else tuple(given)
        for given in (convolution.kernel_size, convolution.stride, convolution.dilation)
    )
    if flat:
        value = value.unsqueeze(2)
    return functional.unfold(value, kernel, dilation=dilation, stride=stride)
