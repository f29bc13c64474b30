"""What floating point does to a product: its noise scale, and hidden casts to a narrower type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hessdiag.curvature.engines import BUILD, Recompute
from hessdiag.curvature.objective import Objective, only
from hessdiag.names import clean_name
from hessdiag.options import Curvature
from hessdiag_probes.types import Vector

# Bits that the rounding throws away: float64 keeps float32's 24; float32 keeps 14.
DROPPED_BITS = {torch.float64: 29, torch.float32: 10}
_INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32}


class Rounded(TorchDispatchMode):
    """Rounds the result of every operation to fewer bits: arithmetic in a narrower type.

    Unlike a second copy of the model in float32, it does not round the problem itself
    (parameters, data), cannot overflow, and works when the user's closure holds tensors.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        results = result if isinstance(result, (tuple, list)) else (result,)
        if len(returns) == len(results):
            for declared, tensor in zip(returns, results, strict=True):
                # A view shares its base's numbers, which were rounded when they were made.
                if declared.alias_info is None or declared.alias_info.is_write:
                    _round(tensor)
        return result


def _round(tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in DROPPED_BITS:
        return
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return
    dropped = DROPPED_BITS[tensor.dtype]
    bits = tensor.detach().view(_INTEGER[tensor.dtype])
    # Half a unit is added in the magnitude bits, so this rounds to nearest, ties away; the
    # exponent takes the carry, and infinities are left alone.
    finite = torch.isfinite(tensor)
    rounded = (bits + (1 << (dropped - 1))) & ~((1 << dropped) - 1)
    bits.copy_(torch.where(finite, rounded, bits))


def noise_of(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    curvature: Curvature,
    *,
    narrow: bool = False,
) -> Callable[[Vector], Vector]:
    """``v -> (C v as rounded) - (C v)``, scaled to the working precision: the error of a product.

    Args:
        objective: On loan.
        parameters: Of the block, (n,) values in all.
        curvature: Whose products.
        narrow: The model itself casts to a narrower type, so its errors are not scaled down.
    Cost:
        Two recomputed products per call.
    Source:
        maths 0.6, with the float32 evaluation simulated by :class:`Rounded`.
    """
    engine = Recompute(objective, parameters, BUILD[curvature])
    ratio = 1.0 if narrow else 2.0 ** -DROPPED_BITS[parameters[0].dtype]

    def error(vector: Vector) -> Vector:
        with Rounded():
            coarse = engine(vector)
        return (coarse - engine(vector)) * ratio

    return error


def gradient_noise(
    objective: Objective, parameters: Sequence[nn.Parameter], *, narrow: bool = False
) -> Vector:
    """The same for the gradient, flattened.

    Cost:
        Two gradients.
    """
    ratio = 1.0 if narrow else 2.0 ** -DROPPED_BITS[parameters[0].dtype]
    with Rounded():
        coarse = objective.gradient(parameters)
    return (coarse - objective.gradient(parameters)) * ratio


def loss_noise(objective: Objective, *, narrow: bool = False) -> float:
    """A bound on the error of the loss by rounding.

    Cost:
        Two losses.
    """
    dtype = next(p.dtype for p in objective.model.parameters() if p.dtype in DROPPED_BITS)
    with Rounded():
        coarse = objective.value()
    exact = objective.value()
    ratio = 1.0 if narrow else 2.0 ** -DROPPED_BITS[dtype]
    return 10 * (abs(coarse - exact) * ratio + torch.finfo(dtype).eps * abs(exact))


class CastWatcher(TorchDispatchMode):
    """Notes every module in whose forward, or in whose backward, precision is thrown away.

    In the forward only what depends on the parameters counts: a constant that is rounded once
    (rotary frequencies) defines the loss, and spoils no derivative.
    """

    def __init__(self, wide: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wide = wide
        self.outside = "the loss function"
        self.backward = False
        self.running: list[str] = []
        self.found: dict[str, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(self._is_wide(t) and (self.backward or t.requires_grad) for t in inputs):
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and self._is_narrow(tensor):
                    where = self.running[-1] if self.running else self.outside
                    self.found.setdefault(where, str(tensor.dtype).removeprefix("torch."))
        return result

    def _is_wide(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.dtype.itemsize >= self.wide.itemsize

    def _is_narrow(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.dtype.itemsize < self.wide.itemsize

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Know which module is running, by hooks that are removed afterwards."""
        handles = []
        for name, module in model.named_modules():
            kind = type(module).__name__
            label = f"module {clean_name(name)!r} ({kind})" if name else "the model's forward"

            def enter(_module: nn.Module, _inputs: Any, label: str = label) -> None:
                self.running.append(label)

            def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
                self.running.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def hidden_casts(objective: Objective, parameters: Sequence[nn.Parameter]) -> dict[str, str]:
    """Where a forward and backward of one batch leave the working precision.

    Returns:
        Place (a module, or the loss function) to the narrower type's name; empty when nowhere.
    Source:
        maths 0.2 (d): such a cast passes the symmetry and difference checks and spoils κ.
    """
    watcher = CastWatcher(wide=parameters[0].dtype)
    batch = objective.batches.items[0]
    with only(objective.model, parameters), watcher, watcher.following(objective.model):
        loss = objective.evaluate(batch)
        # The backward of a widening cast narrows: news only where the forward showed nothing.
        if loss.requires_grad and not watcher.found:
            watcher.outside, watcher.backward = "the backward pass", True
            torch.autograd.grad(loss, parameters, allow_unused=True)
    return watcher.found
