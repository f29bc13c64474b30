"""Cross-entropy over many classes whose second derivatives hold no copies of the logits.

torch's own keeps the log-probabilities, their exponentials and several gradients of them for the
double backward: ten times the logits. This one keeps the logits themselves, which the last layer
made anyway, and computes probabilities again, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LARGE = 2**20
"""Numbers in the logits from which it takes torch's place."""

ROWS_AT_ONCE = {"cpu": 2**17, "cuda": 2**23}
"""Numbers that are worked on at once: a processor's cache full, or enough to fill a GPU."""

MEAN, SUM = 1, 2  # as torch numbers its reductions


@contextmanager
def large_cross_entropy(threshold: int = LARGE) -> Iterator[None]:
    """Inside, every eager cross-entropy of that many logits and class labels keeps no copies.

    Smaller ones, soft labels and what runs inside ``torch.func`` stay torch's own, bit for bit,
    and so does every call that torch refuses.
    Replaced is what ``functional.cross_entropy`` calls, so that every name for it is caught.
    """
    namespace: Any = torch._C._nn
    own = namespace.cross_entropy_loss

    def chosen(
        input: Tensor,  # noqa: A002 - the name under which torch takes it
        target: Tensor,
        weight: Tensor | None = None,
        reduction: int = MEAN,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        usual = 0.0 <= label_smoothing <= 1.0
        if not usual or not _applies(input, target, weight, ignore_index, threshold):
            result: Tensor = own(input, target, weight, reduction, ignore_index, label_smoothing)
            return result
        return cross_entropy(
            input,
            target,
            weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    namespace.cross_entropy_loss = chosen
    try:
        yield
    finally:
        namespace.cross_entropy_loss = own


def _applies(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignored: int, threshold: int
) -> bool:
    """Whether the call is large enough, and one that torch takes."""
    return (
        logits.numel() >= threshold
        and logits.dim() >= 2
        and logits.dtype in (torch.float32, torch.float64)
        and target.dtype == torch.int64
        and target.device == logits.device
        and target.shape == logits.shape[:1] + logits.shape[2:]
        and not torch._C._are_functorch_transforms_active()
        and (weight is None or _weighs(weight, logits))
        and _are_classes(target, logits.shape[1], ignored)
    )


def _weighs(weight: Tensor, logits: Tensor) -> bool:
    return (
        weight.shape == logits.shape[1:2]
        and weight.dtype == logits.dtype
        and weight.device == logits.device
        and not weight.requires_grad
    )


def _are_classes(target: Tensor, classes: int, ignored: int) -> bool:
    return bool((((target >= 0) & (target < classes)) | (target == ignored)).all())


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``Σ_r w_y (−log p_y)``, smoothed as torch smooths it, twice differentiable in place.

    Args:
        logits: Floating point, (N, C) or (N, C, d…); without a copy where the classes lie
            next to each other in memory.
        target: Classes, (N) or (N, d…).
        weight: Of each class, (C), or None.
        reduction: 0 for none, 1 for the mean over the weights of the targets, 2 for the sum.
        ignore_index: The target that does not count.
        label_smoothing: ε: the share of the target that is spread over all classes.
    Returns:
        As torch's own: a scalar, or a loss for each target.
    Cost:
        One softmax each for the value, the gradient and a product. The graph of a gradient
        holds the logits and the gradient; a product takes two more of their size.
    Source:
        With q_c = (1−ε) w_y δ_cy + ε w_c / C and A = Σ q_c the loss of a row is
        ``A logΣe^z − q·z``, its gradient ``A p − q``, its Hessian ``A (diag p − p pᵀ)``.
    """
    classes = logits.shape[1]
    rows = logits.movedim(1, -1).reshape(-1, classes)
    labels = target.reshape(-1)
    counted = labels != ignore_index
    labels = torch.where(counted, labels, 0)
    ones = counted.to(logits.dtype)
    hard = ones if weight is None else ones * weight[labels]
    spread = None
    if label_smoothing > 0:
        per_class = logits.new_ones(classes) if weight is None else weight
        spread = per_class * (label_smoothing / classes)
    losses: Tensor = LargeCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, labels, (1.0 - label_smoothing) * hard, ones, spread
    )
    # What does not count is 0 even where it is no number, and so is its part of the gradient.
    losses = losses.masked_fill(~counted, 0.0)
    if reduction == MEAN:
        # As torch has it where no target weighs anything, whatever is spread over the classes.
        return losses.sum() / hard.sum().where(hard.any(), torch.nan)
    return losses.sum() if reduction == SUM else losses.view(target.shape)


class LargeCrossEntropy(torch.autograd.Function):
    """The loss of each row, (R): ``h (−log p_y) + o Σ_c s_c (−log p_c)``.

    ``h`` is the weight of the target, (R), ``o`` is 1 where the row counts, (R), and ``s`` is the
    part of the target that is spread over the classes, (C), or None.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, hard: Tensor, ones: Tensor, spread: Tensor | None
    ) -> Tensor:
        """The losses; a log-softmax of some rows at a time."""
        ctx.save_for_backward(logits, labels, hard, ones, spread)
        ctx.convex = bool((hard >= 0).all()) and (spread is None or bool((spread >= 0).all()))

        def losses(part: slice) -> Tensor:
            logs = logits[part].log_softmax(1)
            found = -hard[part] * logs.gather(1, labels[part, None])[:, 0]
            return found if spread is None else found - ones[part] * (logs @ spread)

        return _by_rows(losses, logits, logits.new_empty(logits.shape[0]))

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, which can be differentiated again."""
        slope: Tensor = _Slope.apply(*ctx.saved_tensors, above[0])  # type: ignore[no-untyped-call]
        return slope, None, None, None, None


class _Slope(torch.autograd.Function):
    """The gradient of the losses in the logits, ``g (A p − q)``, (R, C), for a ``g`` (R)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        hard: Tensor,
        ones: Tensor,
        spread: Tensor | None,
        above: Tensor,
    ) -> Tensor:
        """A softmax of some rows at a time."""
        ctx.save_for_backward(logits, labels, hard, ones, spread, above)
        total = above * _mass(hard, ones, spread)
        taken = (above * hard)[:, None]

        def slope(part: slice) -> Tensor:
            found = logits[part].softmax(1)
            found *= total[part, None]
            found.scatter_add_(1, labels[part, None], -taken[part])
            if spread is not None:
                found -= (above * ones)[part, None] * spread
            return found

        return _by_rows(slope, logits, torch.empty_like(logits))

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> tuple[Tensor | None, ...]:
        """``g A (p ∘ v − p (p·v))``, and what the losses' weights ``g`` see of ``v``."""
        logits, labels, hard, ones, spread, above = ctx.saved_tensors
        vector = vectors[0]
        mass = _mass(hard, ones, spread)

        def bent(part: slice) -> Tensor:
            p, v = logits[part].softmax(1), vector[part]
            mean = (p * v).sum(1, keepdim=True)
            found: Tensor = (v - mean) * p * (above * mass)[part, None]
            return found

        def seen(part: slice) -> Tensor:
            v = vector[part]
            found: Tensor = mass[part] * (logits[part].softmax(1) * v).sum(1)
            found = found - hard[part] * v.gather(1, labels[part, None])[:, 0]
            return found if spread is None else found - ones[part] * (v @ spread)

        change = weights = None
        if ctx.needs_input_grad[0]:
            change = _by_rows(bent, logits, torch.empty_like(vector))
        if ctx.needs_input_grad[5]:
            weights = _by_rows(seen, logits, torch.empty_like(vector[:, 0]))
        return change, None, None, None, None, weights


def _mass(hard: Tensor, ones: Tensor, spread: Tensor | None) -> Tensor:
    """``A``, (R): what the target's entries sum to."""
    return hard if spread is None else hard + ones * spread.sum()


def _by_rows(part_of: Callable[[slice], Tensor], logits: Tensor, result: Tensor) -> Tensor:
    """``part_of`` every row, some at a time, put into ``result``."""
    rows, classes = logits.shape
    at_once = max(ROWS_AT_ONCE.get(logits.device.type, 2**20) // max(classes, 1), 1)
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        result[part] = part_of(part)
    return result
