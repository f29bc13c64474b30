from __future__ import annotations

import pytest
import torch
from torch import nn

from hessdiag.curvature.differenced import Watched, assemble_differences
from hessdiag.curvature.engines import Difference, make_engine
from tests.support import differences


def lent(networks, task):
    return networks.lent(task, torch.float64)


@pytest.fixture
def made(networks):
    """An engine of a small problem, and its dense Hessian."""

    def make(task):
        matrix, _ = differences.dense(task)
        with lent(networks, task) as (objective, named):
            return Difference(objective, list(named.values())), matrix

    return make


@pytest.mark.parametrize("index", range(8))
def test_a_product_is_right_to_1e_9_and_by_less_than_the_error_it_tells(made, index):
    engine, matrix = made(differences.task(index))
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    vectors = [*torch.eye(len(matrix), dtype=torch.float64), torch.randn(len(matrix)).double()]
    for vector in vectors:
        found = engine.differ(vector)
        wrong = float((found.value - matrix @ vector).norm())
        assert wrong <= 1e-9 * norm * float(vector.norm())
        assert wrong <= float(found.error.norm())
        assert float(found.error.norm()) <= 1e-7 * norm * float(vector.norm())


def test_a_product_scales_with_its_vector_and_has_its_sign(made):
    engine, matrix = made(differences.task(0))
    vector = torch.ones(len(matrix), dtype=torch.float64)
    one = engine(vector)
    assert torch.equal(engine(-vector), -one)
    assert torch.allclose(engine(1e6 * vector), 1e6 * one, rtol=1e-9)
    assert torch.allclose(engine(1e-6 * vector), 1e-6 * one, rtol=1e-9)


def test_zero_gives_zero_and_infinity_is_not_made_up(made):
    engine, matrix = made(differences.task(0))
    nothing = torch.zeros(len(matrix), dtype=torch.float64)
    assert not engine(nothing).any()
    assert not engine.error(nothing).any()
    assert torch.isnan(engine(nothing + torch.inf)).all()


def test_a_product_does_not_depend_on_those_before_it(made):
    engine, matrix = made(differences.task(3))
    rows = torch.eye(len(matrix), dtype=torch.float64)
    forwards = [engine(row) for row in rows]
    backwards = [engine(row) for row in rows.flip(0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_the_parameters_are_put_back_bit_for_bit(networks):
    task = differences.task(0)
    before = [p.detach().clone() for p in task.model.parameters()]
    with lent(networks, task) as (objective, named):
        Difference(objective, list(named.values()))(torch.ones(sum(p.numel() for p in before)))
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))


class Kinked(nn.Module):
    """½ Σ relu(p)² + ½ Σ p² at points on either side of zero, or on it."""

    def __init__(self, at):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(at, dtype=torch.float64))

    def forward(self):
        return 0.5 * self.p.relu().square().sum() + 0.5 * self.p.square().sum()


def engine_at(networks, at):
    task = networks.Task(Kinked(at), [torch.zeros(1, 1).double()], lambda m, _: m())
    with lent(networks, task) as (objective, named):
        return Difference(objective, list(named.values()))


def test_a_kink_on_the_way_is_told_in_the_error_or_avoided(networks):
    engine = engine_at(networks, [1.0, 1e-5])
    for step in (6e-6, 1.1e-5, 2e-5, 4e-5, 1e-4, 1e-3, 1e-2):
        found = engine._at(torch.tensor([0.0, 1.0], dtype=torch.float64), 1.0, step)
        assert abs(float(found.value[1]) - 2.0) <= float(found.error.norm())
    assert float(engine(torch.tensor([0.0, 1.0], dtype=torch.float64))[1]) == pytest.approx(2)


def test_a_kink_at_the_parameters_themselves_is_told(networks):
    found = engine_at(networks, [1.0, 0.0]).differ(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert float(found.error.norm()) >= 0.5


def test_a_curvature_below_the_gradients_last_place_has_an_error_above_it(networks):
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self):
            return (self.p + 1e-17 * self.p.square()).sum()

    task = networks.Task(Steep(), [torch.zeros(1, 1).double()], lambda m, _: m())
    with lent(networks, task) as (objective, named):
        error = Difference(objective, list(named.values())).error(torch.ones(1).double())
    assert float(error.abs()) > 2e-17


def test_the_assembled_matrix_is_within_its_errors_and_dead_rows_are_exact_zeros(networks):
    class WithDead(differences.Quartic):
        def __init__(self):
            super().__init__(1)
            self.dead = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self):
            return super().forward() + 0 * self.dead.sum()

    task = networks.Task(WithDead(), [torch.zeros(1, 1).double()], lambda m, _: m())
    matrix, _ = differences.dense(task)
    with lent(networks, task) as (objective, named):
        engine = Difference(objective, list(named.values()))
        found = assemble_differences(engine, engine, len(matrix))
    assert torch.equal(found.matrix, found.matrix.T)
    assert torch.equal(found.errors.abs(), found.errors.abs().T)
    assert float((found.matrix - matrix).norm()) <= float(found.errors.norm())
    assert float(found.errors.norm()) < 1e-8 * float(matrix.norm())
    dead = matrix.norm(dim=1) == 0
    assert dead.sum() == 2
    assert not found.errors[dead].any()


def test_an_asymmetric_product_counts_as_an_error(made):
    engine, matrix = made(differences.task(1))
    twist = torch.zeros_like(matrix)
    twist[0, 1] = 0.5
    found = assemble_differences(lambda v: engine(v) + twist @ v, engine, len(matrix))
    assert float(found.errors[0, 1].abs()) >= 0.49


def test_errors_are_seen_in_other_coordinates(made):
    engine, matrix = made(differences.task(0))
    stretch = torch.linspace(1, 100, len(matrix), dtype=torch.float64)
    watched = Watched(engine, lambda product: lambda z: stretch * product(stretch * z) + 3 * z)
    unit = torch.zeros(len(matrix), dtype=torch.float64)
    unit[-1] = 1.0
    found = watched(unit)
    assert torch.allclose(found, stretch * matrix[:, -1] * 100 + 3 * unit, rtol=1e-6, atol=1e-6)
    wanted = 100 * float((stretch * engine.error(unit)).norm())
    assert watched.block == pytest.approx(wanted, rel=1e-3)


def test_the_engine_is_made_by_its_name_and_needs_no_second_derivative(networks):
    task = differences.mlp(0, differences.OnceTanh())
    twin = differences.mlp(0, nn.Tanh())
    matrix, _ = differences.dense(twin)
    with lent(networks, task) as (objective, named):
        engine = make_engine(
            objective, list(named.values()), curvature="hessian", engine="difference"
        )
        assert engine.name == "difference"
        vector = torch.ones(len(matrix), dtype=torch.float64)
        assert torch.allclose(engine(vector), matrix @ vector, atol=1e-9)
