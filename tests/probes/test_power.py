from __future__ import annotations

import pytest
import torch

from hessdiag_probes import Breakdown, CountedMatvec, generator, power, power_ends, sphere

EPS = torch.finfo(torch.float64).eps
SWAP = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)


def start(n, seed=0, dtype=torch.float64):
    return sphere(n, generator=generator(seed, "power"), dtype=dtype)


@pytest.mark.parametrize("steps", [1, 3, 300])
def test_the_residual_is_that_of_the_value_and_the_vector(matrix, spectrum, rounding, steps):
    result = power(matrix.mv, start(len(matrix)), steps, 1e-9)
    defect = matrix @ result.vector - result.value * result.vector
    assert float(torch.linalg.vector_norm(result.vector)) == pytest.approx(1, abs=100 * EPS)
    assert abs(float(torch.linalg.vector_norm(defect)) - result.residual) <= rounding
    assert float((spectrum - result.value).abs().min()) <= result.residual + rounding


def test_both_ends_of_every_spectrum_are_found(matrix, spectrum):
    product = CountedMatvec(matrix.mv)
    ends = power_ends(product, start(len(matrix)), 2000, 1e-6)
    norm = float(spectrum.abs().max())
    assert ends.largest.value == pytest.approx(float(spectrum[-1]), abs=1e-4 * norm)
    assert ends.smallest.value == pytest.approx(float(spectrum[0]), abs=1e-4 * norm)
    assert ends.largest.value >= ends.smallest.value
    assert ends.matvecs == product.count


@pytest.mark.parametrize(("shift", "found"), [(0.0, 1.0), (0.9, 0.1)])
def test_convergence_has_the_rate_that_the_docstring_states(shift, found):
    exact = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    begin = torch.ones(3, dtype=torch.float64)
    runs = [power(exact.mul, begin, steps, 0.0, shift=shift) for steps in (11, 12)]
    errors = [abs(run.value - found) for run in runs]
    assert errors[1] / errors[0] == pytest.approx(0.25, rel=1e-3)


def test_the_run_stops_at_the_first_residual_below_the_tolerance():
    exact = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    product = CountedMatvec(exact.mul)
    result = power(product, start(3), 1000, 1e-8)
    assert result.converged
    assert result.residual <= 1e-8
    assert result.steps == product.count < 40
    before = power(exact.mul, start(3), result.steps - 1, 1e-8)
    assert not before.converged
    assert before.residual > 1e-8


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-5])
def test_ends_of_opposite_sign_are_never_a_silent_wrong_answer(symmetric, seed, gap):
    exact = torch.tensor([-1 + gap, 0.1, 0.2, 1.0], dtype=torch.float64)
    matrix = symmetric(exact)
    lone = power(matrix.mv, start(4, seed), 200, 1e-6)
    assert not lone.converged
    assert lone.residual > 1e-2
    ends = power_ends(matrix.mv, start(4, seed), 200, 1e-6)
    assert ends.largest.converged
    assert ends.smallest.converged
    assert ends.largest.value == pytest.approx(1, abs=1e-9)
    assert ends.smallest.value == pytest.approx(-1 + gap, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_swap_has_no_dominant_eigenvalue_and_two_ends(seed):
    lone = power(SWAP.mv, start(2, seed), 50, 1e-6)
    assert not lone.converged
    assert lone.residual**2 + lone.value**2 == pytest.approx(1)
    ends = power_ends(SWAP.mv, start(2, seed), 50, 1e-6)
    assert ends.largest.value == pytest.approx(1)
    assert ends.smallest.value == pytest.approx(-1)


def test_a_shift_selects_the_farthest_eigenvalue_and_reports_that_of_the_operator():
    exact = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    assert power(exact.mul, start(3), 300, 1e-9).value == pytest.approx(2)
    assert power(exact.mul, start(3), 300, 1e-9, shift=2.0).value == pytest.approx(-1)


@pytest.mark.parametrize("scale", [1e-150, 1e-9, 1e9, 1e150])
def test_a_run_does_not_depend_on_the_units(matrix, rounding, scale):
    begin = start(len(matrix))
    plain = power_ends(matrix.mv, begin, 60, 1e-3)
    scaled = power_ends((scale * matrix).mv, begin, 60, 1e-3)
    assert scaled.matvecs == plain.matvecs
    for one, other in ((plain.largest, scaled.largest), (plain.smallest, scaled.smallest)):
        assert other.converged == one.converged
        assert abs(other.value / scale - one.value) <= 1e4 * rounding


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_multiple_of_the_identity_takes_one_step(value):
    ends = power_ends(lambda v: value * v, start(5), 100, 1e-12)
    assert ends.matvecs == 2
    for end in (ends.largest, ends.smallest):
        assert end.converged
        assert end.value == pytest.approx(value)


def test_float32_converges_to_float32():
    exact = torch.tensor([0.1, 0.5, 1.0])
    result = power(exact.mul, start(3, dtype=torch.float32), 100, 1e-5)
    assert result.vector.dtype == torch.float32
    assert result.converged
    assert result.value == pytest.approx(1, abs=1e-6)


def test_a_matvec_that_returns_its_argument_is_not_disturbed():
    begin = start(4)
    kept = begin.clone()
    result = power(lambda v: v, begin, 10, 1e-12)
    assert result.value == pytest.approx(1)
    assert torch.allclose(result.vector, kept)
    assert torch.equal(begin, kept)


def test_both_ends_share_the_scale_of_the_operator():
    exact = torch.tensor([1.0, 0.0, 1e-4], dtype=torch.float64)
    begin = torch.tensor([1e-3, 1.0, 1.0], dtype=torch.float64)
    ends = power_ends(exact.mul, begin, 100, 1e-2)
    assert ends.largest.value == pytest.approx(1, abs=1e-2)
    assert ends.smallest.steps == 1  # its residual, 7e-4, is small beside 1


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one product"):
        power(SWAP.mv, start(2), 0, 1e-6)
    for tolerance in (-1.0, torch.nan):
        with pytest.raises(ValueError, match="relative residual"):
            power(SWAP.mv, start(2), 1, tolerance)
    for run in (power, power_ends):
        with pytest.raises(Breakdown, match="zero vector"):
            run(SWAP.mv, torch.zeros(2), 1, 1e-6)


def test_power_and_lanczos_agree_on_the_yardstick_matrix(bus):
    result = power(bus.mv, start(1138), 4000, 1e-6)
    assert result.converged
    assert result.value == pytest.approx(3.014879e4, rel=1e-6)
