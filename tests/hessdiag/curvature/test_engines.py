from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessdiag.curvature.engines import BUILD, Kept, Recompute, graph_bytes, make_engine
from hessdiag.errors import SelfCheckFailed, TaskError
from hessdiag.memory import free_memory


def wide(networks, batches):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 2)
    )
    data = [(torch.randn(400, 20), torch.randn(400, 2)) for _ in range(batches)]
    return networks.Task(model, data, networks.mse)


class Held:
    """Sums the storages that autograd saves while a graph is built, and lives as long."""

    def __init__(self, ignored):
        self.ignored = ignored
        self.storages = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.ignored:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("batches", [1, 4])
def test_the_estimate_is_what_kept_graphs_hold_within_a_factor_of_three(
    networks, curvature, batches
):
    with networks.lent(wide(networks, batches)) as (objective, named):
        parameters = list(named.values())
        data = [t for batch, _ in objective for t in batch]
        there = {t.untyped_storage().data_ptr() for t in (*parameters, *data)}
        with Held(there) as held:
            engine = make_engine(objective, parameters, curvature=curvature, engine="kept")
        needed = sum(held.storages.values())
        estimate = graph_bytes(objective, parameters, BUILD[curvature])
        del engine
    assert needed > batches * 400 * 50 * 8
    assert needed / 3 < estimate < 3 * needed


class Remembered(nn.Tanh):
    """Knows whether its last output, which autograd saves, is still in memory."""

    def forward(self, x):
        result = super().forward(x)
        self.last = weakref.ref(result)
        return result


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_the_estimate_keeps_nothing_in_memory(networks, curvature):
    tanh = Remembered()
    model = nn.Sequential(nn.Linear(3, 4), tanh, nn.Linear(4, 2))
    with networks.lent(networks.regression(model).task) as (objective, named):
        graph_bytes(objective, list(named.values()), BUILD[curvature])
        gc.collect()
        assert tanh.last() is None


@pytest.mark.parametrize(("budget", "kind"), [(0, Recompute), (1, Recompute), (2**40, Kept)])
def test_auto_recomputes_when_the_budget_is_small(networks, budget, kind):
    with networks.lent(networks.make("tanh").task) as (objective, named):
        engine = make_engine(
            objective, list(named.values()), curvature="hessian", memory_budget=budget
        )
    assert type(engine) is kind
    assert engine.name == {Kept: "kept", Recompute: "recompute"}[kind]


def test_auto_has_a_budget_of_its_own(networks):
    assert free_memory(torch.device("cpu")) > 2**20
    with networks.lent(networks.make("tanh").task) as (objective, named):
        engine = make_engine(objective, list(named.values()), curvature="hessian")
    assert engine.name == "kept"


@pytest.mark.parametrize("engine", ["kept", "recompute"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_product_is_linear_and_leaves_its_argument_alone(networks, engine, curvature):
    with networks.lent(networks.make("outputs").task) as (objective, named):
        product = make_engine(objective, list(named.values()), curvature=curvature, engine=engine)
        n = sum(p.numel() for p in named.values())
        u, v = torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        kept = u.clone()
        both = product(u + 2 * v)
        apart = product(u) + 2 * product(v)
        assert torch.equal(u, kept)
        assert not product(torch.zeros_like(u)).any()
        assert float((both - apart).norm()) < 1e-13 * float(both.norm())
        assert not both.requires_grad


def test_kept_graphs_survive_the_forward_of_another_engine(networks):
    with networks.lent(networks.make("batchnorm train").task) as (objective, named):
        parameters = list(named.values())
        kept = make_engine(objective, parameters, curvature="hessian", engine="kept")
        vector = torch.ones(sum(p.numel() for p in parameters), dtype=torch.float64)
        before = kept(vector)
        make_engine(objective, parameters[:1], curvature="ggn", engine="kept")
        objective.value()
        assert torch.equal(kept(vector), before)


class Fused(nn.Module):
    """Insists on an attention kernel whose backward torch cannot differentiate."""

    def __init__(self):
        super().__init__()
        self.query, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        query = self.query(x)[None, None]
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            mixed = nn.functional.scaled_dot_product_attention(query, query, query)
        return self.head(mixed[0, 0])


@pytest.mark.parametrize("engine", ["auto", "kept", "recompute"])
def test_an_operation_without_double_backward_is_named_with_the_remedy(networks, engine):
    with networks.lent(networks.regression(Fused()).task) as (objective, named):
        parameters = list(named.values())
        vector = torch.ones(sum(p.numel() for p in parameters), dtype=torch.float64)
        with pytest.raises(SelfCheckFailed, match="cannot be differentiated twice") as caught:
            make_engine(objective, parameters, curvature="hessian", engine=engine)(vector)
    assert "flash_attention" in str(caught.value)
    assert "Replace the operation" in str(caught.value)


def test_a_loss_that_raises_is_a_task_error_from_either_engine(networks):
    task = networks.Task(networks.mlp(), networks.pairs(3), lambda m, b: m(b[0]) @ b[1])
    with networks.lent(task) as (objective, named):
        for engine in ("auto", "kept", "recompute"):
            with pytest.raises(TaskError, match="the task's loss raised RuntimeError"):
                make_engine(objective, list(named.values()), curvature="hessian", engine=engine)(
                    torch.ones(39, dtype=torch.float64)
                )
