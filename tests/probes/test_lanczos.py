from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessdiag_probes import Breakdown, CountedMatvec, Ritz, generator, lanczos, sphere

EPS = torch.finfo(torch.float64).eps


def start(n, dtype=torch.float64, seed=0):
    return sphere(n, generator=generator(seed, "start"), dtype=dtype)


def depth(steps, n):
    return n if steps == "all" else min(steps, n)


@pytest.mark.parametrize("steps", [1, 7, "all"])
def test_the_decomposition_states_its_identity(matrix, rounding, steps):
    n = len(matrix)
    result = lanczos(matrix.mv, start(n), depth(steps, n))
    q, k = result.basis.T, len(result.diagonal)
    t = torch.diag(result.diagonal)
    t += torch.diag(result.offdiagonal, 1) + torch.diag(result.offdiagonal, -1)
    defect = matrix @ q - q @ t
    defect[:, -1] -= result.residual
    assert defect.abs().max() <= rounding
    assert (q.T @ q - torch.eye(k)).abs().max() <= 10 * n * EPS
    assert (result.basis @ result.residual).abs().max() <= rounding


@pytest.mark.parametrize("steps", [1, 7, "all"])
def test_every_ritz_value_is_as_close_as_its_bound_says(matrix, spectrum, rounding, steps):
    n = len(matrix)
    ritz = lanczos(matrix.mv, start(n), depth(steps, n)).ritz()
    distance = (ritz.value[:, None] - spectrum).abs().amin(dim=1)
    assert (distance <= ritz.bound + rounding).all()
    assert (ritz.value.diff() >= 0).all()


def test_the_bound_is_the_residual_of_the_ritz_vector(matrix, rounding):
    n = len(matrix)
    result = lanczos(matrix.mv, start(n), min(7, n))
    ritz = result.ritz()
    vectors = result.vectors(range(len(ritz.value)))
    residual = torch.linalg.vector_norm(matrix @ vectors - vectors * ritz.value, dim=0)
    assert (residual - ritz.bound).abs().max() <= rounding


def test_the_bound_is_not_idle(symmetric):
    matrix = symmetric(torch.linspace(1, 24, 24, dtype=torch.float64))
    assert lanczos(matrix.mv, start(24), 7).ritz().bound.min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "distinct"),
    [([0.0] * 9, [0]), ([0.0] * 8 + [7], [0, 7]), ([1, 1, 1, 2, 2, 5], [1, 2, 5]), ([-3], [-3])],
)
def test_an_invariant_krylov_space_stops_the_run_and_is_exact(symmetric, values, distinct, dtype):
    matrix = symmetric(torch.tensor(values, dtype=torch.float64)).to(dtype)
    product = CountedMatvec(matrix.mv)
    result = lanczos(product, start(len(values), dtype), len(values))
    assert result.invariant
    assert result.matvecs == product.count == len(distinct)
    error = result.ritz().value - torch.tensor(distinct, dtype=torch.float64)
    assert error.abs().max() <= 100 * torch.finfo(dtype).eps * max(map(abs, values))


def test_n_steps_find_every_eigenvalue_of_a_simple_spectrum(symmetric):
    exact = torch.logspace(-12, 0, 24, dtype=torch.float64)
    result = lanczos(symmetric(exact).mv, start(24), 24)
    assert result.invariant
    assert (result.ritz().value - exact).abs().max() <= 240 * EPS


def test_a_run_cut_short_is_not_called_invariant(symmetric):
    matrix = symmetric(torch.linspace(1, 24, 24, dtype=torch.float64))
    result = lanczos(matrix.mv, start(24), 23)
    assert not result.invariant
    assert result.matvecs == 23


def test_the_weights_are_a_quadrature_of_the_start_vector(symmetric):
    matrix = symmetric(torch.linspace(-1, 1, 24, dtype=torch.float64))
    first = start(24)
    ritz = lanczos(matrix.mv, first, 5).ritz()
    assert (ritz.weight >= 0).all()
    power = first.clone()
    for degree in range(10):  # 5 nodes are exact to degree 9
        moment = float(first @ power)
        assert float((ritz.weight * ritz.value**degree).sum()) == pytest.approx(
            moment, abs=100 * EPS
        )
        power = matrix @ power


def test_the_length_of_the_start_does_not_matter(symmetric):
    matrix = symmetric(torch.linspace(1, 24, 24, dtype=torch.float64))
    ritz = lanczos(matrix.mv, start(24), 7).ritz()
    for length in (1e-200, 1e200):
        other = lanczos(matrix.mv, length * start(24), 7).ritz()
        assert torch.allclose(other.value, ritz.value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-150, 1e-9, 1e9, 1e150])
def test_the_steps_and_relative_results_do_not_depend_on_the_units(matrix, rounding, scale):
    n = len(matrix)
    plain = lanczos(matrix.mv, start(n), min(7, n))
    scaled = lanczos((scale * matrix).mv, start(n), min(7, n))
    assert scaled.matvecs == plain.matvecs
    assert scaled.invariant == plain.invariant
    difference = scaled.ritz().value / scale - plain.ritz().value
    assert difference.abs().max() <= 1e4 * rounding


@settings(deadline=None, max_examples=25, derandomize=True)
@given(shift=st.floats(-100, 100), scale=st.floats(-100, 100).filter(lambda s: abs(s) > 1e-3))
def test_ritz_values_follow_shift_and_scale(shift, scale):
    exact = torch.linspace(-3, 5, 12, dtype=torch.float64)
    plain = lanczos(lambda v: exact * v, start(12), 4).ritz()
    moved = lanczos(lambda v: scale * exact * v + shift * v, start(12), 4).ritz()
    expected = (scale * plain.value + shift).sort().values
    tolerance = 1e4 * EPS * (5 * abs(scale) + abs(shift))
    assert (moved.value - expected).abs().max() <= tolerance


def test_float32_products_give_float64_coefficients_right_to_float32(symmetric):
    matrix = symmetric(torch.linspace(1, 24, 24, dtype=torch.float64))
    single = lanczos(matrix.float().mv, start(24, torch.float32), 7)
    double = lanczos(matrix.mv, start(24, torch.float32).double(), 7).ritz()
    assert single.basis.dtype == torch.float32
    ritz = single.ritz()
    assert ritz.value.dtype == ritz.bound.dtype == ritz.weight.dtype == torch.float64
    assert (ritz.value - double.value).abs().max() <= 240 * torch.finfo(torch.float32).eps * 24


def test_float32_survives_an_operator_whose_squares_underflow():
    exact = torch.tensor([1.0, 2.0, 3.0])
    ritz = lanczos(lambda v: 1e-30 * exact * v, start(3, torch.float32), 3).ritz()
    assert torch.allclose(ritz.value / 1e-30, exact.double(), rtol=1e-5)


def test_converged_sees_every_step_and_ends_the_run(symmetric):
    matrix = symmetric(torch.linspace(1, 24, 24, dtype=torch.float64))
    seen = []

    def enough(ritz: Ritz) -> bool:
        seen.append(ritz)
        return len(seen) == 5

    result = lanczos(matrix.mv, start(24), 20, converged=enough)
    assert [len(ritz.value) for ritz in seen] == [1, 2, 3, 4, 5]
    assert result.matvecs == len(result.diagonal) == len(result.basis) == 5
    assert torch.equal(seen[-1].value, result.ritz().value)
    assert torch.equal(seen[-1].bound, result.ritz().bound)


@pytest.mark.parametrize("steps", [0, 4])
def test_steps_outside_the_size_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps = {steps} lies outside 1\.\.3"):
        lanczos(lambda v: v, torch.ones(3), steps)


def test_a_zero_or_infinite_start_is_a_breakdown():
    with pytest.raises(Breakdown, match="zero vector"):
        lanczos(lambda v: v, torch.zeros(3), 1)
    with pytest.raises(Breakdown, match="not finite"):
        lanczos(lambda v: v, torch.tensor([1.0, torch.inf]), 1)


def test_the_yardstick_matrix_gives_its_largest_eigenvalue_and_never_its_kappa(bus):
    exact = torch.linalg.eigvalsh(bus)
    result = lanczos(bus.mv, start(1138), 60)
    ritz = result.ritz()
    assert result.matvecs == 60
    assert float(ritz.value[-1]) == pytest.approx(float(exact[-1]), rel=1e-8)
    assert ritz.bound[-1] <= 1e-8 * exact[-1]
    assert ritz.value[-1] / ritz.value[0] < 8.572646e6


def test_the_outer_bounds_miss_no_more_often_than_they_say(matrix, spectrum, rounding):
    failure, draws, n = 0.05, 300, len(spectrum)
    missed = torch.zeros(2)
    for seed in range(draws):
        low, high = lanczos(matrix.mv, start(n, seed=seed), depth(6, n)).ritz().ends(failure)
        missed += torch.tensor([low > spectrum.min() + rounding, high < spectrum.max() - rounding])
    # Four standard errors above what is allowed.
    assert (missed <= failure * draws + 4 * (failure * draws) ** 0.5).all()


def test_the_outer_bounds_close_in_on_the_ends_and_hold_at_every_depth(symmetric):
    exact = torch.cat([torch.linspace(0, 1, 60), torch.tensor([3.0])]).double()
    matrix = symmetric(exact)
    first = start(61)
    widths = []
    for steps in (1, 2, 5, 10, 20):
        ritz = lanczos(matrix.mv, first, steps).ritz()
        low, high = ritz.ends(1e-3)
        assert low <= 0.0 <= float(ritz.value[0]) + 1e-12
        assert float(ritz.value[-1]) - 1e-12 <= 3.0 <= high
        widths.append(high - 3.0)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 1e-6


def test_the_outer_bounds_are_those_of_the_lanczos_polynomial():
    # One step: |p(t)| = |t - θ| / β <= 1 / c, solved by hand.
    diagonal = torch.tensor([1.0, 4.0], dtype=torch.float64)
    first = torch.tensor([0.6, 0.8], dtype=torch.float64)
    low, high = lanczos(lambda v: diagonal * v, first, 1).ritz().ends(0.1)
    theta, beta = 1 * 0.36 + 4 * 0.64, 3 * 0.6 * 0.8
    reach = beta / (0.1 * math.sqrt(math.pi / 4))
    assert (low, high) == pytest.approx((theta - reach, theta + reach), rel=1e-5)


@pytest.mark.parametrize("failure", [0.0, 1.0, -1.0])
def test_a_failure_that_is_no_probability_is_refused(failure):
    ritz = lanczos(lambda v: v, torch.ones(3, dtype=torch.float64), 1).ritz()
    with pytest.raises(ValueError, match="outside"):
        ritz.ends(failure)
