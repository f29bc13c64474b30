import numpy as np
import pytest
import torch

from hessdiag.conditioning.diagonal import diagonal_floor, diagonal_gap
from hessdiag.quantity import Quantity
from hessian_scenes import equal_squares, scaled, two_cyclic

ROUNDING = 1e-15


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("cosine", [0.0, 0.5, -0.9, 0.999999])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e50])
def test_two_rows_cannot_go_below_the_inverse_of_one_minus_their_cosine(cosine, scale):
    unit = double([[1, cosine], [cosine, 1]])
    floor = diagonal_floor(scaled(unit, double([1, scale])), ROUNDING)
    assert floor == pytest.approx(1 / (1 - abs(cosine)), rel=1e-7)
    assert 1 <= floor <= 1 / (1 - abs(cosine))


def test_the_largest_eigenvalue_of_the_unit_diagonal_is_a_floor_too():
    equal = 0.4 * torch.ones(3, 3) + 0.6 * torch.eye(3)
    floor = diagonal_floor(equal.double(), ROUNDING)
    assert floor == pytest.approx(1.8, rel=1e-6)
    assert floor <= 1.8 * (1 + 1e-7)


@pytest.mark.parametrize("decades", [0, 4, 12])
def test_the_floor_lies_below_the_known_optimum_and_ignores_the_scaling(decades):
    d = torch.logspace(-decades, decades, 4, dtype=torch.float64)
    floor = diagonal_floor(scaled(equal_squares(), d), ROUNDING)
    assert 10 < floor < 100
    assert floor == pytest.approx(diagonal_floor(equal_squares(), ROUNDING), rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_is_never_less_than_what_a_random_diagonal_gains(seed):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((6, 7))
    matrix = factor @ factor.T
    floor = diagonal_floor(torch.from_numpy(matrix), ROUNDING)
    value = np.linalg.eigvalsh(matrix)
    kappa = value[-1] / value[0]
    gap = diagonal_gap(Quantity.exact(kappa), floor)
    for d in 10 ** rng.uniform(-1, 1, (200, 6)):
        other = np.linalg.eigvalsh(matrix * d[:, None] * d)
        assert kappa / (other[-1] / other[0]) <= gap.high * (1 + 1e-12)


def test_unit_diagonal_is_within_its_largest_eigenvalue_and_the_root_of_its_kappa():
    unit = two_cyclic(torch.linspace(0.1, 0.99, 5, dtype=torch.float64))
    gap = diagonal_gap(Quantity.exact(1.99 / 0.01), diagonal_floor(unit, ROUNDING))
    assert gap.high == pytest.approx(1.99, rel=1e-9)  # l_max of the unit diagonal
    assert gap.high <= np.sqrt(199)


def test_the_gap_is_an_upper_bound_from_the_upper_end_of_kappa():
    gap = diagonal_gap(Quantity.exact(20.0, 19.0, 30.0), 10.0)
    assert (gap.status, gap.low, gap.confidence) == ("upper-bound", None, 1.0)
    assert gap.value == gap.high
    assert 3.0 <= gap.high < 3.0 * (1 + 1e-14)


def test_a_sharper_bound_is_taken_and_a_blunter_one_is_not():
    kappa = Quantity.exact(20.0)
    assert diagonal_gap(kappa, 10.0, bound=16.0).high == pytest.approx(1.25)
    assert diagonal_gap(kappa, 10.0, bound=5.0).high == pytest.approx(2.0)


def test_the_gap_is_at_least_one():
    assert diagonal_gap(Quantity.exact(20.0), 20.0, bound=20.1).high == 1.0


def test_without_a_floor_or_a_kappa_there_is_no_gap():
    assert diagonal_gap(Quantity.exact(20.0), None) == Quantity.absent()
    assert diagonal_gap(Quantity.absent(), 10.0) == Quantity.absent()
    assert diagonal_gap(Quantity.zero(), 10.0) == Quantity.absent()
    assert diagonal_gap(Quantity.lower_bound(20.0), 10.0) == Quantity.unresolved()
    assert diagonal_gap(Quantity.unresolved(), 10.0) == Quantity.unresolved()


def test_zero_rows_are_left_out():
    padded = torch.zeros(6, 6, dtype=torch.float64)
    live = torch.tensor([0, 2, 3, 5])
    padded[live[:, None], live] = equal_squares()
    assert diagonal_floor(padded, ROUNDING) == diagonal_floor(equal_squares(), ROUNDING)


def test_only_positive_definite_matrices_have_a_floor():
    assert diagonal_floor(torch.zeros(2, 2).double(), ROUNDING) is None
    assert diagonal_floor(double([[1, 2], [2, 1]]), ROUNDING) is None
    assert diagonal_floor(double([[1, 1], [1, 1]]), ROUNDING) is None
    assert diagonal_floor(double([[-1, 0], [0, -1]]), ROUNDING) is None
    assert diagonal_floor(double([[0, 1], [1, 1]]), ROUNDING) is None


def test_errors_of_the_entries_lower_the_floor():
    near = double([[1, 0.9], [0.9, 1]])
    floor = diagonal_floor(near, 1e-3)  # the cosine may be 0.899, so 1 / 0.101
    assert floor <= 1 / 0.101
    assert floor > 9
