"""M = diag(m) of torch's optimizers from the moments they store, as ``step()`` uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.checkpoint.optimizer import OptimizerState
from hessdiag.variants.scene import NotApplicable

Stored = Mapping[str, Tensor | float]
"""What an optimizer keeps of one parameter, under torch's own keys."""

State = MutableMapping[str, Tensor | float]
"""The same in the making."""

Group = Mapping[str, Any]
"""Hyperparameters of one parameter group; rates and betas may be tensors."""

RADAM_ADAPTS_FROM = 5.0


@dataclass(frozen=True)
class Scaling:
    """M of one parameter.

    Attributes:
        m: Flattened, float64; ``step()`` moves the parameter by ``-lr * factor * m * g``, g being
            the gradient or its momentum.
        zero: Where the second moment is zero, so that m is 1/eps or what eps makes of it.
        factor: What the number of steps contributes to the step beside M: RAdam's rectification,
            Adagrad's decay of the rate. One number for all of the parameter.
        adapts: Whether m depends on the moments at all (RAdam's first steps do not).
    """

    m: Tensor
    zero: Tensor
    factor: float = 1.0
    adapts: bool = True


@dataclass(frozen=True)
class Rule:
    """One optimizer.

    Attributes:
        title: Its name in tables.
        factory: The class of torch.optim, whose defaults hold where nothing else is known.
        classes: Classes whose stored state serves.
        scaling: M of a parameter from its state.
        advance: The optimizer's own recurrence of what ``scaling`` needs: one more gradient.
        decoupled: Whether weight decay acts on the parameters and not through M; None where the
            group tells.
        settings: Beside the defaults of ``factory``.
    """

    title: str
    factory: Callable[..., torch.optim.Optimizer]
    classes: tuple[str, ...]
    scaling: Callable[[Stored, Group], Scaling]
    advance: Callable[[State, Group, Tensor], None]
    decoupled: bool | None = False
    settings: Mapping[str, Any] | None = None

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of a group that was told nothing."""
        return dict(self.factory([torch.zeros(1)], **(self.settings or {})).defaults)

    def is_decoupled(self, group: Group) -> bool:
        """Whether weight decay of this group leaves the gradient alone."""
        if self.decoupled is None:
            return bool(group.get("decoupled_weight_decay", False))
        return self.decoupled


def serves(held: OptimizerState, rule: Rule) -> bool:
    """Whether what the checkpoint holds is of a class that this rule reads.

    Older releases wrote the same for Adam and AdamW; their groups serve both.
    """
    if held.class_name is None:
        return "Adam" in rule.classes and is_old_adam(held)
    return held.class_name in rule.classes


def is_old_adam(held: OptimizerState) -> bool:
    """Whether groups of no known class are those of Adam or AdamW of an older release."""
    marked = ["amsgrad" in group and "betas" in group for group in held.groups]
    return held.class_name is None and bool(marked) and all(marked)


def wide(value: Tensor | float) -> Tensor:
    """A stored tensor, flattened, in float64."""
    return torch.as_tensor(value).detach().to(torch.float64).reshape(-1)


def _correction(stored: Stored, group: Group) -> float:
    """``1 - beta2^t`` at the stored step t."""
    steps, beta = float(stored["step"]), float(group["betas"][1])
    if not (steps >= 1 and 0 <= beta < 1):
        raise NotApplicable(
            f"the stored step {steps:g} and beta2 {beta:g} give no bias correction: "
            "that takes a step of 1 or more, and beta2 from 0 to below 1"
        )
    return float(1 - beta**steps)


def _inverse(root: Tensor, group: Group) -> Scaling:
    return Scaling(1 / (root + float(group["eps"])), root == 0)


def adam(stored: Stored, group: Group) -> Scaling:
    """``m = 1 / (sqrt(v / (1 - beta2^t)) + eps)``: Adam, AdamW and NAdam."""
    return _inverse((wide(stored["exp_avg_sq"]) / _correction(stored, group)).sqrt(), group)


def amsgrad(stored: Stored, group: Group) -> Scaling:
    """The same with the largest v so far, corrected by today's step."""
    return _inverse((wide(stored["max_exp_avg_sq"]) / _correction(stored, group)).sqrt(), group)


def adam_or_amsgrad(stored: Stored, group: Group) -> Scaling:
    """Which of both the group says."""
    return amsgrad(stored, group) if group.get("amsgrad") else adam(stored, group)


def radam(stored: Stored, group: Group) -> Scaling:
    """``m = sqrt(1 - beta2^t) / (sqrt(v) + eps)`` once ρ_t > 5, before that m = 1.

    Here eps joins the root before its correction, unlike Adam's.
    """
    steps, beta = float(stored["step"]), float(group["betas"][1])
    correction, root = _correction(stored, group), wide(stored["exp_avg_sq"]).sqrt()
    final = 2 / (1 - beta) - 1
    rho = final - 2 * steps * beta**steps / correction
    if rho <= RADAM_ADAPTS_FROM:
        return Scaling(torch.ones_like(root), root == 0, adapts=False)
    square = (rho - 4) * (rho - 2) * final / ((final - 4) * (final - 2) * rho)
    return Scaling(correction**0.5 / (root + float(group["eps"])), root == 0, square**0.5)


def adamax(stored: Stored, group: Group) -> Scaling:
    """``m = 1 / u``; eps is inside u, which therefore stops at eps where all gradients are 0."""
    largest = wide(stored["exp_inf"])
    floor = float(group["eps"]) * (1 + 2.0**-20)  # a float32 state rounds eps
    return Scaling(1 / largest, largest <= floor)


def adagrad(stored: Stored, group: Group) -> Scaling:
    """``m = 1 / (sqrt(sum) + eps)``."""
    decay = (float(stored["step"]) - 1) * float(group.get("lr_decay", 0.0))
    found = _inverse(wide(stored["sum"]).sqrt(), group)
    return Scaling(found.m, found.zero, 1 / (1 + decay))


def rmsprop(stored: Stored, group: Group) -> Scaling:
    """``m = 1 / (sqrt(v) + eps)``; centred: of v less the squared mean gradient.

    Where that is negative (by rounding), ``step()`` makes NaN, and so is m.
    """
    square = wide(stored["square_avg"])
    if group.get("centered"):
        square = square - wide(stored["grad_avg"]) ** 2
    return _inverse(square.sqrt(), group)


def _kept(state: State, key: str, like: Tensor) -> Tensor:
    """The tensor under ``key``, zeros at first."""
    if key not in state:
        state[key] = torch.zeros_like(like)
    return torch.as_tensor(state[key])


def _count(state: State) -> None:
    state["step"] = float(state.get("step", 0.0)) + 1


def _advance_adam(state: State, group: Group, gradient: Tensor) -> None:
    beta = float(group["betas"][1])
    square = _kept(state, "exp_avg_sq", gradient)
    square.mul_(beta).addcmul_(gradient, gradient, value=1 - beta)
    _count(state)


def _advance_amsgrad(state: State, group: Group, gradient: Tensor) -> None:
    _advance_adam(state, group, gradient)
    largest = _kept(state, "max_exp_avg_sq", gradient)
    torch.maximum(largest, torch.as_tensor(state["exp_avg_sq"]), out=largest)


def _advance_adamax(state: State, group: Group, gradient: Tensor) -> None:
    largest = _kept(state, "exp_inf", gradient)
    largest.mul_(float(group["betas"][1]))
    torch.maximum(largest, gradient.abs() + float(group["eps"]), out=largest)
    _count(state)


def _advance_adagrad(state: State, group: Group, gradient: Tensor) -> None:
    if "sum" not in state:
        state["sum"] = torch.full_like(gradient, float(group["initial_accumulator_value"]))
    _kept(state, "sum", gradient).addcmul_(gradient, gradient)
    _count(state)


def _advance_rmsprop(state: State, group: Group, gradient: Tensor) -> None:
    alpha = float(group["alpha"])
    square = _kept(state, "square_avg", gradient)
    square.mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
    if group.get("centered"):
        _kept(state, "grad_avg", gradient).lerp_(gradient, 1 - alpha)
    _count(state)


_ADAMS = ("Adam", "AdamW")

RULES: Mapping[str, Rule] = {
    "adam": Rule("Adam", torch.optim.Adam, _ADAMS, adam, _advance_adam),
    "adamw": Rule("AdamW", torch.optim.AdamW, _ADAMS, adam, _advance_adam, True),
    "amsgrad": Rule(
        "AMSGrad", torch.optim.Adam, _ADAMS, amsgrad, _advance_amsgrad, None, {"amsgrad": True}
    ),
    "nadam": Rule("NAdam", torch.optim.NAdam, ("NAdam",), adam, _advance_adam, None),
    "radam": Rule("RAdam", torch.optim.RAdam, ("RAdam",), radam, _advance_adam, None),
    "adamax": Rule("Adamax", torch.optim.Adamax, ("Adamax",), adamax, _advance_adamax),
    "adagrad": Rule("Adagrad", torch.optim.Adagrad, ("Adagrad",), adagrad, _advance_adagrad),
    "rmsprop": Rule("RMSprop", torch.optim.RMSprop, ("RMSprop",), rmsprop, _advance_rmsprop),
}
"""By the name of the variant."""
