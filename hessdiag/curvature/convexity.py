"""Whether a loss is a convex function of the model's outputs, read from its graph.

The Gauss–Newton matrix ``JᵀΛJ`` has no negative eigenvalue if ``Λ``, the Hessian of the loss in
the outputs, has none. The graph between the outputs and the loss tells that by the rules of
disciplined convex programming. What they do not recognise is not known, and nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.curvature.ggn import split
from hessdiag.curvature.objective import Objective, only

AFFINE, CONVEX, CONCAVE = 0, 1, -1

LINEAR = frozenset(
    {
        *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "TBackward0"),
        *("TransposeBackward0", "PermuteBackward0", "UnsqueezeBackward0", "SliceBackward0"),
        *("SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "SelectBackward0"),
        *("IndexBackward0", "ExpandBackward0", "CloneBackward0", "CatBackward0", "AliasBackward0"),
        *("UnbindBackward0", "SplitBackward0", "IndexSelectBackward0", "GatherBackward0"),
        *("SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1", "ToCopyBackward0"),
        *("StackBackward0", "MaskedFillBackward0"),
    }
)
"""Linear with nonnegative coefficients in all that they take (a filled entry is constant)."""

CONVEX_OF_AFFINE = frozenset(
    {
        *("MseLossBackward0", "SmoothL1LossBackward0", "HuberLossBackward0", "AbsBackward0"),
        *("BinaryCrossEntropyWithLogitsBackward0", "SoftMarginLossBackward0"),
        "LargeCrossEntropyBackward",
    }
)
OF_CONSTANT_TARGET = frozenset({"BinaryCrossEntropyWithLogitsBackward0", "SoftMarginLossBackward0"})
CONVEX_AND_INCREASING = frozenset(
    {"SoftplusBackward0", "ReluBackward0", "LogsumexpBackward0", "ExpBackward0"}
)
LIKELIHOOD = frozenset({"NllLossBackward0", "NllLoss2DBackward0"})


def convex_loss(objective: Objective, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether every batch's loss is known to be convex in the model's outputs.

    Cost:
        A forward pass over the dataset.
    """
    for batch, _ in objective:
        with only(parameters):
            loss = split(objective, batch, parameters).loss
        if loss.grad_fn is not None and curvature(loss.grad_fn) not in (AFFINE, CONVEX):
            return False
    return True


Kinds = dict[Any, int | None]
"""What is known of each node of the graph."""


def curvature(root: Any) -> int | None:
    """Of a node in the outputs: affine, convex, concave, or None for not known.

    Without recursion, and each node once: a loss may be summed up in a long loop.
    """
    kinds: Kinds = {}
    stack = [root]
    while stack:
        node = stack[-1]
        waiting = [p for p, _ in node.next_functions if p is not None and p not in kinds]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        if node not in kinds:
            kinds[node] = _kind(node, kinds)
    return kinds[root]


def _kind(node: Any, kinds: Kinds) -> int | None:
    """Of a node whose parents are known."""
    name = node.name()
    if name.endswith("AccumulateGrad"):
        return AFFINE
    if name in ("MulBackward0", "MulBackward1", "DivBackward0", "DivBackward1"):
        return _scaled(node, kinds)
    inputs = [kinds[parent] for parent, _ in node.next_functions if parent is not None]
    if name in ("AddBackward0", "SubBackward0"):
        return _sum(node, kinds)
    known = _join(inputs)
    if name in LINEAR:
        return known
    if name == "NegBackward0":
        return _times(-1.0, known)
    if name == "LogSoftmaxBackward0":
        return CONCAVE if known == AFFINE else None
    if name in LIKELIHOOD:
        return _times(-1.0, known) if _nonnegative(node, "_saved_weight") else None
    if name == "PowBackward0":
        return CONVEX if known == AFFINE and float(node._saved_exponent) == 2.0 else None
    if name in OF_CONSTANT_TARGET and any(
        parent is not None for parent, _ in node.next_functions[1:]
    ):
        return None  # x t is neither convex nor concave where both are outputs
    if name in CONVEX_OF_AFFINE and known == AFFINE:
        weighted = all(_nonnegative(node, w) for w in ("_saved_weight", "_saved_pos_weight"))
        weighted &= getattr(node, "convex", True)  # our own cross-entropy says so itself
        return CONVEX if weighted and _probabilities(node) else None
    if name in CONVEX_AND_INCREASING:
        if float(getattr(node, "_saved_beta", 1.0)) <= 0:
            return None  # a softplus turned round is concave
        return CONVEX if known in (AFFINE, CONVEX) else None
    return None


def _join(parts: Iterable[int | None]) -> int | None:
    """Of a sum with positive weights."""
    kinds = set(parts) - {AFFINE}
    return AFFINE if not kinds else kinds.pop() if len(kinds) == 1 else None


def _times(factor: float, kind: int | None) -> int | None:
    return kind if kind is None or factor > 0 else -kind


def _sum(node: Any, kinds: Kinds) -> int | None:
    alpha = float(node._saved_alpha) * (-1.0 if node.name() == "SubBackward0" else 1.0)
    weights = (1.0, alpha)
    return _join(
        _times(weight, kinds[parent])
        for weight, (parent, _) in zip(weights, node.next_functions, strict=False)
        if parent is not None
    )


def _scaled(node: Any, kinds: Kinds) -> int | None:
    """A product with, or a quotient by, a constant; or the square of something affine."""
    edges = node.next_functions
    live = [position for position, (parent, _) in enumerate(edges) if parent is not None]
    if len(live) == 2 and node.name() == "MulBackward0":
        same = edges[0] == edges[1] and kinds[edges[0][0]] == AFFINE
        return CONVEX if same else None
    if len(live) != 1 or (node.name().startswith("Div") and live != [0]):
        return None
    kind = kinds[edges[live[0]][0]]
    if kind == AFFINE:
        return AFFINE
    constant = node._saved_other if live == [0] else node._saved_self
    if constant is None:
        return None
    values = torch.as_tensor(constant)
    if bool((values >= 0).all()):
        return kind
    return _times(-1.0, kind) if bool((values <= 0).all()) else None


def _nonnegative(node: Any, name: str) -> bool:
    weight = getattr(node, name, None)
    return not isinstance(weight, Tensor) or not bool((weight < 0).any())


def _probabilities(node: Any) -> bool:
    """With weights on the positive class, cross-entropy is convex for targets in [0, 1] only."""
    target = getattr(node, "_saved_target", None)
    if node.name() != "BinaryCrossEntropyWithLogitsBackward0" or target is None:
        return True
    return bool(((target >= 0) & (target <= 1)).all())
