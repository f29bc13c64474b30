from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hessdiag.curvature.engines import BUILD, Linearized, Recompute, cuda, make_engine, trial
from hessdiag.curvature.engines.cuda import CannotCapture, Captured, capture_all, captured
from hessdiag.curvature.engines.many import at_once
from hessdiag.curvature.objective import Objective, flatten, only, unflatten


class Fake:
    """A graph as CUDA makes it: it reads and writes the tensors that it was captured with."""

    def __init__(self, work, device):
        self.work = work
        self.outputs = [part.clone() for part in work()]
        self.replayed = 0

    def replay(self):
        self.replayed += 1
        for output, part in zip(self.outputs, self.work(), strict=True):
            output.copy_(part)


class Stuck(Fake):
    """Gives the product of its capture for ever."""

    def replay(self):
        pass


class Late(Fake):
    """Right once."""

    def replay(self):
        if not self.replayed:
            super().replay()
        else:
            for output in self.outputs:
                output.mul_(2)
        self.replayed += 1


def faked(kind):
    def capture(work, device):
        graph = kind(work, device)
        return graph, graph.outputs

    return capture


def refused(work, device):
    raise RuntimeError("operation not permitted when stream is capturing")


def drawn(parameters, seed):
    made = torch.Generator().manual_seed(seed)
    n = sum(p.numel() for p in parameters)
    return torch.randn(n, generator=made, dtype=torch.float64)


@pytest.fixture
def tape(networks):
    """The linearized engine of a small network, its parameters and the dense Hessian."""
    truth = networks.dense_hessian(networks.make("tanh"))
    with networks.lent(networks.make("tanh").task) as (objective, named):
        parameters = list(named.values())
        engine = make_engine(objective, parameters, curvature="hessian", engine="linearized")
        yield engine, parameters, truth


def test_a_graph_reads_each_new_vector_and_leaves_it_alone(tape):
    engine, parameters, truth = tape
    made = []
    for product, share in engine.products:
        graph = captured(product, unflatten(drawn(parameters, 0), parameters), capture=faked(Fake))
        assert graph.route == product.route
        made.append((graph, share))
    engine.products = made
    for seed in (1, 2):
        vector = drawn(parameters, seed)
        before = vector.clone()
        found = engine(vector)
        assert float((found - truth @ vector).norm()) <= 1e-13 * float(truth.norm())
        assert torch.equal(vector, before)
    block = torch.stack([drawn(parameters, seed) for seed in (3, 4, 5)])
    found = engine.many(block)
    assert float((found - block @ truth).norm()) <= 1e-13 * float(truth.norm())


@pytest.mark.parametrize("capture", [faked(Stuck), faked(Late), refused])
def test_a_graph_that_cannot_be_made_or_is_wrong_is_refused_and_the_tape_left(tape, capture):
    engine, parameters, truth = tape
    pieces = unflatten(drawn(parameters, 0), parameters)
    product, _ = engine.products[0]
    with pytest.raises(CannotCapture):
        captured(product, pieces, capture=capture)
    vector = drawn(parameters, 1)
    assert float((engine(vector) - truth @ vector).norm()) <= 1e-13 * float(truth.norm())


def test_batches_that_cannot_be_captured_keep_their_tapes(tape, monkeypatch):
    engine, parameters, truth = tape
    captures = iter([faked(Fake), refused])
    monkeypatch.setattr(
        cuda, "captured", lambda p, pieces: captured(p, pieces, capture=next(captures))
    )
    capture_all(engine, unflatten(drawn(parameters, 0), parameters))
    assert [type(p) is Captured for p, _ in engine.products] == [True, False]
    assert engine.record == "linearized, 1 as CUDA graphs"
    vector = drawn(parameters, 1)
    assert float((engine(vector) - truth @ vector).norm()) <= 1e-13 * float(truth.norm())


def test_nothing_is_captured_on_the_cpu(networks, monkeypatch):
    monkeypatch.setattr(trial, "captured", lambda *_: pytest.fail("captured on the CPU"))
    with networks.lent(networks.make("tanh").task) as (objective, named):
        engine = make_engine(objective, list(named.values()), curvature="hessian", products=10**6)
    assert not any("CUDA" in name for name in engine.tried)


@pytest.mark.parametrize(
    ("times", "kind", "graphs"),
    [
        ({"kept": 1.0, "tape": 1.5, "graph": 0.1}, Linearized, 2),
        ({"kept": 1.0, "tape": 0.5, "graph": 0.6}, Linearized, 0),
        ({"kept": 1.0, "tape": 0.97, "graph": 0.96}, trial.Kept, 0),
    ],
)
def test_the_graph_is_one_more_candidate(networks, monkeypatch, times, kind, graphs):
    with networks.lent(networks.make("tanh").task) as (objective, named):
        parameters = list(named.values())
        kept = make_engine(objective, parameters, curvature="hessian", engine="kept")
        tries = trial._Trial(kept, 10**6, None)
        with only(parameters):
            tries.begin()
            tries.attempt("reverse")
        make = lambda p, pieces: captured(p, pieces, capture=faked(Fake))  # noqa: E731
        monkeypatch.setattr(trial, "captured", make)
        monkeypatch.setattr(cuda, "captured", make)
        tries.capture()
        name = "linearized, reverse"
        assert tries.seconds.keys() == {"kept", name, f"{name}, CUDA graph"}
        tries.usual = times["kept"]
        tries.seconds = {name: times["tape"], f"{name}, CUDA graph": times["graph"]}
        with only(parameters):
            engine = tries.winner()
        assert type(engine) is kind
        assert sum(type(p) is Captured for p, _ in engine.products) == graphs
        vector = drawn(parameters, 1)
        wanted = Recompute(objective, parameters, BUILD["hessian"])(vector)
        torch.testing.assert_close(engine(vector), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_captured_product_is_the_tapes_on_the_device(networks, dtype, curvature):
    case = networks.make("tanh")
    with networks.lent(case.task, dtype=dtype) as (objective, _):
        model = objective.model.cuda()
        try:
            parameters = list(model.parameters())
            items = [tuple(t.cuda() for t in batch) for batch in objective.batches.items]
            batches = replace(objective.batches, items=tuple(items))
            there = Objective(model, objective.loss, batches)
            engine = make_engine(there, parameters, curvature=curvature, engine="linearized")
            vector = drawn(parameters, 1).to("cuda", dtype)
            wanted = engine(vector)
            capture_all(engine, unflatten(drawn(parameters, 0).to("cuda", dtype), parameters))
            assert engine.graphs == 2
            for _ in range(2):
                torch.testing.assert_close(engine(vector), wanted)
        finally:
            model.cpu()


@pytest.mark.gpu
def test_a_kept_graph_takes_several_vectors_at_once_on_the_device():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(
        "cuda", torch.float64
    )
    x = torch.randn(7, 3, device="cuda", dtype=torch.float64)
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(model(x).square().mean(), parameters, create_graph=True)

    def product(pieces):
        return torch.autograd.grad(gradient, parameters, pieces, retain_graph=True)

    n = sum(p.numel() for p in parameters)
    eye = torch.eye(n, device="cuda", dtype=torch.float64)
    found = at_once(product, eye, parameters)
    wanted = torch.stack([flatten(product(unflatten(unit, parameters))) for unit in eye])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
