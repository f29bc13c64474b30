import numpy as np
import pytest
import torch

from hessdiag_probes.optimal_diagonal import dual_bound, optimal_diagonal
from hessian_scenes import equal_squares, scaled, two_cyclic

EPS = np.finfo(float).eps


def kappa(matrix):
    value = np.linalg.eigvalsh(np.asarray(matrix))
    return value[-1] / value[0]


def random_scales(n, count, width, seed=0):
    return np.exp(width * np.random.default_rng(seed).standard_normal((count, n)))


def wide(n, decades, seed=1):
    return torch.from_numpy(random_scales(n, 1, 1.0, seed)[0]) * torch.logspace(
        -decades, decades, n, dtype=torch.float64
    )


@pytest.mark.parametrize(("a", "b", "c"), [(1, 0.5, 1), (1e6, 30, 1), (1e-12, -9e-7, 1)])
def test_two_rows_have_the_closed_form(a, b, c):
    found = optimal_diagonal(torch.tensor([[a, b], [b, c]], dtype=torch.float64))
    cosine = abs(b) / np.sqrt(a * c)
    truth = (1 + cosine) / (1 - cosine)
    assert found.kappa == pytest.approx(truth, rel=1e-11)
    assert found.bound <= truth * (1 + 4 * EPS)
    assert found.gap < 1.001


def test_a_diagonal_matrix_can_be_made_perfect():
    found = optimal_diagonal(torch.diag(torch.logspace(-12, 12, 9, dtype=torch.float64)))
    assert 1 <= found.kappa < 1 + 1e-12
    assert found.bound == pytest.approx(1, abs=1e-12)
    assert optimal_diagonal(torch.tensor([[3.0]])).kappa == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("decades", [0, 8])
def test_two_cyclic_matrices_are_best_with_unit_diagonal(decades):
    sigma = torch.linspace(0.1, 0.999, 6, dtype=torch.float64)
    d = wide(12, decades)
    found = optimal_diagonal(scaled(two_cyclic(sigma), d))
    truth = 1.999 / 0.001
    assert found.bound <= truth * (1 + 1e-10)
    assert found.kappa >= truth * (1 - 1e-10)
    assert found.gap < 1 + 1e-9
    assert float((found.scale * d).std() / (found.scale * d).mean()) < 1e-12


@pytest.mark.parametrize("decades", [0, 3, 12])
def test_the_optimum_is_found_where_it_is_not_the_unit_diagonal(decades):
    matrix = scaled(equal_squares(), wide(4, decades))
    found = optimal_diagonal(matrix)
    assert 100 * (1 - 1e-9) <= found.kappa <= 100 * 1.001
    assert 100 / 1.001 <= found.bound <= 100 * (1 + 1e-12)
    assert kappa(scaled(matrix, found.scale)) == pytest.approx(found.kappa, rel=1e-9)
    assert kappa(scaled(matrix, matrix.diagonal().rsqrt())) > 101


def test_a_better_start_is_taken():
    matrix = equal_squares()
    found = optimal_diagonal(matrix, [torch.ones(4)], goal=1 + 1e-9)
    assert found.kappa == pytest.approx(100, rel=1e-12)
    assert found.scale.std() / found.scale.mean() < 1e-12


def test_the_best_start_is_kept_where_nothing_is_left_to_gain():
    matrix = equal_squares()
    bad = torch.tensor([1.0, 1, 1, 50])
    found = optimal_diagonal(matrix, [torch.ones(4), bad], goal=1e9)
    assert found.kappa == pytest.approx(100, rel=1e-12)
    untouched = optimal_diagonal(matrix, [bad], goal=1e9)
    assert torch.allclose(untouched.scale, matrix.diagonal().rsqrt(), rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_no_random_diagonal_goes_below_the_bound(seed):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((8, 10)) + 0.5
    d = 10 ** rng.uniform(-4, 4, 8)
    matrix = (factor @ factor.T) * d[:, None] * d
    found = optimal_diagonal(torch.from_numpy(matrix))
    assert 1 <= found.gap < 1.01
    for width in (1e-3, 1e-2, 0.1, 1.0):
        for draw in random_scales(8, 250, width, seed):
            best = found.scale.numpy() * draw
            assert kappa(matrix * best[:, None] * best) >= found.bound


@pytest.mark.parametrize("low", [1e-6, 1e-8, 1e-10])
def test_the_bound_holds_where_float64_has_few_digits_left(low):
    found = optimal_diagonal(equal_squares(low), entry_error=2 * EPS)
    truth = 100 / low
    assert found.bound <= truth
    assert found.bound > truth / 4
    assert found.kappa >= truth * (1 - 1e-12)


def test_errors_of_the_entries_widen_the_certificate():
    low = torch.tensor([1, -1, 1, -1]).double() / 2
    worse = equal_squares() - 0.05 * torch.outer(low, low)  # as if λ_min were 0.95
    relative = 0.0125 / float(worse.diagonal().min())
    assert optimal_diagonal(worse).bound > 105
    assert optimal_diagonal(worse, entry_error=relative).bound <= 100
    found = optimal_diagonal(equal_squares(), entry_error=relative)
    assert found.kappa >= kappa(scaled(worse, found.scale)) > 105


@pytest.mark.parametrize("seed", range(20))
def test_any_vectors_and_weights_give_a_true_bound(seed):
    rng = np.random.default_rng(seed)
    matrix = equal_squares().numpy()
    vector = np.linalg.eigh(matrix)[1] + 10.0 ** rng.uniform(-6, 0) * rng.standard_normal((4, 4))
    high, low = rng.random((2, 4)) ** rng.uniform(0, 20)
    assert 1 <= dual_bound(matrix, vector, high, low, 0.0) <= 100 * (1 + 1e-14)


def test_the_bound_is_sharp_at_the_optimum_and_survives_a_small_turn():
    matrix = equal_squares().numpy()
    vector = np.linalg.eigh(matrix)[1]
    first, last = np.eye(4)[[0, 3]]
    assert dual_bound(matrix, vector, last, first, 0.0) == pytest.approx(100, rel=1e-11)
    turn = np.eye(4)
    turn[2:, 2:] = [[np.cos(1e-3), np.sin(1e-3)], [-np.sin(1e-3), np.cos(1e-3)]]
    # The diagonals now differ by 1e-3: the large side is scaled, which costs as little.
    assert 99 < dual_bound(matrix, vector @ turn, last, first, 0.0) < 100


def test_the_bound_is_no_less_than_those_of_the_unit_diagonal():
    equal = np.full((3, 3), 0.4) + 0.6 * np.eye(3)  # 0.6, 0.6, 1.8: 1.8 and 1/0.6 bound κ
    skew = np.array([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]])
    for matrix, truth in ((equal, 1.8), (skew, 10.0)):
        vector = np.linalg.eigh(matrix)[1]
        first, last = np.eye(3)[[0, 2]]
        assert dual_bound(matrix, vector, last, first, 0.0) >= truth * (1 - 1e-12)


def pair(cosine):
    return np.array([[1, cosine], [cosine, 1]])


def apart(one, other):
    return np.block([[one, np.zeros((2, 2))], [np.zeros((2, 2)), other]])


def test_ends_in_different_rows_bound_by_the_largest_eigenvalue_alone():
    matrix = apart(pair(0.9), pair(0.05))
    _, vector = np.linalg.eigh(matrix)  # 0.1, 0.95, 1.05, 1.9
    high, low = np.eye(4)[[3, 1]]
    assert dual_bound(matrix, vector, high, low, 0.0) == pytest.approx(1.9, rel=1e-12)


def test_what_the_large_side_lacks_on_the_diagonal_is_added_to_it():
    matrix = apart(pair(0.9), 10 * pair(0.9))
    _, vector = np.linalg.eigh(matrix)  # 0.1, 1, 1.9, 19
    high, low = (np.eye(4)[2] + np.eye(4)[3]) / 2, np.eye(4)[0]
    # Half of 1.9 in the rows of the 0.1, and a quarter of each diagonal entry there.
    assert dual_bound(matrix, vector, high, low, 0.0) == pytest.approx(14.5, rel=1e-12)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.tensor([[1.0, 2], [2, 1]]),
        torch.ones(3, 3),
        torch.diag(torch.tensor([1.0, -1])),
        torch.diag(torch.tensor([1.0, 0])),
    ],
)
def test_what_is_not_positive_definite_has_no_optimum(matrix):
    assert optimal_diagonal(matrix.double()) is None


@pytest.mark.slow
def test_five_hundred_rows_reach_the_gap():
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((500, 550)) + 0.5
    found = optimal_diagonal(torch.from_numpy(factor @ factor.T))
    assert found.gap < 1.01
