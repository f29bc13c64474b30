from __future__ import annotations

import math

import pytest
import torch

from hessdiag_probes import generator, sphere
from hessdiag_probes.polynomial import beyond, chebyshev, share


@pytest.mark.parametrize("failure", [1e-3, 0.05, 0.3, 0.7, 0.99])
def test_the_share_is_small_enough_for_two_and_three_numbers(failure):
    # uniform on the circle: P(|cos a| < c) = 2 arcsin(c) / π; on the sphere of R³: P = c
    assert 2 / math.pi * math.asin(share(2, failure)) <= failure
    assert share(3, failure) <= failure
    assert share(1, failure) <= 1
    # for many numbers the entry is normal of variance 1/n, and nothing is given away near 0
    assert math.erf(share(10**6, failure) * math.sqrt(10**6 / 2)) <= failure
    assert share(10**6, 0.01) * math.sqrt(10**6) == pytest.approx(0.0125331, rel=1e-5)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_share_fails_as_often_as_it_says(n):
    source = generator(0)
    entries = torch.stack([sphere(n, generator=source) for _ in range(4000)])[:, 0].abs()
    missed = float((entries < share(n, 0.2)).double().mean())
    assert missed <= 0.2 + 4 * math.sqrt(0.2 * 0.8 / 4000)
    assert missed >= 0.1


@pytest.mark.parametrize("log_value", [-800.0, -30.0, 0.0, 3.0, 600.0])
def test_the_step_beyond_one_repeated_root_is_a_power(log_value):
    step = beyond([0.0] * 4, log_value)
    assert math.log(step) == pytest.approx(log_value / 4, abs=1e-5)
    assert math.log(step) >= log_value / 4


@pytest.mark.parametrize(("gap", "value"), [(1.0, 2.0), (1.0, 1e-9), (1e3, 1e-9), (1e-9, 1.0)])
def test_the_step_beyond_two_roots_solves_a_quadratic(gap, value):
    step = beyond([gap, 0.0], math.log(value))
    root = 2 * value / (gap + math.sqrt(gap * gap + 4 * value))
    assert step == pytest.approx(root, rel=1e-5)
    assert step >= root


def test_no_value_at_all_lies_at_the_root():
    assert beyond([0.0, 2.0], -math.inf) == 0


@pytest.mark.parametrize("degree", [1, 2, 5, 64])
def test_the_roots_are_those_of_the_chebyshev_polynomial(degree):
    roots = chebyshev(-3.0, 5.0, degree)
    known = [1 + 4 * math.cos(math.pi * (2 * j + 1) / (2 * degree)) for j in range(degree)]
    assert sorted(roots) == pytest.approx(sorted(known))
    for root in roots:
        assert math.cos(degree * math.acos((root - 1) / 4)) == pytest.approx(0, abs=1e-9)


def test_every_leading_part_of_the_roots_is_small_on_the_interval():
    # in this order a part of degree k stays near the capacity 4^-k of an interval of length 1
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    log = torch.zeros_like(grid)
    for k, root in enumerate(chebyshev(0.0, 1.0, 128), start=1):
        log += (grid - root).abs().log()
        assert float(log.max()) + k * math.log(4) <= math.log(4 * (k + 1))
