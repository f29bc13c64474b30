"""Hutchinson's estimates beside a Lanczos run on the same operator."""

from __future__ import annotations

import math

import pytest
import torch

from hessdiag_probes import CountedMatvec, generator, hutchinson, lanczos, sphere

EPS = torch.finfo(torch.float64).eps
RUNS = 200
BINOMIAL = math.sqrt(0.95 * 0.05 / RUNS)
SPREAD = torch.linspace(1, 24, 24, dtype=torch.float64)
INDEFINITE = torch.linspace(-3, 5, 24, dtype=torch.float64)
KINDS = ["trace", "diagonal", "row_norm", "frobenius"]


def krylov(matrix, steps, seed=0, dtype=torch.float64):
    begin = sphere(len(matrix), generator=generator(seed, "start"), dtype=dtype)
    return lanczos(matrix.to(dtype).mv, begin, steps)


def number(value):
    return torch.as_tensor(value, dtype=torch.float64)


def deflated(matrix, steps, probes=3, seed=0, **options):
    run = krylov(matrix, steps, seed)
    source = generator(seed, "probes")
    return hutchinson(matrix.mv, len(matrix), probes, generator=source, deflate=run, **options)


def truths(matrix):
    return {
        "trace": matrix.trace(),
        "diagonal": matrix.diagonal(),
        "row_norm": torch.linalg.vector_norm(matrix, dim=1),
        "frobenius": torch.linalg.matrix_norm(matrix),
    }


def coverage(matrix, steps, probes):
    runs = [deflated(matrix, steps, probes, seed) for seed in range(RUNS)]
    shares = {}
    for kind, truth in truths(matrix).items():
        ends = [(getattr(run, kind).low, getattr(run, kind).high) for run in runs]
        low = torch.stack([number(end[0]) for end in ends])
        high = torch.stack([number(end[1]) for end in ends])
        shares[kind] = ((low <= truth) & (truth <= high)).double().mean(dim=0)
    return shares


@pytest.mark.parametrize("steps", [2, 5])
def test_every_interval_covers_as_stated(matrix, steps):
    shares = coverage(matrix, min(steps, len(matrix)), 3)
    for share in shares.values():
        assert (share >= 0.95 - 4.5 * BINOMIAL).all()


def test_the_intervals_of_rows_and_diagonal_stay_exact(symmetric):
    # row by row the remainder is Gaussian whatever the spectrum
    shares = coverage(symmetric(INDEFINITE), 4, 3)
    for kind in ("diagonal", "row_norm"):
        assert float(shares[kind].mean()) == pytest.approx(0.95, abs=0.02)


def test_a_second_copy_of_an_outlier_is_neither_missed_nor_believed_gone(symmetric):
    # Lanczos removes one copy of the 5; the other is a remainder of rank one
    exact = torch.tensor([0.0] * 18 + [5.0, 5.0], dtype=torch.float64)
    matrix = symmetric(exact)
    assert krylov(matrix, 20).invariant
    runs = [deflated(matrix, 20, 3, seed).trace for seed in range(600)]
    share = sum(run.low <= 10 <= run.high for run in runs) / len(runs)
    assert share == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 600))


def test_the_variance_of_the_trace_is_that_of_the_remainder(symmetric):
    exact = torch.cat([torch.linspace(-1, 1, 20), torch.tensor([50.0, 80.0])]).double()
    matrix = symmetric(exact)
    run = krylov(matrix, 6)
    projector = torch.eye(22, dtype=torch.float64) - run.basis.T @ run.basis
    variance = 2 * float((projector @ matrix @ projector).square().sum()) / 4
    assert variance < 20  # undeflated: 2 (50² + 80²) / 4 > 4000
    values = []
    for seed in range(600):
        source = generator(seed, "probes")
        moments = hutchinson(matrix.mv, 22, 4, generator=source, deflate=run)
        values.append(moments.trace.value)
    values = torch.tensor(values, dtype=torch.float64)
    assert abs(float(values.mean() - exact.sum())) <= 5 * math.sqrt(variance / 600)
    assert float(values.var()) == pytest.approx(variance, rel=5 * math.sqrt(4 / 600))


def test_what_couples_the_basis_to_the_rest_adds_no_noise_to_the_trace():
    # Q = e_1, T = [2], and P A P = [5] is of one number; the coupling 100 is in neither trace
    matrix = torch.tensor([[2.0, 100.0], [100.0, 5.0]], dtype=torch.float64)
    run = lanczos(matrix.mv, torch.tensor([1.0, 0.0], dtype=torch.float64), 1)
    source = generator(0)
    moments = hutchinson(matrix.mv, 2, 400, generator=source, deflate=run)
    assert abs(moments.trace.value - 7) <= 5 * 5 * math.sqrt(2 / 400)
    assert moments.trace.stderr == pytest.approx(5 * math.sqrt(2 / 400), rel=0.3)


def test_the_standard_errors_of_the_norms_are_those_of_what_is_left_to_chance():
    # row norms √(known² + rest²) of known parts (8, 4) and remainders (4, 3)
    matrix = torch.tensor([[8.0, 4.0], [4.0, 3.0]], dtype=torch.float64)
    run = lanczos(matrix.mv, torch.tensor([1.0, 0.0], dtype=torch.float64), 1)
    runs = []
    for seed in range(250):
        source = generator(seed, "probes")
        runs.append(hutchinson(matrix.mv, 2, 20, generator=source, deflate=run))
    values = torch.stack([moments.row_norm.value for moments in runs])
    stated = torch.stack([moments.row_norm.stderr for moments in runs]).square().mean(dim=0)
    assert torch.allclose(stated, values.var(dim=0), rtol=0.45)
    totals = torch.tensor([moments.frobenius.value for moments in runs])
    stated = torch.tensor([moments.frobenius.stderr for moments in runs]).square().mean()
    assert float(stated) == pytest.approx(float(totals.var()), rel=0.45)


def test_an_outlier_caught_by_the_run_leaves_narrow_intervals(symmetric):
    exact = torch.cat([torch.linspace(-0.1, 0.1, 40), torch.tensor([50.0, 80.0])]).double()
    matrix = symmetric(exact)
    plain = hutchinson(matrix.mv, 42, 10, generator=generator(0))
    helped = deflated(matrix, 8, 10)
    for kind in KINDS:
        before, after = getattr(plain, kind), getattr(helped, kind)
        ratio = (number(after.high) - after.low) / (number(before.high) - before.low)
        assert float(ratio.max()) < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "exact", [SPREAD, INDEFINITE, SPREAD[:1], SPREAD[:2], torch.logspace(-12, 0, 24).double()]
)
def test_a_full_basis_leaves_nothing_to_chance(symmetric, kind, exact):
    matrix = symmetric(exact)
    result = getattr(deflated(matrix, len(matrix)), kind)
    truth = truths(matrix)[kind]
    low, high = number(result.low), number(result.high)
    assert ((low <= truth) & (truth <= high)).all()
    assert float((high - low).max()) <= 100 * len(exact) * EPS * float(exact.abs().max())
    assert torch.isfinite(number(result.stderr)).all()


def test_a_zero_operator_has_zero_moments():
    moments = deflated(torch.zeros(5, 5, dtype=torch.float64), 3)
    for kind in KINDS:
        assert not number(getattr(moments, kind).low).any()
        assert not number(getattr(moments, kind).high).any()


def test_float32_widens_the_intervals_by_its_rounding(symmetric):
    matrix = symmetric(torch.cat([torch.zeros(10), torch.linspace(1, 2, 8)]).double()).float()
    run = krylov(matrix, 18, dtype=torch.float32)
    source = generator(0)
    moments = hutchinson(matrix.mv, 18, 3, generator=source, deflate=run, dtype=torch.float32)
    assert float(moments.row_norm.high.max() - moments.row_norm.low.max()) <= 1e-3
    truth = truths(matrix.double())
    for kind in KINDS:
        result = getattr(moments, kind)
        assert ((number(result.low) <= truth[kind]) & (truth[kind] <= result.high)).all()


def test_the_basis_costs_no_product(symmetric):
    matrix = symmetric(SPREAD)
    run = krylov(matrix, 6)
    product = CountedMatvec(matrix.mv)
    moments = hutchinson(product, 24, 5, generator=generator(0), deflate=run)
    assert moments.matvecs == product.count == 5


def test_products_see_nothing_of_the_basis(symmetric):
    matrix = symmetric(SPREAD)
    run = krylov(matrix, 12)
    shares = []

    def watched(vector):
        shares.append(float((run.basis @ vector).abs().max()))
        return matrix.mv(vector)

    hutchinson(watched, 24, 5, generator=generator(0), deflate=run)
    assert max(shares) <= 20 * EPS


def test_a_full_basis_leaves_nothing_of_a_probe(symmetric):
    matrix = symmetric(SPREAD)
    sizes = []

    def watched(vector):
        sizes.append(float(torch.linalg.vector_norm(vector)))
        return matrix.mv(vector)

    hutchinson(watched, 24, 5, generator=generator(0), deflate=krylov(matrix, 24))
    assert max(sizes) <= 100 * EPS * EPS * 24


@pytest.mark.parametrize("asked", [1, 2, 5])
def test_stop_ends_the_probes_after_the_second_at_the_earliest(symmetric, asked):
    matrix = symmetric(INDEFINITE)
    calls = []

    def stop():
        calls.append(None)
        return len(calls) == asked

    product = CountedMatvec(matrix.mv)
    moments = hutchinson(product, 24, 20, generator=generator(0), stop=stop)
    assert moments.matvecs == product.count == asked + 1
    fewer = hutchinson(matrix.mv, 24, asked + 1, generator=generator(0))
    assert moments.trace == fewer.trace
    assert torch.equal(moments.row_norm.high, fewer.row_norm.high)
    assert torch.equal(moments.diagonal.low, fewer.diagonal.low)


def test_a_run_that_does_not_fit_is_refused(symmetric):
    matrix = symmetric(SPREAD)
    options = {"generator": generator(0), "deflate": krylov(matrix, 3)}
    with pytest.raises(ValueError, match="choose 'gaussian', or deflate nothing"):
        hutchinson(matrix.mv, 24, 3, distribution="rademacher", **options)
    with pytest.raises(ValueError, match="acts on 24 numbers, the operator on 23"):
        hutchinson(matrix.mv, 23, 3, **options)
    with pytest.raises(ValueError, match=r"draw them in that of the run"):
        hutchinson(matrix.mv, 24, 3, dtype=torch.float32, **options)
