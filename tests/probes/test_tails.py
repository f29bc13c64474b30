from __future__ import annotations

import math

import pytest
import torch

from hessdiag_probes.tails import chi_square, quadratic_student, student

DRAWS = 10_000
CONFIDENCES = [0.9, 0.95, 0.99]
REMAINDERS = {
    "one": [1.0],
    "one negative": [-1.0],
    "two equal": [1.0, 1.0],
    "opposite": [1.0, -1.0],
    "one and a little": [1.0, 0.01],
    "one and as much against": [1.0, -0.1, -0.1, -0.1, -0.1],
    "powers of two": [0.5**j for j in range(8)],
    "harmonic": [1 / j for j in range(1, 13)],
    "indefinite": [3.0, 1.0, -0.5, -2.0],
    "flat": [1.0] * 12,
}


@pytest.fixture(params=REMAINDERS)
def eigenvalues(request):
    return torch.tensor(REMAINDERS[request.param], dtype=torch.float64)


def quadratic_forms(eigenvalues, probes, seed=0, draws=DRAWS):
    """``vᵀA v`` and ``‖A v‖²`` for Gaussian ``v``, shape ``(draws, probes)`` each."""
    source = torch.Generator().manual_seed(seed + probes)
    first, second = (torch.zeros(draws, probes, dtype=torch.float64) for _ in range(2))
    for value in eigenvalues:
        squares = torch.randn(draws, probes, generator=source, dtype=torch.float64).square()
        first += value * squares
        second += value.square() * squares
    return first, second


def least(confidence, draws=DRAWS):
    """What a coverage of ``confidence`` may look like in so many draws, to 4.5 deviations."""
    return confidence - 4.5 * math.sqrt(confidence * (1 - confidence) / draws)


@pytest.mark.parametrize("probes", [2, 3, 5, 10, 20, 50])
def test_no_spectrum_is_missed_by_the_trace_more_often_than_stated(eigenvalues, probes):
    samples, _ = quadratic_forms(eigenvalues, probes)
    error = samples.std(dim=1) / math.sqrt(probes)
    t = (samples.mean(dim=1) - eigenvalues.sum()).abs() / error
    for confidence in CONFIDENCES:
        coverage = float((t <= quadratic_student(probes, confidence)).double().mean())
        assert coverage >= least(confidence)


@pytest.mark.parametrize("probes", [2, 3, 5, 10, 20, 50])
def test_no_spectrum_is_missed_by_the_frobenius_norm_more_often_than_stated(eigenvalues, probes):
    _, squares = quadratic_forms(eigenvalues, probes)
    ratio = (squares.mean(dim=1) / eigenvalues.square().sum()).sqrt()
    for confidence in CONFIDENCES:
        few, many = chi_square(probes, confidence)
        inside = (ratio * few <= 1) & (ratio * many >= 1)
        assert float(inside.double().mean()) >= least(confidence)


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("probes", [2, 4, 20])
def test_the_quantile_is_exact_for_rank_one(probes, confidence):
    draws = 200_000
    samples, _ = quadratic_forms(torch.ones(1, dtype=torch.float64), probes, 7, draws)
    t = (samples.mean(dim=1) - 1).abs() / samples.std(dim=1) * math.sqrt(probes)
    missed = float((t > quadratic_student(probes, confidence)).double().mean())
    # three standard errors of the average over the drawn shapes are at most a tenth of the tail
    assert missed == pytest.approx(
        1 - confidence, rel=0.1 + 4 / math.sqrt(draws * (1 - confidence))
    )


def test_the_quantile_of_two_samples_is_that_of_the_arcsine_law():
    # two samples: w = |cos a| / √2 with a uniform, so t = √2 (1/2 - 1/S) / w in closed form
    angle = (torch.arange(200_000, dtype=torch.float64) + 0.5) * (math.pi / 2 / 200_000)
    width = angle.cos() / math.sqrt(2)
    for confidence in CONFIDENCES:
        far = quadratic_student(2, confidence) * width / math.sqrt(2)
        right = torch.where(far < 0.5, (-0.5 / (0.5 - far)).exp(), 0)
        tail = float((1 - (-0.5 / (0.5 + far)).exp() + right).mean())
        assert 0.85 * (1 - confidence) <= tail <= 0.99 * (1 - confidence)


@pytest.mark.parametrize("confidence", [0.5, *CONFIDENCES])
def test_the_quantile_is_never_less_than_students(confidence):
    for probes in (2, 3, 10, 100, 400):
        assert quadratic_student(probes, confidence) >= student(probes, confidence)
    assert quadratic_student(1000, 0.95) == pytest.approx(1.96, rel=0.02)


def test_students_quantiles_are_the_tabulated_ones():
    assert student(6, 0.95) == pytest.approx(2.570582)
    assert student(2, 0.99) == pytest.approx(63.656741)
