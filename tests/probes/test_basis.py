"""Krylov bases that are kept elsewhere, in fewer digits, or in parts over several processes."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hessdiag_probes import (
    Basis,
    Breakdown,
    CountedMatvec,
    Share,
    Storage,
    gauss,
    generator,
    hutchinson,
    lanczos,
    sphere,
)

SINGLE = torch.float32
NARROW = Storage(dtype=SINGLE)
DRAWS = 1500
SLOW = pytest.mark.slow


def start(n, seed=0, dtype=torch.float64):
    return sphere(n, generator=generator(seed, "start"), dtype=dtype)


def test_a_basis_gives_back_what_was_put_in_rounded_to_what_it_keeps():
    vector, other = start(50, 1), start(50, 2)
    for storage, rounded in (
        (Storage(), vector),
        (NARROW, vector.to(SINGLE).double()),
        (Storage(device="cpu", share=Share(0, 50, lambda t: t, lambda t: t)), vector),
    ):
        basis = Basis.empty(3, vector, storage)
        basis.append(vector)
        basis.append(other)
        assert len(basis) == 2
        assert torch.equal(basis.vector(0), rounded)
        assert torch.equal(basis.dense()[0], rounded)
        assert basis.vector(0).dtype == basis.coefficients(other).dtype == torch.float64


def test_coefficients_of_a_narrow_basis_are_summed_in_float64(monkeypatch):
    monkeypatch.setattr("hessdiag_probes.basis.CONVERTED", 64)  # several parts
    vectors = [start(100, seed) for seed in range(3)]
    basis = Basis.empty(3, vectors[0], NARROW)
    for vector in vectors:
        basis.append(vector)
    rows = torch.stack([v.to(SINGLE).double() for v in vectors])
    probe = start(100, 9)
    assert (basis.coefficients(probe) - rows @ probe).abs().max() <= 1e-15
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [-5.0, 6.0]]).double()
    assert (basis.combination(weights) - rows.T @ weights).abs().max() <= 1e-15
    assert (basis.combination(weights[:, 0]) - rows.T @ weights[:, 0]).abs().max() <= 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_a_basis_in_too_few_digits_is_refused(dtype):
    with pytest.raises(ValueError, match="keep it in float64 or float32"):
        Basis.empty(1, start(3), Storage(dtype=dtype))


def test_a_share_that_is_no_part_of_the_vectors_is_refused():
    whole = Share(0, 4, lambda t: t, lambda t: t)
    with pytest.raises(ValueError, match=r"0\.\.4 is no part of vectors of 3"):
        Basis.empty(1, start(3), Storage(share=whole))


def test_the_identity_holds_by_as_much_as_was_measured(matrix, rounding):
    n = len(matrix)
    run = lanczos(matrix.mv, start(n), min(7, n), storage=NARROW)
    q, k = run.basis.T, len(run.diagonal)
    t = torch.diag(run.diagonal)
    t += torch.diag(run.offdiagonal, 1) + torch.diag(run.offdiagonal, -1)
    defect = matrix @ q - q @ t
    defect[:, -1] -= run.residual
    assert (defect.norm(dim=0).numpy() <= run.drift.columns + rounding).all()
    overlap = float((q.T @ q - torch.eye(k)).norm())
    assert overlap <= run.drift.overlap * (1 + 1e-6) + rounding
    assert overlap >= 0.9 * run.drift.overlap - rounding
    assert float((q[:, 0] - start(n)).norm()) == pytest.approx(run.drift.start, abs=1e-15)


def test_the_drift_is_of_the_size_of_the_rounding(symmetric):
    matrix = symmetric(torch.linspace(1, 24, 24, dtype=torch.float64))
    run = lanczos(matrix.mv, start(24), 7, storage=NARROW)
    eps = torch.finfo(SINGLE).eps
    assert 1e-3 * eps <= run.drift.columns.max() <= 20 * 24 * eps


@pytest.mark.parametrize("steps", [2, 7, 24])
def test_ritz_values_of_a_narrow_basis_are_as_close_as_their_bounds(
    matrix, spectrum, rounding, steps
):
    n = len(matrix)
    for seed in range(5):
        ritz = lanczos(matrix.mv, start(n, seed), min(steps, n), storage=NARROW).ritz()
        distance = (ritz.value[:, None] - spectrum).abs().amin(dim=1)
        assert (distance <= ritz.bound + rounding).all()
        reach = ritz.reach + rounding
        assert ritz.value[-1] <= spectrum.max() + reach
        assert ritz.value[0] >= spectrum.min() - reach


@pytest.mark.parametrize(
    ("steps", "draws"),
    [(3, 60), pytest.param(3, DRAWS, marks=SLOW), pytest.param(12, DRAWS, marks=SLOW)],
)
def test_the_outer_bounds_of_a_narrow_basis_miss_no_more_often_than_they_say(steps, draws):
    failure = 0.05
    spectrum = torch.cat([torch.logspace(-6, 0, 38), torch.tensor([3.0, 3.0 + 1e-5])]).double()
    missed = torch.zeros(2)
    for seed in range(draws):
        run = lanczos(lambda v: spectrum * v, start(40, seed), steps, storage=NARROW)
        low, high = run.ritz().ends(failure)
        missed += torch.tensor([low > spectrum.min() + 1e-14, high < spectrum.max() - 1e-14])
    assert (missed <= failure * draws + 4 * (failure * draws) ** 0.5).all()


def test_an_end_that_the_start_barely_sees_is_within_the_bounds_nevertheless():
    # The start's share at the end is 2e-6, of the size of what float32 makes of it.
    share = 2e-6
    spectrum = torch.tensor([1.0, 2.0, 4.0, 9.0, 10.0]).double()
    first = torch.tensor([0.5, 0.5, 0.5, 0.5, share]).double()
    run = lanczos(lambda v: spectrum * v, first, 4, storage=NARROW)
    from hessdiag_probes.polynomial import share as least

    failure = share / least(5, 0.5) * 0.5 * (1 - 1e-9)
    _, high = run.ritz().ends(failure)
    assert high >= 10.0


def test_the_bounds_of_a_narrow_basis_are_hardly_wider_where_steps_are_few(symmetric):
    matrix = symmetric(torch.linspace(1, 24, 24, dtype=torch.float64))
    wide = lanczos(matrix.mv, start(24), 8).ritz().ends(1e-3)
    narrow = lanczos(matrix.mv, start(24), 8, storage=NARROW).ritz().ends(1e-3)
    assert narrow == pytest.approx(wide, rel=1e-3)


def test_a_narrow_run_ends_where_no_more_is_to_be_learnt(symmetric):
    matrix = symmetric(torch.tensor([1, 1, 1, 2, 2, 5] * 10, dtype=torch.float64))
    run = lanczos(matrix.mv, start(60), 60, storage=NARROW)
    assert run.invariant
    assert run.matvecs < 40
    low, high = run.ritz().ends(1e-3)
    assert 1 - 1e-3 <= low <= 1.0 <= 5.0 <= high <= 5 + 1e-3


def test_float32_vectors_are_kept_as_they_are(symmetric):
    matrix = symmetric(torch.linspace(1, 24, 24, dtype=torch.float64)).to(SINGLE)
    plain = lanczos(matrix.mv, start(24, dtype=SINGLE), 7)
    narrow = lanczos(matrix.mv, start(24, dtype=SINGLE), 7, storage=NARROW)
    assert narrow.drift is None
    assert torch.equal(plain.diagonal, narrow.diagonal)


def test_no_quadrature_rule_is_made_of_a_rounded_basis(symmetric):
    run = lanczos(symmetric(torch.arange(1.0, 9.0)).double().mv, start(8), 3, storage=NARROW)
    with pytest.raises(ValueError, match="the run's basis was rounded"):
        gauss(run)


def test_deflation_by_a_rounded_basis_keeps_its_intervals():
    spectrum = torch.cat([torch.logspace(-5, 0, 50), torch.tensor([100.0, 1000.0])]).double()
    turn, _ = torch.linalg.qr(torch.randn(52, 52, generator=generator(0, "turn")).double())
    matrix = (turn * spectrum) @ turn.T
    missed = np.zeros(2)
    for seed in range(40):
        run = lanczos(matrix.mv, start(52, seed), 10, storage=NARROW)
        moments = hutchinson(
            matrix.mv, 52, 6, generator=generator(seed, "probes"), deflate=run, confidence=0.9
        )
        trace = moments.trace
        missed[0] += not trace.low <= float(spectrum.sum()) <= trace.high
        norms = matrix.norm(dim=1)
        inside = (moments.row_norm.low <= norms) & (norms <= moments.row_norm.high)
        missed[1] += 1 - float(inside.double().mean())
    assert (missed <= 0.1 * 40 + 4 * 4**0.5).all()
    exact = lanczos(matrix.mv, start(52), 52, storage=NARROW)
    full = hutchinson(matrix.mv, 52, 2, generator=generator(0, "probes"), deflate=exact)
    assert abs(full.trace.value - float(spectrum.sum())) <= 1e-3 * float(spectrum.sum())


class _Together:
    """Processes in lockstep: threads that meet in every call."""

    def __init__(self, ranks: int, size: int) -> None:
        self.ranks, self.size = ranks, size
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.parts: list[torch.Tensor | None] = [None] * ranks

    def meet(self, rank: int, part: torch.Tensor) -> list[torch.Tensor]:
        self.parts[rank] = part
        self.barrier.wait()
        found = [p.clone() for p in self.parts]
        self.barrier.wait()
        return found

    def share(self, rank: int) -> Share:
        first, last = (self.size * r // self.ranks for r in (rank, rank + 1))
        return Share(
            first,
            last,
            lambda part: torch.stack(self.meet(rank, part)).sum(dim=0),
            lambda part: torch.cat(self.meet(rank, part)),
        )


@pytest.mark.parametrize("dtype", [None, SINGLE])
def test_a_basis_in_parts_over_three_processes_gives_what_one_process_gives(matrix, dtype):
    n, ranks = len(matrix), 3
    together = _Together(ranks, n)
    steps = min(7, n)
    found: list[object] = [None] * ranks

    def work(rank: int) -> None:
        storage = Storage(dtype=dtype, share=together.share(rank))
        run = lanczos(matrix.mv, start(n), steps, storage=storage)
        moments = hutchinson(matrix.mv, n, 3, generator=generator(0, "probes"), deflate=run)
        found[rank] = run, run.vectors([0]), moments.trace.value, run.space.rows.shape

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = lanczos(matrix.mv, start(n), steps, storage=Storage(dtype=dtype))
    known = hutchinson(matrix.mv, n, 3, generator=generator(0, "probes"), deflate=alone)
    scale = float(matrix.abs().max())
    digits = 1e-12 if dtype is None else 1e-6
    assert sum(shape[1] for *_, shape in found) == n
    for run, vectors, trace, _ in found:
        assert torch.equal(run.diagonal, found[0][0].diagonal)
        assert torch.equal(run.residual, found[0][0].residual)
        assert abs(run.ritz().value[-1] - alone.ritz().value[-1]) <= digits * scale
        if dtype is None:
            assert len(run.diagonal) == len(alone.diagonal)
            assert (run.diagonal - alone.diagonal).abs().max() <= digits * scale
        assert vectors.shape == (n, 1)
        if dtype is None:
            assert trace == pytest.approx(known.trace.value, abs=n * digits * scale)


class _Looks(TorchDispatchMode):
    """Counts how often the host reads a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._local_scalar_dense:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_between_two_looks_no_number_leaves_the_device(symmetric):
    matrix = symmetric(torch.linspace(1, 24, 24, dtype=torch.float64))
    counts = {}
    for steps in (6, 21):
        with _Looks() as looks:
            lanczos(matrix.mv, start(24), steps, every=5)
        counts[steps] = looks.count
    # Those of the start; what a look reads is one table, not single numbers.
    assert counts[6] == counts[21] <= 4


def test_rare_looks_give_the_same_run(matrix):
    n = len(matrix)
    often = lanczos(matrix.mv, start(n), min(13, n), every=1)
    rarely = lanczos(matrix.mv, start(n), min(13, n), every=5)
    assert rarely.invariant == often.invariant
    assert rarely.matvecs <= often.matvecs + 4
    assert torch.equal(rarely.diagonal, often.diagonal)
    assert torch.equal(rarely.offdiagonal, often.offdiagonal)
    assert torch.equal(rarely.basis, often.basis)
    scale = 1e-14 * float(matrix.abs().max())
    assert (rarely.residual - often.residual).abs().max() <= scale
    assert rarely.ritz().ends(0.01) == pytest.approx(often.ritz().ends(0.01), abs=1e-13)


def test_convergence_is_found_at_the_next_look(symmetric):
    matrix = symmetric(torch.linspace(1, 24, 24, dtype=torch.float64))
    asked = []
    run = lanczos(
        matrix.mv,
        start(24),
        20,
        every=5,
        converged=lambda ritz: asked.append(len(ritz.value)) or len(ritz.value) >= 7,
    )
    assert asked == [5, 10]
    assert run.matvecs == len(run.diagonal) == 10


def test_an_infinite_product_is_found_at_the_next_look_and_counted_where_it_was():
    seen = []

    def broken(vector):
        seen.append(vector)
        image = vector * torch.linspace(1, 2, 30).double()
        return image * torch.inf if len(seen) == 3 else image

    with pytest.raises(Breakdown, match="product 3 of the operator is not finite"):
        lanczos(broken, start(30), 20, every=5)
    assert len(seen) == 5
    product = CountedMatvec(lambda v: v * torch.nan, every=3)
    product(torch.ones(2))
    product(torch.ones(2))
    with pytest.raises(Breakdown, match="one of products 1 to 3 of the operator"):
        product(torch.ones(2))
    product(torch.ones(2))
    with pytest.raises(Breakdown, match="product 4 of the operator"):
        product.look()
