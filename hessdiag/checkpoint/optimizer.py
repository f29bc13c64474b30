"""An optimizer's stored state, by the name of the parameter that it belongs to, or not at all."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessdiag.checkpoint.alignment import align
from hessdiag.checkpoint.contents import is_optimizer
from hessdiag.errors import TaskError
from hessdiag.names import clean_name, named_parameters

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Slots = list[list[str | None]]
"""For each group, the parameter that each of its places holds; None is none of the model's."""

# What only one class of torch.optim writes into its groups.
_MARKS = (
    ("dampening", "SGD"),
    ("centered", "RMSprop"),
    ("initial_accumulator_value", "Adagrad"),
    ("rho", "Adadelta"),
    ("momentum_decay", "NAdam"),
    ("lambd", "ASGD"),
    ("etas", "Rprop"),
    ("beta2_decay", "Adafactor"),
    ("ns_steps", "Muon"),
    ("history_size", "LBFGS"),
)

_DECOUPLED = "decoupled_weight_decay"


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer knew of each parameter.

    Attributes:
        class_name: The optimizer's class, where the task or the file tells.
        groups: Hyperparameters of each parameter group.
        state: By the parameter's name in the model: its state's tensors and numbers. A parameter
            of the optimizer that never had a gradient has an empty one.
        group_of: The group of each parameter.
        mapped_by: ``names``, ``optimizer`` or ``single group``; None if unmappable.
        unmappable: Why the state could not be given to parameters; then ``state`` is empty.
    """

    class_name: str | None
    groups: list[dict[str, Any]]
    state: dict[str, dict[str, Tensor | float]] = field(default_factory=dict)
    group_of: dict[str, int] = field(default_factory=dict)
    mapped_by: str | None = None
    unmappable: str | None = None


class _UnmappableError(Exception):
    """The reason why stored state cannot be given to parameters; never leaves this module."""


def map_optimizer(
    raw: Mapping[str, Any], model: nn.Module, make_optimizer: MakeOptimizer | None = None
) -> OptimizerState:
    """Give stored optimizer state to parameters by names, by the task's optimizer, or refuse.

    Never by position across several groups: with the usual decay and no-decay groups that puts
    state of equal shape on the wrong tensors, and no check of shapes can see it.

    Args:
        raw: An ``optimizer.state_dict()``.
        model: The network; it is left as it was.
        make_optimizer: The task's own; called with the model.

    Raises:
        TaskError: ``make_optimizer`` does not work.
    """
    groups: list[dict[str, Any]] = []
    class_name: str | None = None
    try:
        stored = _stored_groups(raw)
        groups = [
            {k: v for k, v in group.items() if k not in ("params", "param_names")}
            for group in stored
        ]
        class_name = _class_from(groups, raw["state"])
        with _without_compiler():
            own = _build(make_optimizer, model) if make_optimizer is not None else None
            if own is not None:
                class_name = _agreed_class(class_name, groups, own)
            slots, mapped_by = _slots(stored, model, own)
        state, group_of = _assign(raw["state"], stored, slots, model)
    except _UnmappableError as reason:
        return OptimizerState(class_name, groups, unmappable=str(reason))
    return OptimizerState(class_name, groups, state, group_of, mapped_by=mapped_by)


def _stored_groups(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if not is_optimizer(raw) or not raw["param_groups"]:
        raise _UnmappableError("it is not a state_dict() of a torch optimizer")
    return list(raw["param_groups"])


def _slots(
    stored: list[Mapping[str, Any]], model: nn.Module, own: torch.optim.Optimizer | None
) -> tuple[Slots, str]:
    names = _stored_names(stored)
    if names is not None:
        if own is not None and _stored_names(own.state_dict()["param_groups"]) == names:
            # The objects are surer than the names: those may count from a submodule.
            return _places(own, model), "names"
        first = dict(_first_names(model))
        flat = [name for group in names for name in group]
        renamed = align(flat, first).renamed
        unknown = [name for name in flat if renamed[name] not in first]
        if unknown:
            raise _UnmappableError(
                f"its parameter names are not the model's: {', '.join(unknown[:4])}"
                f"{', …' if len(unknown) > 4 else ''} ({len(unknown)} of {len(flat)})"
            )
        _check_one_place(flat, renamed, model)
        return [[first[renamed[name]] for name in group] for group in names], "names"
    if own is not None:
        _check_alike(own, stored)
        return _places(own, model), "optimizer"
    if len(stored) > 1:
        raise _UnmappableError(
            f"it has {len(stored)} parameter groups and no parameter names, and positions do not "
            "tell which tensor is whose; give the task optimizer=..., or train with "
            "model.named_parameters()"
        )
    count = len(stored[0]["params"])
    everything = [name for name, _ in named_parameters(model)]
    trainable = [name for name, p in named_parameters(model) if p.requires_grad]
    for candidates in (trainable, everything):
        if len(candidates) == count:
            return [list(candidates)], "single group"
    raise _UnmappableError(
        f"it is for {count} parameters and the model has {len(everything)} "
        f"({len(trainable)} trainable); give the task optimizer=..."
    )


def _check_one_place(flat: list[str], renamed: Mapping[str, str], model: nn.Module) -> None:
    """Refuse names of some parameters that fit others as well, counted from a submodule."""
    shapes = {name: p.shape for name, p in named_parameters(model, aliases=True)}
    if len(set(renamed.values())) == len(dict(named_parameters(model))):
        return
    own = [shapes[renamed[name]] for name in flat]
    for prefix, _ in model.named_modules():
        inside = [f"{clean_name(prefix)}.{name}" for name in flat]
        elsewhere = prefix and inside != [renamed[name] for name in flat]
        if elsewhere and [shapes.get(name) for name in inside] == own:
            raise _UnmappableError(
                f"its parameter names fit the network and its part {clean_name(prefix)!r} alike; "
                "give the task optimizer=..., which tells whose they are"
            )


def _stored_names(stored: list[Mapping[str, Any]]) -> list[list[str]] | None:
    """Names that the groups carry, as ``param_names`` or instead of numbers; None if any lacks."""
    names = []
    for group in stored:
        given = group.get("param_names", group["params"])
        if not isinstance(given, list | tuple) or len(given) != len(group["params"]):
            return None
        if not all(isinstance(name, str) for name in given):
            return None
        names.append(list(given))
    return names


def _check_alike(own: torch.optim.Optimizer, stored: list[Mapping[str, Any]]) -> None:
    """Refuse a task's optimizer whose groups are not those of the file."""
    here = [len(group["params"]) for group in own.param_groups]
    there = [len(group["params"]) for group in stored]
    if here != there:
        raise _UnmappableError(
            f"the task's optimizer has groups of {here} parameters and the file of {there}"
        )
    for key in sorted(own.param_groups[0].keys() & stored[0].keys() - {"params", "param_names"}):
        # A schedule changes the rates; the first ones stay under another key.
        first = "initial_lr" if key == "lr" and "initial_lr" in stored[0] else key
        mine, theirs = _ranks(own.param_groups, key), _ranks(stored, first)
        if mine and theirs and mine != theirs:
            label = key.replace("weight_decay", "weight decay")
            raise _UnmappableError(
                f"the task's optimizer has groups with {label} "
                f"{[group[key] for group in own.param_groups]} and the file "
                f"{[group[first] for group in stored]}: they come in another order"
            )


def _ranks(groups: Sequence[Mapping[str, Any]], key: str) -> list[int] | None:
    """How a hyperparameter orders the groups, equal ones alike; None where it tells nothing."""
    try:
        values = [
            tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),)
            for value in (group[key] for group in groups)
        ]
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None
    distinct = sorted(set(values))
    return [distinct.index(value) for value in values] if len(distinct) > 1 else None


def _places(own: torch.optim.Optimizer, model: nn.Module) -> Slots:
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    return [[names.get(id(p)) for p in group["params"]] for group in own.param_groups]


def _first_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Every name of every parameter with the first one of the same tensor."""
    first: dict[int, str] = {}
    for name, parameter in named_parameters(model, aliases=True):
        yield name, first.setdefault(id(parameter), name)


def _assign(
    state: Mapping[Any, Any], stored: list[Mapping[str, Any]], slots: Slots, model: nn.Module
) -> tuple[dict[str, dict[str, Tensor | float]], dict[str, int]]:
    """State and group by name, every tensor of the parameter's shape."""
    shapes = {name: parameter.shape for name, parameter in named_parameters(model)}
    by_name: dict[str, dict[str, Tensor | float]] = {}
    group_of: dict[str, int] = {}
    keys: set[Any] = set()
    for index, (group, names) in enumerate(zip(stored, slots, strict=True)):
        for key, name in zip(group["params"], names, strict=True):
            keys.add(key)
            if name is None:
                continue
            if name in group_of:
                raise _UnmappableError(f"{name} is in it twice")
            group_of[name] = index
            by_name[name] = _entries(state.get(key, {}), name, shapes[name])
    stray = [key for key in state if key not in keys]
    if stray:
        raise _UnmappableError(f"it holds state of parameters that are in no group: {stray[:4]}")
    return by_name, group_of


def _entries(held: object, name: str, shape: torch.Size) -> dict[str, Tensor | float]:
    if not isinstance(held, Mapping):
        raise _UnmappableError(f"the state of {name} is not a dict")
    entries: dict[str, Tensor | float] = {}
    for key, value in held.items():
        if isinstance(value, Tensor):
            if value.ndim and value.shape != shape:
                raise _UnmappableError(
                    f"{key} of {name} has shape {tuple(value.shape)}, the parameter {tuple(shape)}"
                )
            entries[str(key)] = value.detach()
        elif isinstance(value, int | float | np.number):
            entries[str(key)] = float(value)
    return entries


def _class_from(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> str | None:
    """The class of torch.optim that writes such groups, where only one does."""
    first = groups[0]
    for mark, class_name in _MARKS:
        if mark in first:
            return class_name
    if "amsgrad" in first and "betas" in first:
        # Older releases wrote the same for Adam and AdamW.
        decoupled = first.get(_DECOUPLED)
        return None if decoupled is None else "AdamW" if decoupled else "Adam"
    if "betas" in first and any("exp_inf" in held for held in state.values()):
        return "Adamax"
    if "betas" in first and _DECOUPLED in first:
        return "RAdam"
    if "betas" in first and "weight_decay" not in first:
        return "SparseAdam"
    return None


def optimizer_class(raw: Mapping[str, Any]) -> str | None:
    """The class of torch.optim whose ``state_dict()`` this is, where it tells."""
    try:
        return _class_from(_stored_groups(raw), raw["state"])
    except _UnmappableError:
        return None


def _agreed_class(
    stored: str | None, groups: Sequence[Mapping[str, Any]], own: torch.optim.Optimizer
) -> str:
    """The task's class; refused if torch's own classes tell that the file is of another."""
    mine = _class_of(own)
    if stored is None or stored == mine or not _torch_steps(own):
        return mine
    flags = [group.get(_DECOUPLED) for group in (own.param_groups[0], groups[0])]
    if {stored, mine} == {"Adam", "AdamW"} and flags[0] == flags[1]:
        return stored  # Adam(decoupled_weight_decay=True) is AdamW
    raise _UnmappableError(f"the task's optimizer is {mine} and the state that of {stored}")


def _torch_steps(own: torch.optim.Optimizer) -> bool:
    """Whether ``step()`` is torch's, also where a class derived from torch's has another name."""
    return type(own).step.__module__.startswith("torch.optim")


def _class_of(own: torch.optim.Optimizer) -> str:
    """The class of torch.optim that steps, or another's name, never one that torch's has too."""
    kind = type(own)
    if _torch_steps(own):
        return next(c.__name__ for c in kind.__mro__ if c.__module__.startswith("torch.optim"))
    name = kind.__name__
    return f"{kind.__module__}.{name}" if hasattr(torch.optim, name) else name


def _build(make_optimizer: MakeOptimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The task's optimizer, leaving the model and all random numbers as they were."""
    with _untouched(model):
        try:
            own = make_optimizer(model)
        except (Exception, SystemExit) as error:
            raise TaskError(
                f"the task's optimizer(model) raised {type(error).__name__}: {error}"
            ) from error
    if not isinstance(own, torch.optim.Optimizer):
        raise TaskError(
            f"the task's optimizer(model) must return a torch.optim.Optimizer, "
            f"not a {type(own).__name__}"
        )
    return own


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Let torch mark nothing for its compiler, which takes seconds to import and is not used."""
    mark = "__dynamo_disable"
    methods = (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.state_dict)
    inner = [getattr(method, "__wrapped__", None) for method in methods]
    unmarked = [method for method in inner if method is not None and not hasattr(method, mark)]
    for method in unmarked:
        setattr(method, mark, method)
    try:
        yield
    finally:
        for method in unmarked:
            delattr(method, mark)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put back what building an optimizer may change; refuse what cannot be put back."""
    parameters = [(p, p.requires_grad, p.grad, p._version) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for parameter, trainable, gradient, _ in parameters:
            parameter.requires_grad_(trainable)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
    if any(parameter._version != version for parameter, _, _, version in parameters):
        raise TaskError("the task's optimizer(model) changes the model's weights; it must not")
