"""The inputs of Linear and convolution layers, sample by sample, over the dataset."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional

from hessdiag.curvature.objective import Objective
from hessdiag.names import clean_name, named_parameters

Kind = Literal["linear", "conv"]


@dataclass(frozen=True)
class Layer:
    """A layer whose output is linear in its weight and bias: ``a = W h + b`` at every position.

    Attributes:
        name: Of the module, as in the table of blocks.
        module: ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d``, or a class derived from one.
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
    def outputs(self) -> int:
        """Number of neurons, or of output channels."""
        return int(getattr(self.module, "weight").shape[0])  # noqa: B009

    @property
    def features(self) -> int:
        """Rows of H: weights of one neuron, in the flattened order of ``weight[i]``."""
        weight = getattr(self.module, "weight")  # noqa: B009
        return int(weight.numel() // weight.shape[0])

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
        if isinstance(module, nn.Linear):
            kind: Kind = "linear"
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            kind = "conv"
        else:
            continue
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None:  # a parametrization makes it
            continue
        shared = any(owners[id(p)] > 1 for p in (weight, bias) if p is not None)
        bias_name = None if bias is None else first[id(bias)]
        label = clean_name(name)
        found[label] = Layer(label, module, kind, first[id(weight)], bias_name, shared)
    return found


@dataclass(frozen=True)
class Inputs:
    """What one call of a layer was given.

    Attributes:
        rows: The vectors h that the weights meet, (positions, features): a row of H_eᵀ without
            its 1. Of a convolution: its patches, padding included.
        samples: Number of samples in the batch; positions = samples · positions per sample.
        group: Of a convolution with groups, else 0.
    """

    rows: Tensor
    samples: int
    group: int


Visit = Callable[[Layer, Inputs], None]


def visit_inputs(objective: Objective, layers: Collection[Layer], visit: Visit) -> dict[str, int]:
    """Show ``visit`` the inputs of these layers, batch by batch, in one pass over the data.

    Returns:
        How often each layer's forward was called on the first batch: 0 where its weights are
        used in another way (``out_proj`` of torch's attention), more than 1 where it is shared
        over time.
    Cost:
        One forward pass; the inputs of one batch in memory.
    """
    calls = {layer.name: 0 for layer in layers}
    for index, (batch, _) in enumerate(objective):

        def seen(layer: Layer, value: Tensor, index: int = index) -> None:
            calls[layer.name] += index == 0
            for inputs in layer_inputs(layer, value.detach()):
                visit(layer, inputs)

        with watched(layers, seen):
            objective.evaluate(batch)
    return calls


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


def layer_inputs(layer: Layer, value: Tensor) -> Iterator[Inputs]:
    """The vectors that the weights of ``layer`` meet in ``value``, one entry per group."""
    if layer.kind == "linear":
        samples = value.shape[0] if value.ndim > 1 else 1
        yield Inputs(value.reshape(-1, value.shape[-1]), samples, 0)
        return
    patches = unfold(layer.module, value)
    samples = patches.shape[0]
    for group, part in enumerate(patches.chunk(layer.groups, dim=1)):
        yield Inputs(part.mT.reshape(-1, part.shape[1]), samples, group)


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
