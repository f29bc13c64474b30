"""Keeping float64 through a network whose code asks for float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

NARROWING: frozenset[Callable[..., Any]] = frozenset((Tensor.float, Tensor.half, Tensor.bfloat16))


class Wide(TorchFunctionMode):
    """No operation inside asks for a floating type narrower than torch's default one.

    ``.float()``, ``.to(torch.float32)``, ``softmax(…, dtype=torch.float32)`` and their kin, which
    protect half precision in the library's norms, attention and rotary embeddings, take the
    default type instead where that is wider: float64 during an analysis.

    Source:
        maths 0.2 (d): a hidden float32 leaves symmetry and differences right and spoils κ.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        wide = torch.get_default_dtype()
        if func in NARROWING:
            return args[0].to(wide)

        def widened(leaf: Any) -> Any:
            if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
                return wide if leaf.itemsize < wide.itemsize else leaf
            return leaf

        return func(*tree_map(widened, args), **tree_map(widened, kwargs or {}))
