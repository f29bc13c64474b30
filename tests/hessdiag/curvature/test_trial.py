from __future__ import annotations

import pytest
import torch

from hessdiag.curvature.engines import BUILD, Kept, Linearized, Recompute, make_engine, trial
from hessdiag.curvature.engines.kept import graph_sizes


@pytest.fixture
def clock(monkeypatch):
    """Time as the tests tell it: what each candidate takes for the batch."""
    seconds = {}

    def timed(self, work):
        result = work()
        kind = type(result).__name__
        name = getattr(result, "route", None)
        if kind == "Reference":
            taken = seconds["kept"]
        elif name is not None:
            self.latest = name
            taken = seconds.get(f"record {name}", seconds["kept"])
        else:
            taken = seconds[self.latest]
        self.spent += taken
        return result, taken

    monkeypatch.setattr(trial._Trial, "_timed", timed)
    monkeypatch.setattr(trial, "COMPILING", 0.0)
    return seconds


def auto(objective, parameters, **options):
    return make_engine(objective, parameters, curvature="hessian", **options)


@pytest.mark.parametrize(
    ("times", "fastest"),
    [
        ({"kept": 1.0, "reverse": 0.9, "forward": 0.7}, "forward"),
        ({"kept": 1.0, "reverse": 0.6, "forward": 0.7}, "reverse"),
        ({"kept": 1.0, "reverse": 1.1, "forward": 0.97}, "kept"),
    ],
)
def test_auto_keeps_the_fastest_and_tells_what_was_measured(networks, clock, times, fastest):
    clock |= times
    with networks.lent(networks.make("tanh").task) as (objective, named):
        parameters = list(named.values())
        engine = auto(objective, parameters, products=10**6)
        vector = torch.ones(sum(p.numel() for p in parameters), dtype=torch.float64)
        wanted = Recompute(objective, parameters, BUILD["hessian"])(vector)
        torch.testing.assert_close(engine(vector), wanted, rtol=1e-12, atol=1e-13)
    routes = {getattr(product, "route", "kept") for product, _ in engine.products}
    assert routes == {fastest}
    assert engine.name == ("kept" if fastest == "kept" else "linearized")
    names = ("kept", "linearized, reverse", "linearized, forward")
    assert engine.tried == {  # of both batches
        name: 2 * times[name.split(", ")[-1]] for name in names
    }


@pytest.mark.parametrize("products", [0, 20, 49])
def test_nothing_is_tried_for_a_few_products(networks, clock, products):
    with networks.lent(networks.make("tanh").task) as (objective, named):
        engine = auto(objective, list(named.values()), products=products)
    assert type(engine) is Kept
    assert engine.tried == {}


def test_forward_mode_is_not_tried_where_compiling_its_formulas_would_cost_too_much(
    networks, clock, monkeypatch
):
    clock |= {"kept": 0.001, "reverse": 0.001, "forward": 0.0001}
    monkeypatch.setattr(trial, "COMPILING", 1.5)
    monkeypatch.setattr(trial, "FORMULAS", "not imported yet")
    with networks.lent(networks.make("tanh").task) as (objective, named):
        few = auto(objective, list(named.values()), products=1000)
        many = auto(objective, list(named.values()), products=100000)
    assert "linearized, forward" not in few.tried
    assert "linearized, forward" in many.tried


def test_trying_costs_at_most_a_tenth_of_the_products(networks, clock, monkeypatch):
    spent = []
    winner = trial._Trial.winner

    def watched(self):
        spent.append(self.spent)
        return winner(self)

    monkeypatch.setattr(trial._Trial, "winner", watched)
    clock |= {"kept": 1.0, "reverse": 1.0, "forward": 1.0, "record reverse": 3.0}
    clock["record forward"] = 9.0
    with networks.lent(networks.make("tanh").task) as (objective, named):
        for products in (60, 100, 200, 1000):
            spent.clear()
            auto(objective, list(named.values()), products=products)
            assert sum(spent) <= 0.1 * products * 2


def test_where_forward_mode_raises_the_other_candidates_are_left(networks, clock):
    clock |= {"kept": 1.0, "reverse": 0.5, "forward": 0.1}
    with networks.lent(networks.make("lstm").task) as (objective, named):
        engine = auto(objective, list(named.values()), products=10**6)
    assert {product.route for product, _ in engine.products} == {"reverse"}
    assert set(engine.tried) == {"kept", "linearized, reverse"}


def test_recording_that_does_not_fit_the_budget_is_not_tried(networks, clock):
    clock |= {"kept": 1.0, "reverse": 0.5, "forward": 0.1}
    with networks.lent(networks.make("tanh").task) as (objective, named):
        parameters = list(named.values())
        sizes = graph_sizes(objective, parameters, BUILD["hessian"], objective.batches.items)
        tight = auto(objective, parameters, products=10**6, memory_budget=sum(sizes))
        wide = auto(objective, parameters, products=10**6, memory_budget=10 * sum(sizes))
    assert type(tight) is Kept
    assert type(wide) is Linearized


def batches(networks, *rows):
    torch.manual_seed(0)
    data = [(torch.randn(n, 3), torch.randn(n, 2)) for n in rows]
    return networks.Task(networks.mlp(), data, networks.mse)


@pytest.mark.parametrize("engine", ["kept", "linearized"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_as_many_batches_are_kept_as_the_budget_holds(networks, engine, curvature):
    rows = [40, 40, 40, 40, 40, 40, 40, 17]
    build = BUILD[curvature]
    with networks.lent(batches(networks, *rows)) as (objective, named):
        parameters = list(named.values())
        sizes = graph_sizes(objective, parameters, build, objective.batches.items)
        assert len(set(sizes[:-1])) == 1
        assert sizes[-1] < sizes[0]
        vector = torch.ones(sum(p.numel() for p in parameters), dtype=torch.float64)
        wanted = Recompute(objective, parameters, build)(vector)
        # Of a batch, in graphs: what is kept, and what is in memory while that is made.
        each, spare = (1, 1) if engine == "kept" else (2, 4)
        for kept in (0, 1, 3):
            budget = (each * kept + spare) * sizes[0]
            chosen = make_engine(
                objective, parameters, curvature=curvature, engine=engine, memory_budget=budget
            )
            assert chosen.record == f"{engine} {kept} of 8 batches"
            torch.testing.assert_close(chosen(vector), wanted, rtol=1e-13, atol=1e-14)
        full = make_engine(objective, parameters, curvature=curvature, engine=engine)
        assert full.record == engine
        torch.testing.assert_close(full(vector), wanted, rtol=1e-13, atol=1e-14)


def test_a_forced_engine_is_never_tried_against_others(networks, clock):
    with networks.lent(networks.make("tanh").task) as (objective, named):
        for name in ("kept", "linearized", "recompute"):
            engine = auto(objective, list(named.values()), engine=name, products=10**6)
            assert (engine.name, engine.tried) == (name, {})
