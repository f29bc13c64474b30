"""How the tensors of one forward pass go from layer to layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hessdiag.activations import Layer, find_layers
from hessdiag.curvature.objective import Objective, only
from hessdiag.names import clean_name, named_parameters
from hessdiag.task import batch_tensors

BATCH_NORMS = nn.modules.batchnorm._BatchNorm
NORMS = (BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Passage:
    """The calls of one module in one forward pass.

    Attributes:
        calls: Their number.
        hidden: Every call's input depended on parameters.
        given: Of the last call, the input.
        made: Of the last call, the output.
        source: The module whose output, unchanged, was the last call's input; or None.
    """

    calls: int = 0
    hidden: bool = True
    given: Tensor | None = None
    made: Tensor | None = None
    source: nn.Module | None = None


@dataclass
class Trace:
    """One forward pass of a network, on the first batch.

    Attributes:
        layers: Its Linear and convolution layers, by name.
        norms: Its normalisation layers, by name.
        passages: Of each of these modules.
        uses: By module, how many operations took its output, unchanged, for an input.
        names: First names of parameters, by identity.
        owners: How many modules each parameter belongs to, by identity.
    """

    layers: Mapping[str, Layer]
    norms: Mapping[str, nn.Module]
    passages: Mapping[nn.Module, Passage]
    uses: Counter[nn.Module] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)
    owners: Counter[int] = field(default_factory=Counter)

    def fed_by(self, module: nn.Module) -> list[Layer]:
        """The layers whose input is the output of ``module`` as it is."""
        return [
            layer for layer in self.layers.values() if self.passages[layer.module].source is module
        ]


def trace(objective: Objective) -> Trace:
    """Follow the first batch through the network.

    Cost:
        One forward pass with its graph; the inputs and outputs of all layers in memory.
    """
    model = objective.model
    layers = find_layers(model)
    norms = {clean_name(n): m for n, m in model.named_modules() if isinstance(m, NORMS)}
    modules = [*(layer.module for layer in layers.values()), *norms.values()]
    found = Trace(layers, norms, {module: Passage() for module in modules})
    for name, parameter in named_parameters(model, aliases=True):
        found.names.setdefault(id(parameter), name)
        found.owners[id(parameter)] += 1
    parameters = [p for _, p in named_parameters(model) if p.is_floating_point()]
    counted = _Uses(found)
    with ExitStack() as stack:
        stack.enter_context(only(parameters))
        for module, passage in found.passages.items():
            stack.enter_context(_followed(module, passage, counted))
        stack.enter_context(counted)
        objective.evaluate(objective.batches.items[0])
    for passage in found.passages.values():  # only here: inside, detaching would be a use
        passage.given = None if passage.given is None else passage.given.detach()
        passage.made = None if passage.made is None else passage.made.detach()
    return found


class _Uses(TorchFunctionMode):
    """Counts the operations that take a watched output, and make a tensor of it."""

    def __init__(self, into: Trace) -> None:
        super().__init__()
        self.into = into
        self.makers: dict[int, tuple[nn.Module, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {id(tensor) for tensor in batch_tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        if any(True for _ in batch_tensors(result)):  # a question about its shape is no use
            self.into.uses.update(self.makers[key][0] for key in given if key in self.makers)
        return result

    def watch(self, module: nn.Module, tensor: Tensor) -> None:
        """Watch an output; it is kept alive, so that its identity stays its own."""
        self.makers.setdefault(id(tensor), (module, tensor))

    def maker(self, tensor: Tensor) -> nn.Module | None:
        """Which module made this tensor; what wrote into it since counts as a use."""
        return self.makers.get(id(tensor), (None, tensor))[0]


@contextmanager
def _followed(module: nn.Module, passage: Passage, uses: _Uses) -> Iterator[None]:
    """Write down the calls of one module."""

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input")
        passage.calls += 1
        if not isinstance(given, Tensor):
            passage.hidden = False
            return
        passage.hidden &= _depends_on_parameters(given)
        passage.given = given
        passage.source = uses.maker(given)

    def leave(_module: nn.Module, _args: Any, made: Any) -> None:
        if isinstance(made, Tensor):
            passage.made = made
            uses.watch(module, made)

    entering = module.register_forward_pre_hook(enter, with_kwargs=True)
    leaving = module.register_forward_hook(leave)
    try:
        yield
    finally:
        entering.remove()
        leaving.remove()


def _depends_on_parameters(tensor: Tensor) -> bool:
    """Whether the tensor's graph reaches a parameter; an input of a PINN is none."""
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    if tensor.grad_fn is None:
        return isinstance(tensor, nn.Parameter)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        waiting += [following for following, _ in node.next_functions]
    return False
