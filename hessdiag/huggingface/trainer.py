"""The parameter groups of transformers' Trainer, so that its stored state finds its owners."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hessdiag.checkpoint.optimizer import optimizer_class

NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""In a parameter's name, in lower case."""

ADAM_LIKE = {"lr", "betas", "eps", "weight_decay", "amsgrad"}
"""What Adam and AdamW both write; older releases of torch nothing else. The Trainer has AdamW."""

CLASSES = ("Adam", "AdamW", "SGD", "Adagrad", "RMSprop")
"""The Trainer's choices among torch's own, which take any tensors and a weight decay."""


def decays(model: nn.Module) -> dict[str, bool]:
    """Which parameters the Trainer decays: none of a LayerNorm, and none that is called so.

    Source:
        ``Trainer.get_decay_parameter_names`` of transformers 4.51 to 5.
    """
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    inside = tuple(f"{name}." for name in norms)
    return {
        name: not (name.startswith(inside) or NO_DECAY.search(name.lower()))
        for name, _ in model.named_parameters()
    }


def trainer_optimizer(
    stored: Mapping[str, Any],
) -> Callable[[nn.Module], torch.optim.Optimizer] | None:
    """A builder of the optimizer whose state the Trainer has stored.

    Args:
        stored: The optimizer's ``state_dict()``.
    Returns:
        ``optimizer(model)``, decayed parameters first; None if the state is of no class of torch.
    """
    groups = stored.get("param_groups")
    whole = isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups)
    if not whole or not groups:
        return None
    name = optimizer_class(stored)
    if name is None and groups[0].keys() >= ADAM_LIKE:
        name = "AdamW"
    given = [group.get("weight_decay", 0.0) for group in groups]
    usable = all(isinstance(x, int | float) and 0 <= x < math.inf for x in given)
    if name not in CLASSES or not usable:
        return None
    kind = getattr(torch.optim, name)
    # The largest, so that groups in another order are seen to be in another order.
    decay = max(given)

    def build(model: nn.Module) -> torch.optim.Optimizer:
        decayed = decays(model)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        built: torch.optim.Optimizer = kind(
            [
                {"params": [p for n, p in trained if decayed[n]], "weight_decay": decay},
                {"params": [p for n, p in trained if not decayed[n]], "weight_decay": 0.0},
            ],
            lr=1e-3,
        )
        return built

    return build
