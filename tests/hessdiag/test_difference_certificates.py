"""Errors of differences reach every number, also where the measured noise shows nothing of them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from hessdiag import block_hessian
from hessdiag.blocks import WHOLE, find_blocks
from hessdiag.curvature.differenced import DifferencedMatrix
from hessdiag.curvature.engines import Difference
from hessdiag.network import Network, Row
from hessdiag.opened import Opened
from hessdiag.options import make_options
from hessdiag.run import VariantResult
from hessdiag.solve import Budget, solve_exact, solve_matrix_free
from hessdiag.solve.problem import noise_vector
from hessdiag.variants.coordinates import Diagonal
from hessdiag.variants.scene import Built
from tests.support import quadratics

SIZE, OFF = 6, 1e-6
SCALED = Row("whole scaled", (1, 1))
SCALE = torch.linspace(1, 3, SIZE, dtype=torch.float64)


def unseen():
    """A unit vector that no vector with which noise is measured has a part along."""
    like = SCALE
    measured = [noise_vector(like, seed=0, name=WHOLE, index=k) for k in (0, 1)]
    measured.append(SCALE * noise_vector(like, seed=0, name=SCALED.name, index=0))
    basis, _ = torch.linalg.qr(torch.stack(measured, dim=1))
    found = torch.ones(SIZE, dtype=torch.float64)
    found -= basis @ (basis.T @ found)
    return found / found.norm()


ROUND = 2 * torch.eye(SIZE, dtype=torch.float64)


def leaning():
    """A matrix of rank one with eigenvalue 2, half along what is not seen and half across it."""
    across = noise_vector(SCALE, seed=0, name=WHOLE, index=0)
    both = unseen() + across / across.norm()
    return torch.outer(both, both)


@contextmanager
def opened(networks, matrix, **options):
    """The block of ``½ pᵀAp``."""
    task = quadratics.quadratic_task(matrix)
    (chosen,) = find_blocks(task.model, (WHOLE,))
    with networks.lent(task) as (objective, _):
        asked = make_options(engine="difference", blocks=WHOLE, **options)
        network = Network(objective, asked, lambda _: None)
        yield Opened(network, chosen, Row(WHOLE, (1, 1)))


@pytest.fixture
def off(monkeypatch):
    """Assembled matrices and products are off by ``OFF`` along one direction, and say so."""
    along = unseen()
    wrong = OFF * torch.outer(along, along)
    told = 1.01 * wrong  # what the engine itself errs by comes on top
    assemble, differ = block_hessian.assemble_differences, Difference.differ

    def assembled(*arguments):
        found = assemble(*arguments)
        return DifferencedMatrix(found.matrix + wrong, told)

    def differed(engine, vector):
        found = differ(engine, vector)
        engine.last = replace(found, value=found.value + wrong @ vector, error=told @ vector)
        return engine.last

    def install(name):
        if name == "matrix":
            monkeypatch.setattr(block_hessian, "assemble_differences", assembled)
        else:
            monkeypatch.setattr(Difference, "differ", differed)

    return install


def test_intervals_hold_errors_of_the_matrix_that_its_noise_does_not_show(networks, off):
    off("matrix")
    with opened(networks, ROUND) as block:
        found, _ = block.solve()
    assert block.problem.noise.block < 1e-12
    for name, truth in {"lambda_max": 2.0, "trace": 2.0 * SIZE, "frobenius": 24**0.5}.items():
        assert found.values[name].low <= truth <= found.values[name].high
        assert found.values[name].high - found.values[name].low < 100 * OFF
    assert (found.rows["norm_low"] <= 2).all()
    assert (found.rows["norm_high"] >= 2).all()


def test_intervals_hold_such_errors_in_other_coordinates(networks, off):
    off("matrix")
    with opened(networks, ROUND) as block:
        raw, _ = block.solve()
        row = VariantResult(raw.values, raw.spectrum, raw.rows)
        found, _ = block.solve_in(Built(Diagonal(SCALE)), row, SCALED, decoupled=False)
    truth = 2 * SCALE.square()
    known = {"lambda_max": truth.max(), "lambda_min": truth.min(), "trace": truth.sum()}
    for name, value in known.items():
        assert found.values[name].low <= float(value) <= found.values[name].high
        assert found.values[name].high - found.values[name].low < 400 * OFF
    assert (found.rows["norm_low"] <= truth.numpy()).all()
    assert (found.rows["norm_high"] >= truth.numpy()).all()


def test_errors_that_only_later_products_show_widen_the_intervals(networks, off):
    off("products")
    matrix = leaning()
    with opened(networks, matrix, exact_limit=0, tolerance=1e-9) as block:
        found, _ = block.solve()
    assert block.problem.noise.block < 1e-12
    for name, truth in {"lambda_max": 2.0, "lambda_min": 0.0, "trace": 2.0}.items():
        assert found.values[name].low <= truth <= found.values[name].high
        assert found.values[name].high - found.values[name].low < 300 * OFF
    assert (found.rows["diagonal_low"] <= matrix.diagonal().numpy()).all()
    assert (found.rows["diagonal_high"] >= matrix.diagonal().numpy()).all()


def coarse(matrix, rows, noise):
    """A problem whose products err by ``noise`` times their vector, as differences do."""
    problem = quadratics.noiseless(matrix, rows=torch.tensor(rows, dtype=torch.float64))
    told = replace(problem.noise, error=lambda v: noise * v, block=noise, coarse=True)
    return replace(problem, noise=told)


@pytest.mark.parametrize("told", ["products", "entries"])
def test_an_eigenvalue_within_the_errors_of_differences_may_have_either_sign(told):
    off_diagonal = 1 - 1e-6  # eigenvalues 1e-6 and 2
    matrix = torch.tensor([[1, off_diagonal], [off_diagonal, 1]], dtype=torch.float64)
    problem = coarse(matrix, [1e-6, 1e-6], 1e-6)
    if told == "entries":
        entries = torch.full_like(matrix, 1e-6)
        problem = replace(coarse(matrix, [0.0, 0.0], 0.0), rounding=entries)
    found = solve_exact(matrix, problem).values
    assert found["ambiguous"]
    counts = {name: found[f"n_{name}"] for name in ("positive", "negative", "zero")}
    ranges = {name: (count.low, count.high) for name, count in counts.items()}
    assert ranges == {"positive": (1, 2), "negative": (0, 1), "zero": (0, 1)}


def test_a_row_that_is_zeroed_may_be_as_large_as_what_was_seen_of_it_and_its_error():
    matrix = torch.diag(torch.tensor([1, 1e-6], dtype=torch.float64))
    solved = solve_exact(matrix, coarse(matrix, [0.0, 1e-6], 1e-10))
    least = solved.values["lambda_min"]
    assert solved.values["inactive"] == 1
    assert least.low <= 0 < 2e-6 <= least.high
    assert solved.rows["norm_high"][1] >= 2e-6
    assert solved.values["n_positive"].high == 2


def test_truncation_of_one_sign_does_not_cancel_in_a_trace():
    """Wrong by 400 times the same, of which rounding would leave 20 times that."""
    size = 400
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[0, 0] = 2.0
    problem = coarse(matrix, [0.0] * size, 1.01 * OFF)
    problem = replace(problem, noise=replace(problem.noise, seen=torch.ones(size).double()))
    solved, _ = solve_matrix_free(lambda v: matrix @ v + OFF * v, problem, Budget())
    trace = solved.values["trace"]
    assert trace.low <= 2.0 <= trace.high
    assert trace.high - trace.low < 1000 * OFF
