import math

import numpy as np
import pytest
import torch

from hessdiag_probes.random import generator
from hessdiag_probes.scaling import (
    row_scaling,
    sampled_row_scaling,
    unit_diagonal,
    unit_spectrum,
)


def symmetric(n, seed=0):
    seeded = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, n, generator=seeded, dtype=torch.float64)
    return drawn + drawn.T


def wide(n, decades, seed=1):
    seeded = torch.Generator().manual_seed(seed)
    return 10 ** (decades * (2 * torch.rand(n, generator=seeded, dtype=torch.float64) - 1))


def under(matrix, d):
    return d[:, None] * matrix * d


@pytest.mark.parametrize("decades", [0, 8, 60])
def test_all_rows_get_norm_one(decades):
    matrix = under(symmetric(12), wide(12, decades))
    found = row_scaling(matrix)
    norms = np.linalg.norm(under(matrix, found.scale).numpy(), axis=1)
    assert np.abs(norms - 1).max() < 1e-9
    assert found.residual <= 1e-10


def test_a_diagonal_matrix_takes_one_sweep():
    found = row_scaling(torch.diag(torch.tensor([3.0, -0.7, 1.1e5]).double()))
    assert found.sweeps == 1
    assert torch.allclose(found.scale, torch.tensor([3, 0.7, 1.1e5]).double().rsqrt(), rtol=1e-7)


def test_the_scaled_matrix_does_not_depend_on_the_scaling_given():
    matrix, d = symmetric(12), wide(12, 8)
    one = under(matrix, row_scaling(matrix).scale)
    other = under(under(matrix, d), row_scaling(under(matrix, d)).scale)
    assert torch.allclose(one, other, rtol=0, atol=1e-8)


def test_a_zero_row_keeps_scale_one():
    matrix = symmetric(5)
    matrix[2] = 0
    matrix[:, 2] = 0
    found = row_scaling(matrix)
    assert found.scale[2] == 1
    assert found.residual <= 1e-10
    assert row_scaling(torch.zeros(3, 3).double()).scale.tolist() == [1, 1, 1]


def test_a_rectangular_saddle_reports_a_residual_and_does_not_run_away():
    matrix = torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 0, 0]]).double()
    found = row_scaling(matrix)
    # Norms r of the last two rows make √2 r of the first: at best |1 - r| = |√2 r - 1|.
    assert found.residual >= (math.sqrt(2) - 1) / (math.sqrt(2) + 1) - 1e-12
    assert found.scale.max() / found.scale.min() < 1e3
    assert found.sweeps < 1000


def test_the_residual_is_that_of_the_scale_returned():
    matrix = torch.tensor([[1.0, 5, 5], [5, 0, 0], [5, 0, 0]]).double()
    found = row_scaling(matrix, sweeps=3)
    norms = np.linalg.norm(under(matrix, found.scale).numpy(), axis=1)
    assert found.residual == pytest.approx(np.abs(norms - 1).max(), rel=1e-12)
    assert found.sweeps <= 3


def test_sampled_rows_come_out_near_norm_one():
    matrix = under(symmetric(300), wide(300, 3))
    found = sampled_row_scaling(
        lambda v: matrix @ v, matrix[0], generator=generator(0, "rows"), probes=10, sweeps=8
    )
    norms = under(matrix, found.scale).norm(dim=1)
    # The last sweep halves what 7 left of six decades; its mean square has 10 degrees of freedom.
    assert norms.min() > 0.6
    assert norms.max() < 1.7
    assert norms.log().std() < 2 * 0.5 / math.sqrt(2 * 10)
    assert found.matvecs == 80


def test_sampled_rows_of_zero_keep_scale_one_and_draws_depend_on_the_generator_only():
    matrix = symmetric(6)
    matrix[0] = 0
    matrix[:, 0] = 0

    def scale(dtype, label="a"):
        return sampled_row_scaling(
            lambda v: matrix.to(v) @ v,
            torch.empty(6, dtype=dtype),
            generator=generator(0, label),
            sweeps=2,
        ).scale

    first = scale(torch.float64)
    assert first[0] == 1
    assert torch.equal(first, scale(torch.float64))
    assert torch.allclose(first, scale(torch.float32), rtol=1e-5)
    assert not torch.allclose(first, scale(torch.float64, "b"))


def test_squares_of_float32_products_do_not_underflow():
    matrix = 1e-30 * torch.eye(3)
    found = sampled_row_scaling(
        lambda v: matrix @ v, matrix[0], generator=generator(0, "tiny"), probes=200, sweeps=8
    )
    assert torch.allclose(found.scale, torch.full((3,), 1e15).double(), rtol=0.3)


def test_unit_diagonal_keeps_signs_and_zeros():
    matrix = torch.tensor([[4.0, 2, 1], [2, -9, 0], [1, 0, 0]]).double()
    expected = torch.tensor([[1, 1 / 3, 1 / 2], [1 / 3, -1, 0], [1 / 2, 0, 0]]).double()
    assert torch.allclose(unit_diagonal(matrix), expected, rtol=1e-15)


@pytest.mark.parametrize("d", [1.0, 1e-12, 1e60])
def test_the_unit_spectrum_of_two_rows_is_known_whatever_their_scale(d):
    unit = torch.tensor([[1, 0.75], [0.75, 1]], dtype=torch.float64)
    matrix = under(unit, torch.tensor([1, d], dtype=torch.float64))
    ends = unit_spectrum(matrix)
    assert ends.smallest == pytest.approx(0.25, rel=1e-14)
    assert ends.largest == pytest.approx(1.75, rel=1e-14)
    assert 0 < ends.error < 1e-13


def test_what_is_not_certainly_positive_definite_has_no_unit_spectrum():
    assert unit_spectrum(torch.tensor([[1.0, 2], [2, 1]]).double()) is None
    assert unit_spectrum(torch.ones(3, 3).double()) is None
    assert unit_spectrum(torch.diag(torch.tensor([1.0, 0])).double()) is None
    near = torch.tensor([[1, 0.99], [0.99, 1]], dtype=torch.float64)
    assert unit_spectrum(near) is not None
    assert unit_spectrum(near, entry_error=1e-3) is None  # 0.01 is not ten times 2 · 1e-3
