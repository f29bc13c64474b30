"""What floating point does to a product: its noise scale, and hidden casts to a narrower type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hessdiag.curvature.engines import BUILD, Recompute
from hessdiag.curvature.modes import EagerMode
from hessdiag.curvature.objective import Objective, only
from hessdiag.names import clean_name
from hessdiag.options import Curvature
from hessdiag_probes.types import Matvec, Vector

_INTEGER = {torch.float64: torch.int64, torch.float32: torch.int32}
_TINY = torch.finfo(torch.float32).tiny
_PIECE = 2**16


class Rounded(EagerMode):
    """Rounds the result of every operation in ``dtype`` to fewer bits: narrower arithmetic.

    With ``kernels`` an operation on float64 also runs in float32, so that what cancels inside it
    (``1 - p`` in the backward of log_softmax, the mean in a layer norm) is seen, too. Where
    float32 over- or underflows, the rounded float64 result stands in. Unlike a second copy of the
    model in float32, this works when the user's closure holds tensors.
    """

    def __init__(self, dropped: int, dtype: torch.dtype, *, kernels: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dropped = dropped
        self.dtype = dtype
        self.kernels = kernels

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        narrow = self._in_float32(func, args, kwargs) if self.kernels else None
        result = func(*args, **kwargs)
        returns = func._schema.returns
        results = _listed(result)
        others = _listed(narrow) if narrow is not None else [None] * len(results)
        if len(returns) == len(results) == len(others):
            for declared, tensor, other in zip(returns, results, others, strict=True):
                # A view shares its base's numbers, which were rounded when they were made.
                new = declared.alias_info is None or declared.alias_info.is_write
                if new and isinstance(tensor, Tensor) and tensor.dtype == self.dtype:
                    _round(tensor, self.dropped, other)
        return result

    def _in_float32(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        schema = func._schema
        aliased = any(part.alias_info is not None for part in (*schema.arguments, *schema.returns))
        if aliased or torch.Tag.nondeterministic_seeded in func.tags:
            return None
        if not any(_is_double(leaf) for leaf in tree_leaves((args, kwargs))):
            return None

        def narrowed(leaf: Any) -> Any:
            if leaf is torch.float64:
                return torch.float32
            return leaf.float() if _is_double(leaf) else leaf

        try:
            return func(*tree_map(narrowed, args), **tree_map(narrowed, kwargs))
        except RuntimeError:  # an operation that float32 tensors do not have
            return None


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _is_double(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.float64


def _round(tensor: Tensor, dropped: int, narrow: Any) -> None:
    """Round in place, or take the float32 result where its range holds the number."""
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor._is_zerotensor():
        return  # the derivative of a sign is zeros without storage, and a write would crash
    other = narrow if isinstance(narrow, Tensor) and narrow.shape == tensor.shape else None
    if not (tensor.is_contiguous() and (other is None or other.is_contiguous())):
        _round_piece(tensor.detach(), dropped, other)
        return
    # In pieces that a cache holds: each temporary of a large tensor would be new memory.
    pieces = tensor.detach().view(-1).split(_PIECE)
    others = [None] * len(pieces) if other is None else other.view(-1).split(_PIECE)
    for piece, beside in zip(pieces, others, strict=True):
        _round_piece(piece, dropped, beside)


def _round_piece(tensor: Tensor, dropped: int, narrow: Tensor | None) -> None:
    bits = tensor.view(_INTEGER[tensor.dtype])
    # Half a unit is added in the magnitude bits, so this rounds to nearest, ties away; the
    # exponent takes the carry, and infinities are left alone.
    size = tensor.abs()
    finite = size < math.inf  # isfinite takes twice as many passes
    rounded = (bits + (1 << (dropped - 1))) & ~((1 << dropped) - 1)
    rounded = torch.where(finite, rounded, bits)
    if narrow is not None:
        wide = narrow.to(tensor.dtype)
        held = finite & (wide.abs() < math.inf) & ((size >= _TINY) | (size == 0))
        rounded = torch.where(held, wide.contiguous().view(rounded.dtype), rounded)
    bits.copy_(rounded)


def _arithmetics(dtype: torch.dtype) -> tuple[Rounded, ...]:
    """The narrower arithmetics that errors are measured with.

    One is float32 itself. The other drops ten bits only: cancellation finer than float32's 24
    bits leaves nothing there, and would look like no error at all.
    """
    ten = Rounded(10, dtype)
    return (Rounded(29, dtype, kernels=True), ten) if dtype == torch.float64 else (ten,)


def _errors(evaluate: Callable[[], Tensor], dtype: torch.dtype, *, narrow: bool) -> Tensor:
    """The error of ``evaluate()`` in the working precision, entry by entry the largest seen.

    With ``narrow`` the model itself computes in a narrower type: errors are not scaled down.
    """
    fine = evaluate()
    worst = torch.zeros_like(fine)
    for arithmetic in _arithmetics(dtype):
        with arithmetic:
            coarse = evaluate()
        error = (coarse - fine) * (1.0 if narrow else 2.0**-arithmetic.dropped)
        worst = torch.where(error.abs() > worst.abs(), error, worst)
    return worst


def noise_of(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    curvature: Curvature,
    *,
    narrow: bool = False,
    view: Callable[[Matvec], Matvec] | None = None,
) -> Callable[[Vector], Vector]:
    """``v -> (C v in narrower arithmetic) - (C v)``, scaled to the working precision.

    Args:
        objective: On loan.
        parameters: Of the block, (n,) values in all.
        curvature: Whose products.
        narrow: The model itself casts to a narrower type, so its errors are not scaled down.
        view: Makes of the product one in other coordinates, whose error is meant then.
    Cost:
        Three recomputed products per call, one of them with every operation done twice.
    Source:
        maths 0.6; see :class:`Rounded`.
    """
    product: Matvec = Recompute(objective, parameters, BUILD[curvature])
    if view is not None:
        product = view(product)

    def error(vector: Vector) -> Vector:
        return _errors(lambda: product(vector), parameters[0].dtype, narrow=narrow)

    return error


def gradient_noise(
    objective: Objective, parameters: Sequence[nn.Parameter], *, narrow: bool = False
) -> Vector:
    """The same for the gradient, flattened.

    Cost:
        Three gradients.
    """
    dtype = parameters[0].dtype
    return _errors(lambda: objective.gradient(parameters), dtype, narrow=narrow)


def loss_noise(objective: Objective, *, narrow: bool = False) -> float:
    """A bound on the error of the loss by rounding.

    Cost:
        Four losses.
    """
    dtype = next(p.dtype for p in objective.model.parameters() if p.dtype in _INTEGER)
    error = _errors(
        lambda: torch.tensor(objective.value(), dtype=torch.float64), dtype, narrow=narrow
    )
    return 10 * (abs(float(error)) + torch.finfo(dtype).eps * abs(objective.value()))


class CastWatcher(EagerMode):
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
    with only(parameters), watcher, watcher.following(objective.model):
        loss = objective.evaluate(batch)
        # The backward of a widening cast narrows: news only where the forward showed nothing.
        if loss.requires_grad and not watcher.found:
            watcher.outside, watcher.backward = "the backward pass", True
            torch.autograd.grad(loss, parameters, allow_unused=True)
    return watcher.found
