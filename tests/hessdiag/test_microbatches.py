"""Batches that are cut for want of memory have the loss of whole ones, or stay whole."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import sample_networks
from fake_ranks import InTurn
from hessdiag import Task, analyze
from hessdiag.backoff import first_relief, next_relief
from hessdiag.blocks import find_blocks
from hessdiag.data import row_count
from hessdiag.microbatches import cut, whole
from hessdiag.network import Network
from hessdiag.options import make_options

WEIGHTS = torch.tensor([1.0, 5.0, 0.2])
WHY = "a batch's loss is not the mean over its rows"


def by_class(model, batch):
    """torch's mean is then over the weights."""
    return F.cross_entropy(model(batch[0]), batch[1], weight=WEIGHTS.to(batch[0].dtype))


def masked(model, batch):
    """A mean over the rows that count, of a task that does not say how many those are."""
    loss = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return (loss * batch[2]).sum() / batch[2].sum()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def classes():
    """Sorted by class: the first rows look as if the loss were their mean. One class is left."""
    torch.manual_seed(1)
    sorted_ones = torch.arange(3).repeat_interleave(10)
    data = [(torch.randn(30, 4), sorted_ones), (torch.randn(12, 4), torch.ones(12).long())]
    return Task(model(), data, by_class)


def padded():
    """Nine rows in the midst of the batch count not."""
    torch.manual_seed(1)
    counted = torch.ones(20)
    counted[8:17] = 0
    data = [(torch.randn(20, 4), torch.randint(0, 3, (20,)), counted)]
    return Task(model(), data, masked)


@contextmanager
def lent(task):
    with sample_networks.lent(task) as (objective, named):
        counted = replace(objective, units=lambda batch: float(len(batch[0])))
        yield counted, list(named.values())


def sizes(objective):
    return [row_count(batch) for batch in objective.batches.items]


def test_each_batch_is_cut_that_is_a_mean_over_its_rows_and_no_other():
    with lent(classes()) as (objective, parameters):
        parts = cut(objective, 4)
        assert sizes(parts) == [30, 4, 4, 4]
        assert [row_count(batch) for batch in whole(parts, 4)] == [30]
        right, found = objective.gradient(parameters), parts.gradient(parameters)
        assert float((right - found).norm()) <= 1e-13 * float(right.norm())


@pytest.mark.parametrize("rows", [1, 4, 10, 19])
def test_no_micro_batch_is_without_a_row_that_counts(rows):
    with lent(padded()) as (objective, _):
        parts = cut(objective, rows)
        assert sizes(parts) == [20]
        assert parts.value() == objective.value()


def test_rows_that_see_each_other_stay_together():
    spread = Task(model(), [(torch.randn(8, 4),)], lambda m, b: m(b[0]).std())
    with lent(spread) as (objective, _):
        assert sizes(cut(objective, 3)) == [8]


def test_a_perfect_fit_does_not_hide_that_rows_have_weights():
    """All parts have loss and gradient zero, whatever they weigh; their curvature is not."""
    net = nn.Linear(4, 1).double()
    inputs = torch.randn(8, 4, dtype=torch.float64)
    with torch.no_grad():
        net.weight.zero_(), net.bias.zero_()
    weights = torch.arange(1.0, 9.0)
    fit = Task(
        net,
        [(inputs, weights)],
        lambda m, b: (b[1] * m(b[0])[:, 0].square()).sum() / b[1].sum(),
    )
    with lent(fit) as (objective, _):
        assert objective.value() == 0.0
        assert sizes(cut(objective, 4)) == [8]


def test_equal_losses_do_not_hide_that_gradients_are_of_the_batch():
    """A loss divided by its own value is 1 for any rows."""

    def relative(m, batch):
        loss = F.cross_entropy(m(batch[0]), batch[1])
        return loss / loss.detach()

    mixed = classes()
    with lent(Task(mixed.model, mixed.data, relative)) as (objective, _):
        assert sizes(cut(objective, 4)) == [30, 12]


def test_ranks_that_share_the_test_find_what_one_finds():
    mixed = classes()
    data = [mixed.data[1], mixed.data[0], mixed.data[0]]
    with lent(Task(mixed.model, data, mixed.loss)) as (objective, _):
        for size in (1, 2, 3):
            assert sizes(cut(replace(objective, group=InTurn(size)), 4)) == [4, 4, 4, 30, 30]


def relief(task, **options):
    block = find_blocks(task.model, ("whole",))[0]
    with lent(task) as (objective, _):
        network = Network(objective, make_options(**options), lambda _: None)
        return first_relief(network, block)


def test_the_row_is_told_which_batches_stay_whole():
    assert relief(classes(), memory_budget=0).notes == (
        "memory: batches of up to 12 rows are cut into 12 micro-batches to fit --memory-budget; "
        f"1 batch stays whole, for {WHY}",
    )
    assert relief(padded(), memory_budget=0).notes == (
        f"memory: batches of up to 20 rows stay whole, where there is memory for 1: {WHY}",
    )


def next_rows(task):
    """Of a batch once memory ran out: it is halved, where that helps."""
    error = MemoryError("out of memory")
    error.of_batches = True
    with lent(task) as (objective, _):
        network = Network(objective, make_options(engine="recompute"), lambda _: None)
        found = next_relief(network, error, exact=True)
        assert found is not None
        return found.rows, found.matrix_free


def test_only_where_the_largest_batch_is_cut_are_others():
    """The largest batch of the first task must stay whole, and memory for it is what lacks."""
    mixed = classes()
    assert next_rows(mixed) == (None, True)
    assert next_rows(Task(mixed.model, mixed.data[1:], mixed.loss)) == (6, False)


@pytest.mark.parametrize("given", [classes, padded])
def test_numbers_do_not_depend_on_the_memory_that_there_is(given):
    options = {"blocks": "whole", "exact_limit": 100, "variants": "raw"}
    short = analyze(given(), memory_budget=0, **options)["whole"].variants["raw"]
    right = analyze(given(), **options)["whole"].variants["raw"]
    assert short["skipped"] is None
    assert any("whole" in note for note in short["notes"])
    for name in ("lambda_max", "lambda_min", "trace"):
        assert short[name].value == pytest.approx(right[name].value, rel=1e-11)
