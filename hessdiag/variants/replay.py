"""Optimizer state where there is none of its own: from gradients, as if each had been a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from hessdiag.curvature.loan import has_batch_statistics
from hessdiag.curvature.objective import placed, unflatten
from hessdiag.data import is_stack, row_count, take
from hessdiag.variants.grammar import parse_variant
from hessdiag.variants.moments import RULES, Group, Rule, State, serves
from hessdiag.variants.scene import NotApplicable, Scene

SLICES = 16
_KEY = "replayed optimizers"
_NOT_HELD = -1


@dataclass(frozen=True)
class Sample:
    """One gradient, and where it was taken.

    Attributes:
        gradient: Of every parameter of the network, by name.
        position: The parameters themselves, by name.
    """

    gradient: Mapping[str, Tensor]
    position: Mapping[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """The gradients that stand for an optimizer's steps, in their order.

    Attributes:
        source: ``iterates`` or ``minibatches``.
        what: The same in words, such as "at the iterates".
        each: Computes them, one after the other; no two are held at once.
        most: How many there are, unless some are not finite and left out.
    """

    source: str
    what: str
    each: Iterator[Sample]
    most: int


@dataclass(frozen=True)
class Replayed:
    """The state that an optimizer would hold after these gradients.

    Attributes:
        state: By the parameter's name, under torch's keys.
        groups: Hyperparameters of each parameter.
        group_of: Its group in the checkpoint's optimizer, 0 where that is another one.
        source: ``iterates`` or ``minibatches``.
        note: What was replayed.
    """

    state: Mapping[str, State]
    groups: Mapping[str, Group]
    group_of: Mapping[str, int]
    source: str
    note: str


def replay(scene: Scene, name: str) -> Replayed:
    """State of the optimizer ``name`` from gradients, by its own recurrence from an empty state.

    Each gradient is taken for one step, g_t itself included, as in torch: Adam's v is the average
    of g² with weights beta2^(T-t), bias-corrected, RMSprop's the same without correction, Adagrad
    sums g², Adamax takes the largest beta2^(T-t)|g|. So 1/m is a root mean square of g (Adamax:
    a maximum), one of the averages of |g| that the theory allows. Hyperparameters are those of
    the checkpoint's groups if its optimizer is of the same class, else torch's defaults;
    ``--weight-decay`` is added to the gradient where the optimizer would.

    Args:
        scene: Its cache keeps the states of all optimizers that the options name.
        name: A key of :data:`hessdiag.variants.moments.RULES`.
    Raises:
        NotApplicable: A gradient is not finite, or an iterate does not fit the network.
    Cost:
        Once per network: one gradient over the dataset per iterate, or one in all; one to two
        vectors of the network's size per optimizer.
    Source:
        Ye (2024), section 3; maths.md 6.
    """
    done = cast("dict[str, Replayed | NotApplicable]", scene.cache.setdefault(_KEY, {}))
    if name not in done:
        named = {parse_variant(variant).coordinates for variant in scene.options.variants or ()}
        wanted = [rule for rule in RULES if rule == name or (rule in named and rule not in done)]
        try:
            done.update(_replay(scene, wanted))
        except NotApplicable as reason:
            done.update(dict.fromkeys(wanted, reason))
    found = done[name]
    if isinstance(found, NotApplicable):
        raise NotApplicable(str(found))
    return found


def _replay(scene: Scene, wanted: Sequence[str]) -> dict[str, Replayed | NotApplicable]:
    names = _differentiable(scene)
    refused: dict[str, NotApplicable] = {}
    chosen: dict[str, tuple[dict[str, Group], dict[str, int]]] = {}
    for rule in wanted:
        try:
            chosen[rule] = _hyperparameters(scene, RULES[rule], names)
        except NotApplicable as reason:
            refused[rule] = reason
    if not chosen:
        return {**refused}
    states: dict[str, dict[str, State]] = {rule: {n: {} for n in names} for rule in chosen}
    samples = gradients(scene)
    count = 0
    for count, sample in enumerate(samples.each, 1):  # noqa: B007 - the last is their number
        for rule, (groups, _) in chosen.items():
            for name in names:
                group = groups[name]
                gradient = sample.gradient[name]
                if scene.options.weight_decay and not RULES[rule].is_decoupled(group):
                    decay = scene.options.weight_decay
                    gradient = gradient.add(sample.position[name], alpha=decay)
                RULES[rule].advance(states[rule][name], group, gradient)
    note = f"M replayed from {count} gradient{'s' * (count != 1)} {samples.what}"
    if count < samples.most:
        note += f", {samples.most - count} of the {samples.most} being not finite"
    if count == 1:
        note += "; M of a single gradient is 1/|g| and tells little of the rows of H"
    found = {
        rule: Replayed(states[rule], groups, group_of, samples.source, note)
        for rule, (groups, group_of) in chosen.items()
    }
    return {**found, **refused}


def _differentiable(scene: Scene) -> list[str]:
    return [name for name, p in scene.named.items() if p.is_floating_point()]


def _hyperparameters(
    scene: Scene, rule: Rule, names: Sequence[str]
) -> tuple[dict[str, Group], dict[str, int]]:
    """Of each parameter the hyperparameters, the file's own if of that class, and the group."""
    defaults = rule.defaults()
    held = scene.optimizer
    if held is None or not serves(held, rule) or (len(held.groups) > 1 and not held.group_of):
        return dict.fromkeys(names, defaults), dict.fromkeys(names, 0)
    # A parameter that the optimizer does not hold is a group of its own, unless there is one only.
    other = _NOT_HELD if len(held.groups) > 1 else 0
    own: dict[int, Group] = {i: defaults | group for i, group in enumerate(held.groups)}
    for group in own.values():
        _try(rule, group)
    own[_NOT_HELD] = defaults
    group_of = {name: held.group_of.get(name, other) for name in names}
    return {name: own[index] for name, index in group_of.items()}, group_of


def _try(rule: Rule, group: Group) -> None:
    """Refuse hyperparameters of a damaged file before they meet any gradient."""
    state: State = {}
    try:
        rule.advance(state, group, torch.ones(1))
        rule.scaling(state, group)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise NotApplicable(
            f"a stored parameter group of {rule.title} makes no sense: {error}"
        ) from error


def gradients(scene: Scene) -> Samples:
    """Gradients of all parameters along the iterates, else of mini-batches at the checkpoint.

    The iterates belong to the checkpoint's own network; a changed one takes mini-batches, the
    task's own also where the change joined them. A single batch is cut into at most 16 slices of
    rows, as equal as can be (of two rows or more where the network normalises over the batch).

    Raises:
        NotApplicable: While they are computed: one is not finite, or an iterate does not fit.
    """
    if scene.iterates and not scene.changed:
        return Samples("iterates", "at the iterates", _along(scene), len(scene.iterates))
    items = scene.objective.batches.items
    if len(items) > 1:
        return Samples(
            "minibatches", "of the task's mini-batches", _of(scene, items, cut=False), len(items)
        )
    if len(scene.batch_rows) > 1:
        ends = list(accumulate(scene.batch_rows, initial=0))
        parts = [take(items[0], slice(*pair)) for pair in pairwise(ends)]
        return Samples(
            "minibatches", "of the task's mini-batches", _of(scene, parts, cut=True), len(parts)
        )
    slices = _slices(scene, items[0])
    what = "of slices of the one batch" if len(slices) > 1 else "of the one batch, all the data"
    return Samples("minibatches", what, _of(scene, slices, cut=len(slices) > 1), len(slices))


def _along(scene: Scene) -> Iterator[Sample]:
    names = _differentiable(scene)
    for index, read in enumerate(scene.iterates):
        values = read()
        position = {}
        for name in names:
            own = scene.named[name]
            if name not in values or values[name].shape != own.shape:
                raise NotApplicable(f"iterate {index} does not hold {name} as {tuple(own.shape)}")
            position[name] = values[name].detach().to(own)
        with placed([scene.named[n] for n in position], [*position.values()]):
            gradient = scene.objective.gradient([scene.named[name] for name in names])
        if not bool(gradient.isfinite().all()):
            raise NotApplicable(f"the gradient at iterate {index} is not finite")
        yield Sample(_by_name(scene, names, gradient), position)


def _of(scene: Scene, batches: Sequence[Any], *, cut: bool) -> Iterator[Sample]:
    names = _differentiable(scene)
    parameters = [scene.named[name] for name in names]
    position = {name: scene.named[name].data for name in names}
    found = False
    for index, batch in enumerate(batches):
        alone = replace(scene.objective.batches, items=(batch,), shares=(1.0,))
        gradient = replace(scene.objective, batches=alone).gradient(parameters)
        if not bool(gradient.isfinite().all()):
            if cut:  # a slice may hold no counted target, though the batch does
                continue
            raise NotApplicable(f"the gradient of batch {index} is not finite")
        found = True
        yield Sample(_by_name(scene, names, gradient), position)
    if not found:
        raise NotApplicable("no slice of the only batch has a finite gradient")


def _slices(scene: Scene, batch: Any) -> list[Any]:
    if not is_stack(batch):
        return [batch]
    rows = row_count(batch)
    least = 2 if scene.changed or has_batch_statistics(scene.model) else 1
    count = max(1, min(SLICES, rows // least))
    ends = [rows * part // count for part in range(count + 1)]
    return [take(batch, slice(*pair)) for pair in pairwise(ends)]


def _by_name(scene: Scene, names: Sequence[str], gradient: Tensor) -> dict[str, Tensor]:
    pieces = unflatten(gradient, [scene.named[name] for name in names])
    return dict(zip(names, pieces, strict=True))
