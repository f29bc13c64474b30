from __future__ import annotations

import math

import pytest
import torch

from hessdiag_probes import Breakdown, CountedMatvec, generator, power, power_ends, sphere

EPS = torch.finfo(torch.float64).eps
SWAP = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
CERTIFIED = {
    "spread": torch.linspace(1, 24, 24).double(),
    "clustered": torch.cat([c + 1e-5 * torch.arange(8).double() for c in (1.0, 2.0, 10.0)]),
    "outlier": torch.cat([torch.linspace(0, 1, 23), torch.tensor([1e3])]).double(),
    "indefinite": torch.linspace(-3e3, 5e3, 24).double(),
    "opposite": torch.cat([torch.linspace(-1, 1, 22), torch.tensor([-9.0, 9.0])]).double(),
    "low rank": torch.cat([torch.zeros(21), torch.tensor([-1e3, 2e3, 3e3])]).double(),
    "singular": torch.cat([torch.zeros(10), torch.linspace(1, 2, 14)]).double(),
}


def start(n, seed=0, dtype=torch.float64):
    return sphere(n, generator=generator(seed, "power"), dtype=dtype)


@pytest.mark.parametrize("steps", [1, 3, 300])
def test_the_residual_is_that_of_the_value_and_the_vector(matrix, spectrum, rounding, steps):
    result = power(matrix.mv, start(len(matrix)), steps, 1e-9)
    defect = matrix @ result.vector - result.value * result.vector
    assert float(torch.linalg.vector_norm(result.vector)) == pytest.approx(1, abs=100 * EPS)
    assert abs(float(torch.linalg.vector_norm(defect)) - result.residual) <= rounding
    assert float((spectrum - result.value).abs().min()) <= result.residual + rounding


def test_both_ends_of_every_spectrum_are_found(matrix, spectrum, rounding):
    product = CountedMatvec(matrix.mv)
    ends = power_ends(product, start(len(matrix)), 2000, 1e-3)
    norm = float(spectrum.abs().max())
    assert ends.largest.value == pytest.approx(float(spectrum[-1]), abs=1e-4 * norm)
    assert ends.smallest.value == pytest.approx(float(spectrum[0]), abs=1e-4 * norm)
    assert ends.low - rounding <= spectrum[0] <= spectrum[-1] <= ends.high + rounding
    assert ends.high - ends.largest.value <= 1e-3 * norm
    assert ends.smallest.value - ends.low <= 1e-3 * norm
    assert ends.matvecs == product.count <= 1200


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
    assert 1 <= ends.high <= 1.01
    assert -1.01 <= ends.low <= -1 + gap


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


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_multiple_of_the_identity_takes_one_product(value, tolerance):
    ends = power_ends(lambda v: value * v, start(5), 100, tolerance)
    assert ends.matvecs == 1
    for end in (ends.largest, ends.smallest):
        assert end.residual <= 10 * EPS * value
        assert end.value == pytest.approx(value)
    assert ends.low <= value <= ends.high
    assert ends.high - ends.low <= 1e-8 * value


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


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_first_bounds_are_the_moments_of_the_start_in_closed_form(steps):
    # ‖(A - θ)^k v‖ >= c |λ - θ|^k, c = failure √(π / 2n), with n = 3
    exact = torch.tensor([-100.0, 300.0, 1000.0], dtype=torch.float64)
    begin = torch.tensor([2.0, 1.0, -2.0], dtype=torch.float64) / 3
    share = 0.01 * math.sqrt(math.pi / 6)
    middle = float(begin.square() @ exact)
    length = float(torch.linalg.vector_norm(begin * (exact - middle) ** steps))
    ends = power_ends(exact.mul, begin, steps, 0.0, failure=0.01)
    reach = (length / share) ** (1 / steps)
    assert ends.matvecs == steps
    # the bounds of fewer products count as well; the last is the best here
    assert ends.high == pytest.approx(middle + reach, rel=1e-5)
    assert ends.low == pytest.approx(middle - reach, rel=1e-5)


def missed(exact, steps, starts, failure):
    """How many of the starts give a bound that is wrong, above and below."""
    high, low = 0, 0
    for seed in range(starts):
        ends = power_ends(exact.mul, start(len(exact), seed), steps, 1e-3, failure=failure)
        assert ends.low <= ends.smallest.value <= ends.largest.value <= ends.high
        assert ends.matvecs <= steps
        high += ends.high < float(exact.max())
        low += ends.low > float(exact.min())
    return high, low


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("name", CERTIFIED)
def test_bounds_are_missed_no_more_often_than_failure_allows(name, steps):
    wrong = missed(CERTIFIED[name], steps, 100, 0.2)
    assert max(wrong) <= 0.2 * 100 + 4 * math.sqrt(0.2 * 0.8 * 100)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("name", CERTIFIED)
def test_bounds_are_missed_no_more_often_than_failure_allows_over_2000_starts(name, steps):
    wrong = missed(CERTIFIED[name], steps, 2000, 0.05)
    assert max(wrong) <= 0.05 * 2000 + 4 * math.sqrt(0.05 * 0.95 * 2000)


@pytest.mark.parametrize("steps", range(1, 60, 3))
def test_the_budget_is_spent_and_never_exceeded(symmetric, steps):
    matrix = symmetric(torch.linspace(-1, 3, 24).double())
    product = CountedMatvec(matrix.mv)
    ends = power_ends(product, start(24), steps, 1e-9)
    assert ends.matvecs == product.count == steps


@pytest.mark.parametrize(("steps", "width"), [(40, 0.3), (80, 0.15), (200, 0.04), (600, 0.009)])
def test_the_bounds_close_in_as_the_docstring_states(steps, width):
    exact = torch.linspace(3, 4, 2000, dtype=torch.float64)
    ends = power_ends(exact.mul, start(2000), steps, 0.0)
    assert ends.high - ends.largest.value <= width
    assert ends.smallest.value - ends.low <= width


@pytest.mark.parametrize("seed", range(20))
def test_a_bound_is_never_inside_what_was_found(seed):
    # a failure that is likely: the share is below c for many of these starts
    ends = power_ends(CERTIFIED["opposite"].mul, start(24, seed), 200, 0.0, failure=0.99)
    assert ends.low <= ends.smallest.value
    assert ends.largest.value <= ends.high


def test_each_end_counts_the_products_that_led_to_it():
    # the chain: 4, then cycles of 4, 6 and what is left; each end 2, 3 and 4 in between
    ends = power_ends(torch.linspace(0, 1, 50).double().mul, start(50), 40, 0.0)
    assert sorted([ends.largest.steps, ends.smallest.steps]) == [1 + 9, 4 + 9]


@pytest.mark.parametrize("shift", [-1e6, 1e6])
def test_bounds_follow_a_shift_of_the_operator(shift):
    exact = torch.linspace(0, 1, 50, dtype=torch.float64)
    plain = power_ends(exact.mul, start(50), 40, 0.0)
    moved = power_ends((exact + shift).mul, start(50), 40, 0.0)
    assert moved.high - shift == pytest.approx(plain.high, abs=1e-4)
    assert moved.low - shift == pytest.approx(plain.low, abs=1e-4)


@pytest.mark.parametrize("asked", [1, 2, 7, 30])
def test_stop_ends_the_search_with_bounds_that_hold(asked):
    exact = torch.linspace(-1, 1, 50, dtype=torch.float64)
    calls = []

    def stop():
        calls.append(None)
        return len(calls) == asked

    ends = power_ends(exact.mul, start(50), 1000, 1e-3, stop=stop)
    assert ends.matvecs == asked
    assert ends.low <= -1 < 1 <= ends.high


@pytest.mark.parametrize("exact", [[-3.0], [0.0], [2.0, 2.0], [-1.0, 2.0], [0.0, 0.0, 1.0]])
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 50])
def test_tiny_operators_have_bounds(exact, steps):
    exact = torch.tensor(exact, dtype=torch.float64)
    for seed in range(20):
        ends = power_ends(exact.mul, start(len(exact), seed), steps, 1e-6)
        assert ends.low <= float(exact.min())
        assert float(exact.max()) <= ends.high < 1e6
        assert ends.matvecs <= steps


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one product"):
        power(SWAP.mv, start(2), 0, 1e-6)
    for tolerance in (-1.0, torch.nan):
        with pytest.raises(ValueError, match="relative residual"):
            power(SWAP.mv, start(2), 1, tolerance)
    with pytest.raises(ValueError, match="at least one product"):
        power_ends(SWAP.mv, start(2), 0, 1e-6)
    with pytest.raises(ValueError, match="relative width"):
        power_ends(SWAP.mv, start(2), 1, -1.0)
    for failure in (0.0, 1.0, torch.nan):
        with pytest.raises(ValueError, match="no probability"):
            power_ends(SWAP.mv, start(2), 1, 1e-6, failure=failure)
    for run in (power, power_ends):
        with pytest.raises(Breakdown, match="zero vector"):
            run(SWAP.mv, torch.zeros(2), 1, 1e-6)


def test_power_and_lanczos_agree_on_the_yardstick_matrix(bus):
    result = power(bus.mv, start(1138), 4000, 1e-6)
    assert result.converged
    assert result.value == pytest.approx(3.014879e4, rel=1e-6)
