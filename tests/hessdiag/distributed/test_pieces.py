"""How the data are shared among ranks: the parts make the whole, whatever its shape."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fake_ranks import Apart
from hessdiag import Task
from hessdiag.curvature.engines import BUILD, Recompute
from hessdiag.distributed.pieces import dealt, divided
from hessdiag.task import units

RANKS = (2, 3, 5)


def parts(objective, ranks, counted):
    return [replace(objective, group=Apart(rank, ranks), units=counted) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_products_gradients_and_losses_of_the_parts_sum_to_the_dense_ones(case, networks, ranks):
    exact = networks.dense_hessian(case)
    size = exact.shape[0]
    vector = torch.randn(size, generator=torch.Generator().manual_seed(1)).double()
    with networks.lent(case.task) as (objective, named):
        parameters = list(named.values())
        found = parts(objective, ranks, units(case.task))
        product = sum(Recompute(part, parameters, BUILD["hessian"])(vector) for part in found)
        gradient = sum(part.gradient(parameters) for part in found)
        loss = sum(part.value() for part in found)
        scale = float(exact.norm() * vector.norm())
        assert float((product - exact @ vector).norm()) <= 1e-12 * scale
        whole = objective.gradient(parameters)
        assert float((gradient - whole).norm()) <= 1e-12 * max(float(whole.norm()), 1.0)
        assert loss == pytest.approx(objective.value(), rel=1e-12)


def ragged(*sizes):
    return [torch.arange(100.0 * i, 100.0 * i + n) for i, n in enumerate(sizes)]


def rows(batch):
    return float(len(batch))


@pytest.mark.parametrize("sizes", [(8,), (5, 3), (1, 7, 2), (3, 3, 3, 3), (1,)])
@pytest.mark.parametrize("ranks", RANKS)
def test_every_row_has_one_rank_and_ranks_have_as_many_but_for_one(sizes, ranks):
    items, total = ragged(*sizes), sum(sizes)
    division = divided(items, [n / total for n in sizes], ranks, rows)
    held = torch.cat([piece.batch for own in division.pieces for piece in own])
    assert torch.equal(held, torch.cat(items))
    assert max(division.rows) - min(division.rows) <= 1
    for own in division.pieces:
        for piece in own:
            assert piece.share == pytest.approx(piece.rows / total, rel=1e-15)


def test_a_piece_counts_by_its_units_and_one_without_any_is_left_out():
    batch = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    division = divided([batch], [1.0], 4, lambda piece: float(piece.sum()))
    shares = [[piece.share for piece in own] for own in division.pieces]
    assert shares == [[0.5], [0.25], [], [0.25]]


def test_whole_batches_go_the_largest_first_to_the_rank_that_has_least():
    division = dealt(ragged(2, 6, 3, 4), [0.25] * 4, 2, "because")
    assert [[piece.index for piece in own] for own in division.pieces] == [[0, 1], [2, 3]]
    assert division.rows == [8, 7]
    assert division.reason == ""


def test_ranks_without_work_are_told_and_why():
    division = dealt(ragged(4), [1.0], 2, "because")
    assert division.rows == [4, 0]
    assert division.reason == "because"


def contrastive(model, batch):
    """Rows see each other, so that no part of a batch has a part of its loss."""
    seen = model(batch)
    return torch.logsumexp(seen @ seen.T, dim=1).mean()


def summing(model, batch):
    """No mean at all."""
    return model(batch).square().sum()


def balanced(model, batch):
    """A mean over rows which is zero, as its gradient is: what the parts have cancels."""
    return model(batch).mean()


@pytest.mark.parametrize(
    ("loss", "cut"), [(contrastive, False), (summing, False), (balanced, True)]
)
def test_a_batch_is_cut_only_if_its_loss_is_the_mean_over_its_rows(loss, cut, networks):
    half = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    task = Task(nn.Linear(3, 2, bias=False), [torch.cat([half, -half])], loss)
    with networks.lent(task) as (objective, _):
        first, second = parts(objective, 2, rows)
        assert first.division.rows == ([4, 4] if cut else [8, 0])
        assert first.division.rows == second.division.rows
        told = first.shared_unevenly()
        assert told == [] if cut else "not the mean over its rows" in told[0]


def masked(model, batch):
    """A mean over the rows that count, of a task that does not say how many those are."""
    inputs, counted = batch
    return (model(inputs).square().mean(1) * counted).sum() / counted.sum()


def test_every_batch_that_ranks_share_must_be_a_mean_over_its_rows(networks):
    """Of the batches that three ranks would cut, only the smaller one has rows that count not."""
    source = torch.Generator().manual_seed(0)
    data = [(torch.randn(n, 3, generator=source), torch.ones(n)) for n in (20, 16, 12)]
    data[1][1][5:15] = 0
    with networks.lent(Task(nn.Linear(3, 2), data, masked)) as (objective, named):
        found = parts(objective, 3, lambda batch: float(len(batch[0])))
        assert found[0].division.rows == [20, 16, 12]
        gradient = sum(part.gradient(list(named.values())) for part in found)
        whole = objective.gradient(list(named.values()))
        assert float((gradient - whole).norm()) <= 1e-12 * float(whole.norm())
        assert sum(part.value() for part in found) == pytest.approx(objective.value(), rel=1e-12)


def weighted(model, batch):
    """A weighted mean, zero at the weights of the test, as its gradient is."""
    inputs, weights, wanted = batch
    return (weights * (model(inputs) - wanted).square().mean(1)).sum() / weights.sum()


def only_together(model, batch):
    if len(batch) < 8:
        raise ValueError("too few rows")
    return model(batch).square().mean()


def without_any(model, batch):
    """Of the second half of the rows none counts."""
    counted = (batch[:, 0] > 0).to(batch)
    return (model(batch).square().mean(1) * counted).sum() / counted.sum()


def infinite(model, batch):
    """Of the second half."""
    return model(batch).square().mean() + 1 / (batch[:, 0] > 0).sum()


def detached(model, batch):
    """1 for any rows, and its gradient that of the batch."""
    loss = model(batch).square().mean()
    return loss / loss.detach()


def at_zero(model, batch):
    """A sum, at the weights of the test alone."""
    mean = model(batch).square().mean() + 1
    return mean * len(batch) if not model.weight.any() else mean


@pytest.mark.parametrize(
    "loss", [weighted, only_together, without_any, infinite, detached, at_zero]
)
def test_a_batch_stays_whole_where_its_parts_differ_in_anything(loss, networks):
    """They fit perfectly whatever their weights, raise, are not finite, or differ here alone."""
    model = nn.Linear(3, 2)
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
    inputs[:, 0] = torch.arange(8.0) < 4
    wanted = torch.zeros(8, 2)
    batch = (inputs, torch.arange(1.0, 9.0), wanted) if loss is weighted else inputs
    with torch.no_grad():
        for parameter in model.parameters() if loss in (weighted, at_zero) else ():
            parameter.zero_()
    with networks.lent(Task(model, [batch], loss)) as (objective, _):
        first, _ = parts(objective, 2, lambda _: 1.0)
        assert first.division.rows == [8, 0]


def test_weights_are_where_they_were_once_a_batch_was_tested(networks):
    task = Task(nn.Linear(3, 2), [torch.randn(8, 3)], balanced)
    with networks.lent(task) as (objective, named):
        before = [(p.data_ptr(), p.detach().clone()) for p in named.values()]
        assert parts(objective, 2, rows)[0].division.cut == (0,)
        for (where, value), p in zip(before, named.values(), strict=True):
            assert p.data_ptr() == where
            assert torch.equal(p.data, value)


def test_batches_with_batch_statistics_stay_whole(networks):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    data = [torch.randn(6, 3)]
    task = Task(model, data, lambda m, b: m(b).square().mean(), mode="train")
    with networks.lent(task) as (objective, _):
        (first, _) = parts(objective, 2, rows)
        assert first.division.rows == [6, 0]
        assert "BatchNorm" in first.shared_unevenly()[0]
