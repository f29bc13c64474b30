from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import hessdiag_probes.exact
from hessdiag_probes import (
    Breakdown,
    CountedMatvec,
    assemble,
    eigh,
    eigvalsh,
    equilibrate,
    positive_spectrum,
)

EPS = torch.finfo(torch.float64).eps
ONES = torch.ones(4, 4, dtype=torch.float64)


def second_difference(n):
    """Unit diagonal, condition about n²/2, and its inverse is known in closed form."""
    off = torch.full((n - 1,), -0.5, dtype=torch.float64)
    matrix = torch.eye(n, dtype=torch.float64) + torch.diag(off, 1) + torch.diag(off, -1)
    i = torch.arange(1, n + 1, dtype=torch.float64)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    return matrix, 2 * low * (n + 1 - high) / (n + 1)


def powers_of_two(low, high, n):
    """A scale from 10^low to 10^high that multiplies without rounding, in no order."""
    seeded = torch.Generator().manual_seed(n)
    exponent = torch.linspace(low, high, n, dtype=torch.float64) * math.log2(10)
    return torch.exp2(exponent.round())[torch.randperm(n, generator=seeded)]


def exact_eigenpairs(matrix, digits):
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(digits):
        values, vectors = mpmath.eigsy(mpmath.matrix(matrix.tolist()))
        order = sorted(range(len(values)), key=lambda i: values[i])
        columns = [[float(vectors[row, i]) for row in range(len(values))] for i in order]
        return [values[i] for i in order], torch.tensor(columns, dtype=torch.float64).T


def relative_errors(values, truth):
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(50):
        pairs = zip(values.tolist(), truth, strict=True)
        return [float(abs(mpmath.mpf(value) / exact - 1)) for value, exact in pairs]


# assemble


@pytest.mark.parametrize("slab", [1, 7, 1024])
def test_the_matrix_is_assembled_entry_by_entry(matrix, slab, monkeypatch):
    monkeypatch.setattr(hessdiag_probes.exact, "SLAB", slab)
    product = CountedMatvec(matrix.mv)
    result = assemble(product, len(matrix))
    assert torch.equal(result.matrix, matrix)
    assert result.asymmetry == 0
    assert result.matvecs == product.count == len(matrix)


@pytest.mark.parametrize("slab", [1, 2, 1024])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_asymmetry_is_relative_and_the_matrix_symmetrised(slab, scale, monkeypatch):
    monkeypatch.setattr(hessdiag_probes.exact, "SLAB", slab)
    skew = torch.tensor([[4.0, 1, 0], [1, 2, 3], [0.5, 3, 1]], dtype=torch.float64)
    result = assemble((scale * skew).mv, 3)
    assert result.asymmetry == pytest.approx(0.5 / 4)
    assert torch.allclose(result.matrix / scale, (skew + skew.T) / 2, rtol=1e-15)
    assert torch.equal(result.matrix, result.matrix.T)


def test_float32_products_are_assembled_in_float64():
    seen = []

    def product(vector):
        seen.append(vector.dtype)
        return ONES.float().mv(vector)

    result = assemble(product, 4, dtype=torch.float32)
    assert result.matrix.dtype == torch.float64
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("chunk", [2, 3, 7, 1000])
def test_columns_that_are_asked_for_several_at_a_time_make_the_same_matrix(matrix, chunk):
    asked = []

    def products(vectors):
        asked.append(len(vectors))
        return vectors @ matrix

    result = assemble(products, len(matrix), chunk=chunk)
    assert torch.equal(result.matrix, matrix)
    assert result.matvecs == sum(asked) == len(matrix)
    assert set(asked[:-1]) <= {chunk}
    assert asked[-1] <= chunk


def test_several_columns_that_are_misshapen_or_not_finite_are_refused():
    with pytest.raises(ValueError, match="a row for each"):
        assemble(lambda v: v[0], 4, chunk=2)
    with pytest.raises(Breakdown, match="one of products 3 to 4"):
        assemble(lambda v: v / (1 - v[:, 2:3].amax()), 4, chunk=2)
    with pytest.raises(ValueError, match="chunk = 0"):
        assemble(ONES.mv, 4, chunk=0)


def test_assembling_nothing_or_nothing_finite_is_refused():
    with pytest.raises(ValueError, match="at least one number"):
        assemble(ONES.mv, 0)
    with pytest.raises(Breakdown, match="product 1"):
        assemble(lambda v: v / 0, 4)


# equilibrate


@pytest.mark.parametrize("span", [0, 10, 150])
def test_equilibration_is_exact_and_brings_every_row_norm_within_a_factor_two(symmetric, span):
    base = symmetric(torch.linspace(-3, 5, 12, dtype=torch.float64))
    graded = powers_of_two(-span, span, 12)
    matrix = base * graded[:, None] * graded
    matrix[3] = matrix[:, 3] = 0
    kept = matrix.clone()
    result = equilibrate(matrix)
    assert torch.equal(matrix, kept)
    mantissa, _ = torch.frexp(result.scale)
    assert (mantissa == 0.5).all()
    assert torch.equal(result.matrix, matrix * result.scale[:, None] * result.scale)
    norms = torch.linalg.vector_norm(result.matrix, dim=1)
    alive = torch.arange(12) != 3
    assert ((norms[alive] >= 0.5) & (norms[alive] <= 2)).all()
    assert result.residual == pytest.approx(float(norms[alive].log2().abs().max()))
    assert result.residual <= 1
    assert norms[3] == 0
    assert result.scale[3] == 1


def test_equilibration_undoes_a_scaling_of_an_equilibrated_matrix():
    graded = powers_of_two(-20, 20, 8)
    base = torch.eye(8, dtype=torch.float64)
    assert torch.equal(equilibrate(base * graded[:, None] * graded).scale, 1 / graded)


def test_a_matrix_without_equal_row_norms_says_so():
    saddle = torch.zeros(101, 101, dtype=torch.float64)
    saddle[0, 1:] = saddle[1:, 0] = 1
    assert equilibrate(saddle).residual > 1


def test_equilibrating_the_zero_matrix_changes_nothing():
    result = equilibrate(0 * ONES)
    assert torch.equal(result.scale, torch.ones(4, dtype=torch.float64))
    assert (result.residual, float(result.matrix.abs().max())) == (0.0, 0.0)


# eigh, eigvalsh


def test_the_prescribed_spectrum_comes_back(matrix, spectrum, rounding):
    kept = matrix.clone()
    result = eigh(matrix)
    assert (result.value - spectrum).abs().max() <= rounding
    assert (eigvalsh(matrix) - spectrum).abs().max() <= rounding
    assert (matrix @ result.vector - result.vector * result.value).abs().max() <= rounding
    gram = result.vector.T @ result.vector
    assert (gram - torch.eye(len(matrix))).abs().max() <= 10 * len(matrix) * EPS
    assert torch.equal(matrix, kept)


def test_eigenvalues_of_a_float32_matrix_are_computed_in_float64():
    values = eigvalsh(torch.diag(torch.tensor([1.0, 1e-10])))
    assert values[0] == pytest.approx(1e-10, rel=1e-7)
    assert eigh(torch.eye(2)).vector.dtype == torch.float64


@pytest.mark.parametrize("solve", [eigh, eigvalsh, equilibrate, lambda a: positive_spectrum(a, 0)])
def test_a_matrix_that_is_not_finite_or_not_square_is_refused(solve):
    for bad in (torch.nan, torch.inf):
        with pytest.raises(Breakdown, match="not finite"):
            solve(torch.tensor([[1.0, 0.0], [0.0, bad]]))
    for shape in ((2, 3), (4,), (0, 0)):
        with pytest.raises(ValueError, match="pass a square one"):
            solve(torch.ones(shape))


def test_the_yardstick_matrix_has_the_published_spectrum(bus):
    values = eigvalsh(bus)
    assert float(values[0]) == pytest.approx(3.516860e-3, rel=1e-6)
    assert float(values[-1] / values[0]) == pytest.approx(8.572646e6, rel=1e-6)


# positive_spectrum


@pytest.mark.parametrize("span", [0, 6, 20, 140])
def test_every_eigenvalue_of_a_graded_matrix_is_right_to_its_stated_relative_error(span):
    unit, _ = second_difference(8)
    graded = powers_of_two(-span, span, 8)
    matrix = unit * graded[:, None] * graded
    kept = matrix.clone()
    result = positive_spectrum(matrix, 0.0)
    truth, vectors = exact_eigenpairs(matrix, digits=60 + 4 * span)
    assert max(relative_errors(result.value, truth)) <= min(result.relative_error, 1e-13)
    overlap = (vectors * result.vector).sum(dim=0).abs()
    assert (overlap - 1).abs().max() <= 1e-12
    gram = result.vector.T @ result.vector
    assert (gram - torch.eye(8)).abs().max() <= 80 * EPS
    assert torch.equal(matrix, kept)


def test_eigenvalues_at_both_ends_of_the_range_survive():
    matrix = torch.tensor([[1e-307, 0.3], [0.3, 1e307]], dtype=torch.float64)
    result = positive_spectrum(matrix, 0.0)
    # det / trace and trace, exact to 1e-300
    assert float(result.value[0] / 1e-307) == pytest.approx(1 - 0.09, rel=1e-14)
    assert float(result.value[1] / 1e307) == pytest.approx(1, rel=1e-14)


def test_an_eigenvalue_outside_the_range_gets_no_certificate():
    below = torch.tensor([[5e-308, 4.5e-308], [4.5e-308, 5e-308]], dtype=torch.float64)
    above = torch.tensor([[1e308, 0.9e308], [0.9e308, 1e308]], dtype=torch.float64)
    for matrix in (below, above):
        assert positive_spectrum(matrix, 0.0) is None


@pytest.mark.parametrize(("info", "work"), [(1, [1.0, 1.0]), (0, [0.5, 1.0])])
def test_a_jacobi_run_that_lapack_gives_up_on_gets_no_certificate(info, work, monkeypatch):
    def gives_up(matrix, **_):
        n = len(matrix)
        return np.ones(n), np.eye(n), np.eye(n), np.array(work), np.zeros(3), info

    monkeypatch.setattr(hessdiag_probes.exact.lapack, "dgejsv", gives_up)
    assert positive_spectrum(torch.eye(2), 0.0) is None


def test_the_smallest_eigenvalue_agrees_with_the_known_inverse():
    unit, inverse = second_difference(60)
    graded = powers_of_two(-8, 8, 60)
    matrix = unit * graded[:, None] * graded
    truth = 1 / eigvalsh(inverse / graded[:, None] / graded)[-1]
    result = positive_spectrum(matrix, 0.0)
    assert result.value[-1] / result.value[0] > 1e20
    assert float(result.value[0] / truth) == pytest.approx(1, abs=1e-12)
    assert result.relative_error < 1e-8
    cosine = math.cos(math.pi / 61)
    assert result.scaled_condition == pytest.approx((1 + cosine) / (1 - cosine), rel=1e-10)


def test_the_stated_error_covers_errors_of_the_entries():
    unit, _ = second_difference(8)
    graded = powers_of_two(-6, 6, 8)
    seeded = torch.Generator().manual_seed(1)
    noise = torch.randn(8, 8, generator=seeded, dtype=torch.float64).sign()
    noise = 1e-6 * (noise.tril() + noise.tril(-1).T)
    clean = positive_spectrum(unit * graded[:, None] * graded, 0.0)
    dirty = positive_spectrum((unit + noise) * graded[:, None] * graded, 1e-6)
    error = (dirty.value / clean.value - 1).abs().max()
    assert 1e-7 < error <= dirty.relative_error


@pytest.mark.parametrize("power", range(1, 12))
def test_a_certificate_is_given_only_where_errors_cannot_reach_zero(power):
    smallest = 10.0**-power
    matrix = torch.tensor([[1, 1 - smallest], [1 - smallest, 1]], dtype=torch.float64)
    result = positive_spectrum(matrix, 1e-7)
    assert (result is None) == (smallest <= 10 * 2 * 1e-7)
    if result is not None:
        assert result.relative_error < 0.1
        assert float(result.value[0]) == pytest.approx(smallest, rel=1e-9)


def test_what_is_not_positive_definite_gets_no_certificate(symmetric):
    indefinite = symmetric(torch.linspace(-1e-3, 1, 8, dtype=torch.float64))
    singular = symmetric(torch.linspace(0, 1, 8, dtype=torch.float64))
    dead = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    for matrix in (indefinite, singular, dead, ONES, 0 * ONES, -torch.eye(3)):
        assert positive_spectrum(matrix, 0.0) is None


@pytest.mark.parametrize("error", [-1e-16, torch.nan])
def test_an_entry_error_that_bounds_nothing_is_refused(error):
    with pytest.raises(ValueError, match="entry_error"):
        positive_spectrum(torch.eye(2), error)
