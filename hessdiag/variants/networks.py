"""The changes of the network that variants name, made in place and undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch

from hessdiag.curvature.engines import BUILD, graph_bytes
from hessdiag.curvature.objective import Objective
from hessdiag.data import Batches, copy_batch, join
from hessdiag.errors import InputError
from hessdiag.memory import shared_memory
from hessdiag.names import named_parameters
from hessdiag.options import Options
from hessdiag.task import Units
from hessdiag.variants.edits import Edits
from hessdiag.variants.folding import Folded, fold_affine, fold_batchnorm
from hessdiag.variants.insertion import (
    BySample,
    about_constant,
    insert_batch,
    insert_by_sample,
    places,
    statistics,
)
from hessdiag.variants.scene import NotApplicable, NotEnoughMemory
from hessdiag.variants.tracing import Trace, trace

SAME = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Relative difference of two losses that are one function's, by the dtype of the analysis."""


@dataclass(frozen=True)
class Changed:
    """A changed network.

    Attributes:
        objective: Its loss over its data, which may have been joined into one batch.
        same_function: It computes what the network did, at these weights.
        gone: First names of parameters that are none of the changed network: they are constants
            in it; each with the reason.
        notes: For the table.
        changed: Layers that meet another input than before, named as by
            :func:`hessdiag.activations.find_layers`.
    """

    objective: Objective
    same_function: bool
    gone: Mapping[str, str]
    notes: tuple[str, ...]
    changed: frozenset[str]


@contextmanager
def changed_network(
    name: str, objective: Objective, options: Options, *, units: Units
) -> Iterator[Changed]:
    """The network with one change of :data:`hessdiag.variants.grammar.NETWORKS` made in place.

    Parameters keep their identity and their names; one that is made (a bias that takes up a
    BatchNorm's shift) is ``<layer>.bias``. All of it is undone at the end, also after an error.

    Args:
        name: Of the change.
        objective: Of the network, which is on loan.
        options: Of the analysis; those for memory and curvature count here.
        units: Batch to the number of units its mean was taken over.
    Raises:
        NotApplicable: The change cannot be made; why, and what would work.
    Cost:
        A handful of forward passes; ``bn`` measures the graph of one batch besides.
    """
    with Edits() as edits:
        yield CHANGES[name](objective, options, units, edits)


def _batch(
    objective: Objective, options: Options, units: Units, edits: Edits, *, detached: bool
) -> Changed:
    before = objective.value()
    traced = trace(objective)
    layers, notes = places(traced, compensated=True)
    folded = fold_affine(traced, edits)
    found = statistics(objective, layers)
    notes += about_constant(found)
    changed = objective
    if not detached:
        with Edits() as trial:
            insert_batch(layers, found, trial, detached=False)
            _check_memory(objective, options)
        changed, joined = _joined(objective, before, units)
        notes += joined
    insert_batch(layers, found, edits, detached=detached)
    changed = replace(changed)  # how ranks share the data was found without the normalisation
    _check_same(changed, before)
    names = {layer.name for layer in layers}
    return _described(changed, folded, notes, names, same_function=True)


def _by_sample(
    objective: Objective, _options: Options, _units: Units, edits: Edits, *, kind: BySample
) -> Changed:
    traced = trace(objective)
    layers, notes = places(traced, compensated=False)
    folded = fold_affine(traced, edits)
    notes += insert_by_sample(layers, kind, edits)
    return _described(objective, folded, notes, _hidden(traced), same_function=False)


def _without_batchnorm(
    objective: Objective, _options: Options, _units: Units, edits: Edits
) -> Changed:
    before = objective.value()
    folded = fold_batchnorm(objective, trace(objective), edits)
    _check_same(objective, before)
    return _described(objective, folded, [], set(), same_function=True)


CHANGES: Mapping[str, Callable[[Objective, Options, Units, Edits], Changed]] = MappingProxyType(
    {
        "bn": partial(_batch, detached=False),
        "bn-detached": partial(_batch, detached=True),
        "ln": partial(_by_sample, kind="ln"),
        "gn": partial(_by_sample, kind="gn"),
        "rms": partial(_by_sample, kind="rms"),
        "without-bn": _without_batchnorm,
    }
)
"""What makes each change of :data:`hessdiag.variants.grammar.NETWORKS`."""


def _described(
    objective: Objective,
    folded: Folded,
    notes: list[str],
    changed: set[str],
    *,
    same_function: bool,
) -> Changed:
    return Changed(
        objective=objective,
        same_function=same_function,
        gone=MappingProxyType(folded.gone),
        notes=(*folded.notes, *notes),
        changed=frozenset(changed | folded.changed),
    )


def _hidden(traced: Trace) -> set[str]:
    """Layers that see another input once the function of those below has changed."""
    return {
        name
        for name, layer in traced.layers.items()
        if traced.passages[layer.module].calls and traced.passages[layer.module].hidden
    }


def _joined(objective: Objective, before: float, units: Units) -> tuple[Objective, list[str]]:
    """The same loss with all data in one batch, over which statistics can be taken."""
    batches = objective.batches
    if len(batches.items) == 1:
        return objective, []
    try:
        batch = copy_batch(join(batches.items))
    except InputError as error:
        raise NotApplicable(
            "bn takes its statistics over the whole data, and the batches cannot be joined into "
            "one: not every tensor has a row per example, or rows differ in shape; give the "
            "data as one batch, or take bn-detached"
        ) from error
    one = Batches(
        items=(batch,), shares=(1.0,), rows=batches.rows, digest=batches.digest, notices=()
    )
    joined = replace(objective, batches=one)
    value = joined.value()
    if not _close(value, before, joined):
        apart, together = sum(map(units, batches.items)), units(batch)
        counts = (
            ""
            if math.isclose(apart, together)
            else f" ({apart:g} units apart, {together:g} together)"
        )
        raise NotApplicable(
            f"the loss of the data as one batch, {value:.12g}, is not its mean over the batches, "
            f"{before:.12g}{counts}; give the data as one batch, or take bn-detached"
        )
    return joined, [f"the {len(batches.items)} batches are joined into one"]


def _check_same(objective: Objective, before: float) -> None:
    after = objective.value()
    if not _close(after, before, objective):
        raise NotApplicable(
            f"the changed network has loss {after:.12g} where the original has {before:.12g}: "
            "the loss couples samples, or uses layers in a way that their forward calls do not show"
        )


def _close(one: float, other: float, objective: Objective) -> bool:
    dtype = next(p.dtype for p in objective.model.parameters() if p.is_floating_point())
    # Losses near zero are squares of residuals that are rounding.
    floor = 100 * torch.finfo(dtype).eps ** 2
    return math.isclose(one, other, rel_tol=SAME[dtype], abs_tol=floor)


def _check_memory(objective: Objective, options: Options) -> None:
    """The graph of all data at once must fit, for no product can do with less."""
    parameters = [p for _, p in named_parameters(objective.model) if p.is_floating_point()]
    budget = options.memory_budget
    if budget is None:
        budget = shared_memory(parameters[0].device, objective.group) // 2
    needed = graph_bytes(objective, parameters, BUILD[options.curvature])
    if needed > budget:
        raise NotEnoughMemory(
            f"bn needs the graph of the whole data at once, {needed / 2**20:.3g} MiB, and has "
            f"{budget / 2**20:.3g} MiB; raise --memory-budget, lower --max-examples, or take "
            "bn-detached"
        )
