from __future__ import annotations

import math

import pytest
import torch

from hessdiag_probes import Breakdown, CountedMatvec, generator, hutchinson, rademacher

DISTRIBUTIONS = ["gaussian", "rademacher"]
RUNS = 600
BINOMIAL = math.sqrt(0.95 * 0.05 / RUNS)
DENSE = torch.tensor(
    [
        [4.0, 1.0, -2.0, 0.5, 0.0],
        [1.0, -3.0, 0.5, 1.0, 0.2],
        [-2.0, 0.5, 1.0, -1.0, 0.1],
        [0.5, 1.0, -1.0, 2.0, 0.0],
        [0.0, 0.2, 0.1, 0.0, 0.01],
    ],
    dtype=torch.float64,
)


def moments(matrix, probes, seed, **options):
    source = generator(seed, "hutchinson")
    return hutchinson(matrix.mv, len(matrix), probes, generator=source, **options)


@pytest.fixture(scope="module", params=DISTRIBUTIONS)
def sample(request):
    """The same small matrix measured with 6 probes under 600 seeds."""
    runs = [moments(DENSE, 6, seed, distribution=request.param) for seed in range(RUNS)]
    return request.param, runs


def test_the_variance_of_the_trace_is_the_theoretical_one(sample):
    distribution, runs = sample
    values = torch.tensor([run.trace.value for run in runs], dtype=torch.float64)
    frobenius = float(DENSE.square().sum())
    if distribution == "rademacher":
        frobenius -= float(DENSE.diagonal().square().sum())
    variance = 2 * frobenius / 6
    # a mean and a variance over 600 runs, each to five standard errors
    assert abs(float(values.mean() - DENSE.trace())) <= 5 * math.sqrt(variance / RUNS)
    assert float(values.var()) == pytest.approx(variance, rel=5 * math.sqrt(4 / RUNS))


def test_the_standard_errors_are_right_on_average(sample):
    _, runs = sample
    trace = torch.tensor([run.trace.value for run in runs]).var()
    stated = torch.tensor([run.trace.stderr**2 for run in runs]).mean()
    assert float(stated / trace) == pytest.approx(1, rel=0.4)
    diagonal = torch.stack([run.diagonal.value for run in runs]).var(dim=0)
    stated = torch.stack([run.diagonal.stderr for run in runs]).square().mean(dim=0)
    assert ((stated / diagonal - 1).abs() <= 0.4).all()


def test_the_diagonal_is_unbiased(sample):
    _, runs = sample
    values = torch.stack([run.diagonal.value for run in runs])
    five = 5 * values.std(dim=0) / math.sqrt(RUNS)
    assert ((values.mean(dim=0) - DENSE.diagonal()).abs() <= five).all()


def test_the_row_norm_interval_covers_as_stated(sample):
    distribution, runs = sample
    truth = torch.linalg.vector_norm(DENSE, dim=1)
    inside = [(run.row_norm.low <= truth) & (truth <= run.row_norm.high) for run in runs]
    coverage = torch.stack(inside).double().mean(dim=0)
    assert (coverage >= 0.95 - 4 * BINOMIAL).all()
    if distribution == "gaussian":  # exact, so not above either
        assert (coverage <= 0.95 + 4 * BINOMIAL).all()


def test_the_frobenius_interval_covers_at_least_as_stated(sample):
    _, runs = sample
    truth = float(torch.linalg.matrix_norm(DENSE))
    inside = [run.frobenius.low <= truth <= run.frobenius.high for run in runs]
    assert sum(inside) / RUNS >= 0.95 - 4 * BINOMIAL


def test_the_diagonal_interval_covers_as_stated(sample):
    distribution, runs = sample
    truth = DENSE.diagonal()
    inside = [(run.diagonal.low <= truth) & (truth <= run.diagonal.high) for run in runs]
    coverage = torch.stack(inside).double().mean(dim=0)
    if distribution == "gaussian":
        assert ((coverage - 0.95).abs() <= 4 * BINOMIAL).all()
    else:  # a t-interval on few values: short by what they lack of a normal
        assert (coverage >= 0.85).all()


def test_the_trace_interval_covers_at_least_as_stated(sample):
    _, runs = sample
    inside = [run.trace.low <= float(DENSE.trace()) <= run.trace.high for run in runs]
    assert sum(inside) / RUNS >= 0.95 - 4 * BINOMIAL


@pytest.mark.parametrize("probes", [2, 3, 10])
def test_the_trace_interval_is_exact_for_rank_one(probes):
    vector = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    runs = [moments(-torch.outer(vector, vector), probes, seed).trace for seed in range(RUNS)]
    truth = -float(vector.square().sum())
    coverage = sum(run.low <= truth <= run.high for run in runs) / RUNS
    assert coverage == pytest.approx(0.95, abs=4 * BINOMIAL)


def test_the_frobenius_interval_is_exact_for_rank_one():
    vector = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    matrix = torch.outer(vector, vector)
    truth = float(vector.square().sum())
    runs = [moments(matrix, 4, seed).frobenius for seed in range(RUNS)]
    coverage = sum(run.low <= truth <= run.high for run in runs) / RUNS
    assert coverage == pytest.approx(0.95, abs=4 * BINOMIAL)


def test_the_chi_square_interval_has_the_tabulated_ends():
    run = moments(DENSE, 20, 0)
    squared = (run.row_norm.high / run.row_norm.value).square()
    assert torch.allclose(squared, torch.full_like(squared, 20 / 9.590777), rtol=1e-6)
    squared = (run.row_norm.low / run.row_norm.value).square()
    assert torch.allclose(squared, torch.full_like(squared, 20 / 34.169607), rtol=1e-6)
    assert run.frobenius.high / run.frobenius.value == pytest.approx(math.sqrt(20 / 9.590777))


def test_the_student_interval_has_the_tabulated_width():
    run = moments(DENSE, 6, 0)
    width = (run.diagonal.high - run.diagonal.value) / run.diagonal.stderr
    assert torch.allclose(width, torch.full_like(width, 2.570582))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_diagonal_operator_has_its_diagonal_measured_without_error(distribution):
    exact = torch.tensor([3.0, -2.0, 0.0], dtype=torch.float64)
    diagonal = moments(torch.diag(exact), 4, 0, distribution=distribution).diagonal
    assert torch.allclose(diagonal.value, exact, rtol=1e-15, atol=0)
    assert (diagonal.high - diagonal.low).max() <= 1e-14


def test_signs_measure_the_trace_and_the_norms_of_a_diagonal_operator_without_error():
    exact = torch.tensor([3.0, -2.0, 0.0], dtype=torch.float64)
    run = moments(torch.diag(exact), 4, 0, distribution="rademacher")
    assert torch.allclose(run.row_norm.value, exact.abs(), rtol=1e-15)
    assert (run.trace.value, run.trace.stderr) == (1.0, 0.0)
    assert run.frobenius.value == pytest.approx(math.sqrt(13))


def test_the_diagonal_of_signs_is_the_mean_of_the_products():
    source = generator(4)
    run = hutchinson(DENSE.mv, 5, 6, generator=source, distribution="rademacher")
    source = generator(4)
    probes = [rademacher(5, generator=source) for _ in range(6)]
    products = torch.stack([v * DENSE.mv(v) for v in probes])
    assert torch.allclose(run.diagonal.value, products.mean(dim=0))
    assert torch.allclose(run.diagonal.stderr, products.std(dim=0) / math.sqrt(6))


def test_the_zero_operator_has_zero_moments():
    run = moments(torch.zeros(3, 3, dtype=torch.float64), 4, 0)
    assert (run.trace.low, run.trace.value, run.trace.high) == (0, 0, 0)
    assert (run.frobenius.low, run.frobenius.high) == (0, 0)
    assert not run.row_norm.high.any()


@pytest.mark.parametrize("scale", [1e-100, 1e-9, -1e9])
def test_moments_scale_with_the_operator(scale):
    plain, scaled = moments(DENSE, 6, 0), moments(scale * DENSE, 6, 0)
    assert scaled.trace.value / scale == pytest.approx(plain.trace.value)
    assert scaled.trace.stderr / abs(scale) == pytest.approx(plain.trace.stderr)
    assert torch.allclose(scaled.diagonal.stderr / abs(scale), plain.diagonal.stderr)
    assert torch.allclose(scaled.row_norm.high / abs(scale), plain.row_norm.high)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_all_moments_come_from_one_product_per_probe(distribution):
    product = CountedMatvec(DENSE.mv)
    source = generator(0)
    run = hutchinson(product, 5, 7, generator=source, distribution=distribution)
    assert run.matvecs == product.count == 7
    assert run.confidence == 0.95


def test_float32_probes_are_summed_in_float64():
    source = generator(0)
    run = hutchinson(DENSE.float().mv, 5, 6, generator=source, dtype=torch.float32)
    double = hutchinson(DENSE.mv, 5, 6, generator=generator(0))
    assert run.diagonal.value.dtype == torch.float64
    assert torch.allclose(run.row_norm.value, double.row_norm.value, rtol=1e-5)
    tiny = DENSE.float() * 1e-30
    run = hutchinson(tiny.mv, 5, 6, generator=generator(0), dtype=torch.float32)
    assert torch.allclose(run.row_norm.value / 1e-30, double.row_norm.value, rtol=1e-5)


def test_bad_arguments_are_refused():
    options = {"generator": generator(0)}
    with pytest.raises(ValueError, match="takes at least 2"):
        hutchinson(DENSE.mv, 5, 1, **options)
    with pytest.raises(ValueError, match="at least one number"):
        hutchinson(DENSE.mv, 0, 2, **options)
    with pytest.raises(ValueError, match="confidence"):
        hutchinson(DENSE.mv, 5, 2, confidence=1.0, **options)
    with pytest.raises(ValueError, match="choose 'gaussian' or 'rademacher'"):
        hutchinson(DENSE.mv, 5, 2, distribution="uniform", **options)
    with pytest.raises(Breakdown, match="not finite"):
        hutchinson(lambda v: v / 0, 5, 2, **options)
