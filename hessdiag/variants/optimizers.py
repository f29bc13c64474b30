"""M of an optimizer as coordinates of a block: from stored state, or from replayed gradients."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hessdiag.checkpoint.optimizer import OptimizerState
from hessdiag.variants.coordinates import Diagonal
from hessdiag.variants.moments import (
    RULES,
    Group,
    Rule,
    Scaling,
    Stored,
    adam_or_amsgrad,
    is_old_adam,
    serves,
)
from hessdiag.variants.replay import replay
from hessdiag.variants.scene import Built, Maker, NotApplicable, Scene

OLD_ADAM = "Adam or AdamW"

NO_STATE = (
    "the checkpoint holds no optimizer state; a variant with the optimizer's name (such as adam) "
    "replays M from gradients"
)
CHANGED = (
    "the stored optimizer state belongs to the network as it was; a variant with the optimizer's "
    "name (such as adam) replays M from this network's gradients"
)

NO_FIXED_M: Mapping[str, str] = {
    "SGD": "SGD scales nothing, with or without momentum: M = I, which is raw",
    "ASGD": "ASGD scales nothing: M = I, which is raw",
    "Muon": "Muon orthogonalises its momentum, which is no fixed M times the gradient; "
    "shampoo comes near it",
    "Adadelta": "Adadelta's step needs acc_delta of the step before, which is not stored; "
    "rmsprop comes near it",
    "Adafactor": "Adafactor's scale needs the gradient of the step, which is not stored; "
    "adam comes near it",
    "LBFGS": "LBFGS keeps pairs of steps and gradients and searches along a line: no M is stored",
    "Rprop": "Rprop looks at the signs of gradients only, which is no M times the gradient",
    "SparseAdam": "SparseAdam moves only the rows that a batch touches, which is no fixed M; "
    "adam comes near it",
}
"""Classes whose step is not a fixed M times the gradient, each with why."""

_BY_CLASS: Mapping[str, Rule] = {
    "Adam": replace(RULES["adam"], scaling=adam_or_amsgrad, decoupled=None),
    "AdamW": replace(RULES["adamw"], scaling=adam_or_amsgrad),
    "NAdam": RULES["nadam"],
    "RAdam": RULES["radam"],
    "Adamax": RULES["adamax"],
    "Adagrad": RULES["adagrad"],
    "RMSprop": RULES["rmsprop"],
}


class _LackingError(NotApplicable):
    """A parameter of the block has no state; a replay has."""


@dataclass(frozen=True)
class _Held:
    """State and hyperparameters by parameter, wherever they come from."""

    state: Mapping[str, Stored]
    groups: Mapping[str, Group]
    group_of: Mapping[str, int]


def optimizer_coordinates(scene: Scene) -> Built:
    """``P = sqrt(M)`` of the optimizer that trained the checkpoint, from its stored state.

    A block inside one parameter group has M = diag(m), one that spans groups diag(lr m) with each
    group's rate, ε, β and step. Dead rows without a second moment have scale 1.

    Raises:
        NotApplicable: There is no state, it is of another network, or no M follows from it.
    Source:
        maths.md 3.2; torch.optim.
    """
    held = scene.optimizer
    if held is None:
        raise NotApplicable(NO_STATE)
    class_name = held.class_name or ""
    if class_name in NO_FIXED_M:
        raise NotApplicable(NO_FIXED_M[class_name])
    if scene.changed:
        raise NotApplicable(CHANGED)
    if held.unmappable is not None:
        raise NotApplicable(f"the optimizer state cannot be given to parameters: {held.unmappable}")
    if is_old_adam(held):
        rule = replace(_BY_CLASS["Adam"], title=OLD_ADAM)
        return replace(_built(scene, rule, _held(held)), decoupled=None, source="state")
    if class_name not in _BY_CLASS:
        raise NotApplicable(_unknown(class_name))
    built = _built(scene, _BY_CLASS[class_name], _held(held))
    return replace(built, optimizer_class=class_name, source="state")


def _unknown(class_name: str) -> str:
    if not class_name:
        return (
            "the file does not tell which class of optimizer its state is of; give the task "
            "optimizer=..., or name one (such as adam) to replay M from gradients"
        )
    return (
        f"the M of {class_name} is not known here; name one of torch's (such as adam) "
        "to replay M from gradients"
    )


def named_optimizer(name: str) -> Maker:
    """The maker of a variant that names an optimizer.

    It takes the checkpoint's state where that is the optimizer's own (Adam's second moments serve
    AdamW and vice versa), else :func:`hessdiag.variants.replay.replay`.

    Args:
        name: A key of :data:`hessdiag.variants.moments.RULES`.
    """
    rule = RULES[name]

    def make(scene: Scene) -> Built:
        held = scene.optimizer
        if held is not None and not scene.changed and not held.unmappable and serves(held, rule):
            try:
                return replace(_built(scene, rule, _held(held)), source="state")
            except _LackingError:
                pass
        replayed = replay(scene, name)
        built = _built(scene, rule, _Held(replayed.state, replayed.groups, replayed.group_of))
        return replace(built, source=replayed.source, notes=(replayed.note, *built.notes))

    return make


def _held(held: OptimizerState) -> _Held:
    groups = {name: held.groups[index] for name, index in held.group_of.items()}
    return _Held(held.state, groups, held.group_of)


def _built(scene: Scene, rule: Rule, held: _Held) -> Built:
    """Coordinates of the block; parameters without state are allowed where all rows are dead."""
    places = scene.places()
    like = scene.parameters[0]
    dead = scene.dead.to(device=like.device, dtype=torch.bool)
    alive = {name for name, place in places.items() if not bool(dead[place].all())}
    found: dict[str, Scaling] = {}
    for name, place in places.items():
        if held.state.get(name):
            found[name] = _scaling(rule, held, name)
            if len(found[name].m) != len(place):
                raise NotApplicable(f"the state of {name} has not the parameter's shape")
        elif name in alive:
            raise _LackingError(_without_state(name, held))
    rates, notes = _rates(found, held, alive)
    m = torch.ones(len(dead), dtype=torch.float64, device=like.device)
    zero = torch.zeros_like(dead)
    for name, scaling in found.items():
        place = places[name]
        live = ~dead[place]
        _check(scaling, held.groups[name], live.to(scaling.m.device), name)
        zero[place] = scaling.zero.to(like.device)
        own = rates[name] * scaling.m.to(like.device)
        # M is the optimizer's own on a dead row, too, for weight decay acts there.
        kept = live | (own.isfinite() & (own > 0) & ~zero[place])
        m[place] = torch.where(kept, own, m[place])
    scale = m.sqrt().to(like.dtype)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise NotApplicable(f"M of {rule.title} leaves the range of {like.dtype} on this block")
    unscaled = int((zero & ~dead).sum())
    if not all(scaling.adapts for scaling in found.values()):
        notes.append(f"{rule.title} does not adapt in its first steps: M = I there")
    elif unscaled:
        notes.append(f"second moment 0, so that eps alone sets M: {unscaled} live parameters")
    groups = [held.groups[name] for name in found]
    return Built(
        Diagonal(scale),
        optimizer_class=rule.title,
        zero_state=int(zero.sum()),
        decoupled=bool(groups) and all(rule.is_decoupled(group) for group in groups),
        notes=tuple(notes),
    )


def _scaling(rule: Rule, held: _Held, name: str) -> Scaling:
    try:
        return rule.scaling(held.state[name], held.groups[name])
    except KeyError as error:
        raise _LackingError(
            f"the state of {name} or its parameter group lacks {error.args[0]!r}, which the M of "
            f"{rule.title} is made of"
        ) from error
    except (TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise NotApplicable(f"the parameter group of {name} makes no sense: {error}") from error


def _without_state(name: str, held: _Held) -> str:
    if name in held.state:
        return f"{name} has no optimizer state: it never had a gradient"
    return f"{name} has no optimizer state: it is not among the optimizer's parameters"


def _rates(
    found: Mapping[str, Scaling], held: _Held, alive: Collection[str]
) -> tuple[dict[str, float], list[str]]:
    """What multiplies each parameter's m, relative to the others of the block.

    The learning rates where the block spans groups; beside them what the number of steps adds,
    where the parameters took different numbers of steps.
    """
    factors = {name: scaling.factor for name, scaling in found.items()}
    if len(set(factors.values())) < 2:
        factors = dict.fromkeys(found, 1.0)
    if len({held.group_of[name] for name in found}) < 2:
        return factors, []
    rates = {name: _rate(held.groups[name], "lr") for name in found}
    notes = []
    decayed = not any(rates.values())
    if decayed and all("initial_lr" in held.groups[name] for name in found):
        rates = {name: _rate(held.groups[name], "initial_lr") for name in found}
        notes.append("all learning rates have decayed to 0: M has the initial ones")
    for name, rate in rates.items():
        if name in alive and not (rate > 0 and math.isfinite(rate)):
            raise NotApplicable(
                f"the block spans parameter groups and the learning rate of {name} is {rate:g}: "
                "M is not invertible; --blocks parameter stays inside groups"
            )
    return {name: rate * factors[name] for name, rate in rates.items()}, notes


def _rate(group: Group, key: str) -> float:
    try:
        return float(group[key])
    except (KeyError, TypeError, ValueError, RuntimeError):
        return math.nan


def _check(scaling: Scaling, group: Group, live: Tensor, name: str) -> None:
    """Refuse an M that is no number or not positive where that matters."""
    bad = live & ~(scaling.m.isfinite() & (scaling.m > 0))
    count = int(bad.sum())
    if not count:
        return
    if bool(scaling.zero[bad].all()):
        reason = "a second moment of 0 and eps is 0: M is infinite there"
    elif group.get("centered"):
        reason = "a centred variance that is negative or no number: torch's own step is NaN there"
    else:
        reason = "a second moment that is negative or not finite"
    raise NotApplicable(f"{count} parameters of {name} have {reason}")
