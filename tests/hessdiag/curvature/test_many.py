from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import fake_ranks
from hessdiag.curvature.engines import (
    BUILD,
    Kept,
    Linearized,
    Recompute,
    base,
    make_engine,
    rehearsal,
)
from hessdiag.curvature.engines.many import Wide
from hessdiag.curvature.objective import Objective


@pytest.fixture
def clock(monkeypatch):
    """Seconds per product by width, as the tests tell them."""
    seconds = {}
    latest = []

    def at_once(product, vectors, parameters):
        latest[:] = [len(vectors)]
        return run(product, vectors, parameters)

    def timed(work, device):
        latest[:] = [1]
        result = work()
        return result, latest[0] * seconds[latest[0]]

    run = rehearsal.at_once
    monkeypatch.setattr(rehearsal, "at_once", at_once)
    monkeypatch.setattr(rehearsal, "timed", timed)
    return seconds


QUICKER = {1: 1.0, 8: 0.5, 32: 0.3, 128: 0.2}


def columns(objective, parameters, **options):
    given = {"curvature": "hessian", "engine": "kept", "products": 10**6, "columns": True}
    return make_engine(objective, parameters, **(given | options))


def size(parameters):
    return sum(p.numel() for p in parameters)


def drawn(parameters, count):
    made = torch.Generator().manual_seed(1)
    return torch.randn(count, size(parameters), generator=made, dtype=torch.float64)


def widths(engine):
    return {getattr(product, "width", 1) for product, _ in engine.products}


def test_the_columns_at_once_are_those_of_the_dense_hessian(case, networks, clock):
    clock |= QUICKER
    with networks.lent(case.task) as (objective, named):
        parameters = list(named.values())
        engine = columns(objective, parameters)
        found = engine.many(torch.eye(size(parameters), dtype=torch.float64))
        once = engine(torch.ones(size(parameters), dtype=torch.float64))
    truth = networks.dense_hessian(case)
    scale = max(float(truth.norm()), 1e-3)
    assert float((found - truth).norm()) <= 1e-13 * scale
    assert float((once - truth.sum(dim=1)).norm()) <= 1e-12 * scale
    assert not found.requires_grad


@pytest.mark.parametrize("name", ["tanh", "batchnorm train", "tied transformer", "outputs"])
def test_gauss_newton_columns_at_once_are_those_of_the_dense_matrix(name, networks, clock):
    clock |= QUICKER
    case = networks.make(name)
    with networks.lent(case.task) as (objective, named):
        parameters = list(named.values())
        engine = columns(objective, parameters, curvature="ggn")
        assert widths(engine) == {128}
        found = engine.many(torch.eye(size(parameters), dtype=torch.float64))
    truth = networks.dense_ggn(case)
    assert float((found - truth).norm()) <= 1e-13 * float(truth.norm())


@pytest.mark.parametrize("engine", ["kept", "linearized", "recompute"])
def test_every_engine_takes_many_vectors(networks, engine):
    case = networks.make("tanh")
    with networks.lent(case.task) as (objective, named):
        parameters = list(named.values())
        made = make_engine(objective, parameters, curvature="hessian", engine=engine)
        found = made.many(torch.eye(size(parameters), dtype=torch.float64))
    truth = networks.dense_hessian(case)
    assert float((found - truth).norm()) <= 1e-13 * float(truth.norm())


@pytest.mark.parametrize(
    ("seconds", "width", "tried"),
    [
        (QUICKER, 128, {1, 8, 32, 128}),
        ({1: 1.0, 8: 0.5, 32: 0.3, 128: 0.4}, 32, {1, 8, 32, 128}),
        ({1: 1.0, 8: 0.5, 32: 0.5, 128: 0.1}, 8, {1, 8, 32}),
        ({1: 1.0, 8: 1.1, 32: 0.1, 128: 0.1}, 1, {1, 8}),
    ],
)
def test_the_quickest_width_is_taken_and_what_was_measured_is_told(
    networks, clock, seconds, width, tried
):
    clock |= seconds
    with networks.lent(networks.make("tanh").task) as (objective, named):
        engine = columns(objective, list(named.values()))
    assert widths(engine) == {width}
    names = {1: "kept"} | {k: f"kept, {k} at once" for k in (8, 32, 128)}
    assert engine.tried == {names[k]: 2 * seconds[k] for k in tried}  # of both batches


@pytest.mark.parametrize(("count", "width"), [(63, 1), (64, 8), (255, 8), (256, 32), (1024, 128)])
def test_a_width_is_tried_where_enough_vectors_are_to_come(networks, clock, count, width):
    clock |= QUICKER
    with networks.lent(networks.make("tanh").task) as (objective, named):
        engine = columns(objective, list(named.values()), products=count)
        without = columns(objective, list(named.values()), products=count, columns=False)
    assert widths(engine) == {width}
    assert (widths(without), without.tried) == ({1}, {})


def test_the_graphs_of_vectors_at_once_fit_the_budget(networks, clock):
    clock |= QUICKER
    with networks.lent(networks.make("tanh").task) as (objective, named):
        parameters = list(named.values())
        full = columns(objective, parameters, memory_budget=2**40)
        for width, graphs in ((1, 7), (8, 8), (8, 31), (32, 32)):
            budget = full.held + graphs * full.largest
            assert widths(columns(objective, parameters, memory_budget=budget)) == {width}


class Doubled(torch.autograd.Function):
    """Right for one vector; its slope must not be vectorised."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, slope):
        if torch._C._functorch.is_batchedtensor(slope):
            raise RuntimeError("one vector at a time")
        return 2 * slope


class Fooled(Doubled):
    """Wrong where it is vectorised."""

    @staticmethod
    def backward(ctx, slope):
        batched = torch._C._functorch.is_batchedtensor(slope)
        return slope * (2.0 + 1e-6 if batched else 2.0)


@pytest.mark.parametrize("function", [Doubled, Fooled])
def test_what_cannot_be_vectorised_or_comes_out_wrong_is_computed_one_by_one(
    networks, clock, function
):
    clock |= QUICKER

    class Through(nn.Module):
        def forward(self, x):
            return function.apply(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Through(), nn.Linear(4, 2))
    with networks.lent(networks.regression(model).task) as (objective, named):
        parameters = list(named.values())
        engine = columns(objective, parameters)
        assert widths(engine) == {1}
        vectors = drawn(parameters, 3)
        found = engine.many(vectors)
        for vector, product in zip(vectors, found, strict=True):
            assert torch.equal(product, engine(vector))


def test_auto_compares_recording_with_vectors_at_once(networks, clock, monkeypatch):
    clock |= {1: 1e9, 8: 1e-9, 32: 1e-9}
    with networks.lent(networks.make("tanh").task) as (objective, named):
        parameters = list(named.values())
        assert type(columns(objective, parameters, engine="auto")) is Kept
        clock |= {8: 1e9}
        slow = columns(objective, parameters, engine="auto")
        assert type(slow) in (Kept, Linearized)
        assert {"kept", "kept, 8 at once", "linearized, reverse"} <= slow.tried.keys()


def test_memory_that_runs_out_leaves_one_at_a_time(networks):
    with networks.lent(networks.make("tanh").task) as (objective, named):
        parameters = list(named.values())
        engine = make_engine(objective, parameters, curvature="hessian", engine="kept")
        vectors = drawn(parameters, 5)
        wanted = torch.stack([engine(vector) for vector in vectors])
        product, share = engine.products[0]

        def scarce(pieces):
            if torch._C._functorch.is_batchedtensor(pieces[0]):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return product(pieces)

        engine.products[0] = (Wide(scarce, 4), share)
        torch.testing.assert_close(engine.many(vectors), wanted, rtol=1e-13, atol=1e-14)
        assert engine.products[0][0].width == 1


def test_a_chunk_takes_a_second_and_is_the_least_that_a_rank_allows(networks, monkeypatch):
    with networks.lent(networks.make("tanh").task) as (objective, named):
        parameters = list(named.values())
        engine = make_engine(objective, parameters, curvature="hessian", engine="recompute")
        for seconds, count, chunk in ((0.1, 50, 10), (0.1, 4, 4), (3.0, 50, 1), (1e-6, 500, 128)):
            monkeypatch.setattr(base, "timed", lambda work, device, s=seconds: (work(), s))
            assert engine.chunk(count) == chunk


def test_ranks_take_the_same_number_of_vectors_and_sum_their_products_at_once(
    networks, monkeypatch
):
    case = networks.make("tanh")
    rank = threading.local()
    slower = (0.1, 0.2)
    monkeypatch.setattr(base, "timed", lambda work, device: (work(), slower[rank.number]))
    with networks.lent(case.task) as (objective, _):

        def program(group):
            rank.number = group.rank
            model = copy.deepcopy(objective.model)  # each thread its own requires_grad
            own = Objective(model, objective.loss, objective.batches, group)
            engine = Recompute(own, list(model.parameters()), BUILD["hessian"])
            chunk = engine.chunk(100)
            units = torch.eye(size(engine.parameters), dtype=torch.float64)[:chunk]
            group.transport.added.clear()
            return chunk, engine.many(units), group.transport.added

        outcomes = fake_ranks.together(2, program)
    truth = networks.dense_hessian(case)
    for chunk, found, added in outcomes:
        assert chunk == 5
        assert float((found - truth[:5]).norm()) <= 1e-13 * float(truth.norm())
        assert len(added) == 1  # one frame holds all of these numbers
