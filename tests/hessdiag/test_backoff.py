"""Memory that runs out: a row does with less, one step after the other, and says so."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import sample_networks
from hessdiag import Task, analyze
from hessdiag.blocks import find_blocks
from hessdiag.curvature.engines import BUILD
from hessdiag.data import row_count
from hessdiag.microbatches import cut, most_rows, rows_that_fit, why_not_cut
from hessdiag.options import make_options
from hessdiag.relief import Relief

DOUBLE = torch.float64
WORDS = "can't allocate memory"


def full():
    """What torch raises on the CPU."""
    return RuntimeError(f"DefaultCPUAllocator: {WORDS}: you tried to allocate 1 bytes")


def task(rows=8, batches=2, hidden=3):
    seeded = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded, dtype=DOUBLE))
    data = [
        tuple(torch.randn(rows, 2, generator=seeded, dtype=DOUBLE) for _ in range(2))
        for _ in range(batches)
    ]
    return Task(model, data, lambda m, b: F.mse_loss(m(b[0]), b[1]))


def rows_of(batch):
    return float(len(batch[0]))


@contextmanager
def lent(task, units=rows_of):
    """The objective of a task and its parameters, its batches counted by ``units``."""
    with sample_networks.lent(task) as (objective, named):
        yield replace(objective, units=units), named


@pytest.fixture
def short(monkeypatch):
    """Makes products of rows, not those of the self-checks, lack memory as told."""
    state = {"rows": 10**9, "on": False}
    build = BUILD["hessian"]

    def product(objective, batch, parameters):
        if state["on"] and row_count(batch) > state["rows"]:
            raise full()
        return build(objective, batch, parameters)

    monkeypatch.setitem(BUILD, "hessian", product)
    import hessdiag.rows

    begin = hessdiag.rows.begin_with

    def begun(*args):
        begin(*args)
        state["on"] = True

    monkeypatch.setattr("hessdiag.rows.begin_with", begun)
    return state


def test_a_batch_that_lacks_memory_is_halved_until_it_fits(short):
    plain = analyze(task(), blocks="whole", exact_limit=100)["whole"].variants["raw"]
    short["on"], short["rows"] = False, 2
    told = []
    run = analyze(
        task(), blocks="whole", exact_limit=100, report=lambda event: told.append(event.message)
    )
    found = run["whole"].variants["raw"]
    note = "out of memory: batches of up to 8 rows are cut into 4 micro-batches"
    assert found["skipped"] is None
    assert [n for n in found["notes"] if "memory" in n] == [
        "out of memory: no graphs are kept, so that products take longer",
        note,
    ]
    assert note in told
    assert found["lambda_max"].value == pytest.approx(plain["lambda_max"].value, rel=1e-12)
    assert found["trace"].value == pytest.approx(plain["trace"].value, rel=1e-12)


@pytest.mark.slow
def test_a_batch_of_which_not_one_row_fits_fails_its_row_and_no_other(short):
    short["rows"] = 0
    run = analyze(task(), blocks=["0", "2"], exact_limit=100)
    assert "out of memory" in run["0"].variants["raw"]["skipped"]
    short["on"], short["rows"] = False, 10**9
    run = analyze(task(), blocks=["0", "2"], exact_limit=100)
    assert run["2"].variants["raw"]["skipped"] is None


def test_graphs_that_do_not_fit_together_are_made_again_for_each_product(monkeypatch):
    def kept(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("hessdiag.curvature.engines.choice.Kept", kept)
    run = analyze(task(), blocks="whole", engine="kept")
    found = run["whole"].variants["raw"]
    assert found["skipped"] is None
    assert any("no graphs are kept" in note for note in found["notes"])
    assert run.provenance.environment["engine"]["whole"] == "recompute"


def test_a_block_that_cannot_be_solved_densely_gets_bounds_and_its_variants_too(monkeypatch):
    exact = analyze(task(), blocks="whole", engine="recompute")["whole"].variants["raw"]

    def solve(*_args, **_kwargs):
        raise full()

    monkeypatch.setattr("hessdiag.opened.solve_exact", solve)
    run = analyze(
        task(), blocks="whole", variants=["raw", "jacobi"], engine="recompute", exact_limit=100
    )
    for name in ("raw", "jacobi"):
        found = run["whole"].variants[name]
        assert found["skipped"] is None, name
        assert found["method"] == "lanczos"
        assert any("the block is not assembled" in note for note in found["notes"])
    top = run["whole"].variants["raw"]["lambda_max"]
    assert top.low <= exact["lambda_max"].value <= top.high
    assert top.status == "interval"


@pytest.mark.parametrize(
    ("fails", "method", "words"),
    [
        (lambda dtype: dtype == DOUBLE, "lanczos", "the Krylov basis is kept in float32"),
        (lambda dtype: True, "power", "power iteration, which keeps no Krylov basis"),
    ],
)
def test_a_basis_that_cannot_be_had_is_kept_in_float32_or_not_at_all(
    monkeypatch, fails, method, words
):
    from hessdiag_probes.basis import Basis

    whole = analyze(task(), blocks="whole")["whole"].variants["raw"]
    empty = Basis.empty

    def short(capacity, like, storage):
        if fails(storage.dtype or like.dtype):
            raise full()
        return empty(capacity, like, storage)

    monkeypatch.setattr(Basis, "empty", short)
    run = analyze(task(), blocks="whole", exact_limit=0, engine="recompute")
    found = run["whole"].variants["raw"]
    assert found["method"] == method
    assert sum(words in note for note in found["notes"]) == 1
    assert any("the forecast is left out: out of memory" in note for note in found["notes"])
    assert found["lambda_max"].low <= whole["lambda_max"].value <= found["lambda_max"].high


def test_a_row_that_was_not_assembled_is_resumed_as_it_was(tmp_path, monkeypatch):
    def solve(*_args, **_kwargs):
        raise full()

    output = tmp_path / "run.h5"
    options = {
        "blocks": "whole",
        "variants": ["raw", "jacobi"],
        "engine": "recompute",
        "exact_limit": 100,
    }
    import hessdiag.rows

    view = hessdiag.rows.Rows._viewed
    with monkeypatch.context() as patched:
        patched.setattr("hessdiag.opened.solve_exact", solve)

        def interrupted(self, opened, variant, own):
            raise KeyboardInterrupt

        patched.setattr(hessdiag.rows.Rows, "_viewed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            analyze(task(), output=output, **options)
        patched.setattr(hessdiag.rows.Rows, "_viewed", view)
        at_once = analyze(task(), **options)["whole"].variants["jacobi"]
    resumed = analyze(task(), output=output, **options)["whole"].variants["jacobi"]
    assert resumed["method"] == at_once["method"] == "lanczos"
    for field in ("lambda_max", "lambda_min", "trace"):
        for end in ("value", "low", "high"):
            right = getattr(at_once[field], end)
            assert getattr(resumed[field], end) == pytest.approx(right, rel=1e-11), field
    assert any("the block is not assembled" in note for note in resumed["notes"])


def test_a_later_block_has_all_that_memory_allows_again(monkeypatch):
    seen = []

    def solve(matrix, problem):
        seen.append(problem.name)
        if problem.name == "0":
            raise full()
        return solved(matrix, problem)

    from hessdiag.opened import solve_exact as solved

    monkeypatch.setattr("hessdiag.opened.solve_exact", solve)
    run = analyze(task(), blocks=["0", "2"], engine="recompute")
    assert run["0"].variants["raw"]["method"] == "lanczos"
    assert run["2"].variants["raw"]["method"] == "exact"
    assert not any("memory" in note for note in run["2"].variants["raw"]["notes"])


def test_what_is_no_lack_of_memory_is_not_tried_again(monkeypatch):
    tried = []

    def solve(*_args, **_kwargs):
        tried.append(1)
        raise RuntimeError("something else")

    monkeypatch.setattr("hessdiag.opened.solve_exact", solve)
    found = analyze(task(), blocks="whole")["whole"].variants["raw"]
    assert "something else" in found["skipped"]
    assert len(tried) == 1


def test_batches_are_cut_before_memory_runs_out():
    told = []
    run = analyze(
        task(rows=64, hidden=8),
        blocks="whole",
        memory_budget=8_000,
        report=lambda event: told.append(event.message),
    )
    plain = analyze(task(rows=64, hidden=8), blocks="whole")["whole"].variants["raw"]
    found = run["whole"].variants["raw"]
    notes = [note for note in found["notes"] if "micro-batches" in note]
    assert len(notes) == 1
    assert notes[0].startswith("memory: batches of up to 64 rows are cut into ")
    assert notes[0].endswith("micro-batches to fit --memory-budget")
    assert notes[0] in told
    assert found["lambda_max"].value == pytest.approx(plain["lambda_max"].value, rel=1e-12)


def test_rows_that_fit_hold_what_their_graphs_take():
    from hessdiag.curvature.engines import graph_bytes

    with lent(task(rows=64, hidden=8)) as (objective, named):
        parameters = list(named.values())
        whole = graph_bytes(cut(objective, 64), parameters, BUILD["hessian"]) // 2
        rows = rows_that_fit(objective, parameters, "hessian", whole // 3)
        parts = cut(objective, rows)
        assert 10 < rows < 22
        assert most_rows(parts) <= rows
        assert rows_that_fit(objective, parameters, "hessian", 10**9) == 64


def test_cut_batches_weigh_by_what_they_count():
    """A row of 3 targets beside one of 1: a mean of means would be off by a lot."""
    targets = torch.tensor([[0, 1, 1], [1, -100, -100], [-100, -100, -100], [0, 0, -100]])
    inputs = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    model = nn.Linear(2, 2).double()

    def loss(m, batch):
        return F.cross_entropy(m(batch[0]).flatten(0, 1), batch[1].flatten())

    def units(batch):
        return float((batch[1] != -100).sum())

    ragged = Task(model, [(inputs, targets), (inputs[:2], targets[:2])], loss, batch_size=units)
    with lent(ragged, units) as (objective, named):
        parts = cut(objective, 1)
        assert len(parts.batches.items) == 5  # the row without any target is left out
        assert [round(share * 10) for share in parts.batches.shares] == [3, 1, 2, 3, 1]
        parameters = list(named.values())
        whole, pieces = (o.gradient(parameters) for o in (objective, parts))
        assert (whole - pieces).norm() <= 1e-14 * whole.norm()
        assert why_not_cut(objective) is None


def test_batches_with_batch_statistics_stay_whole():
    norm = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    data = [tuple(torch.randn(8, 2, dtype=DOUBLE) for _ in range(2))]

    def mse(m, batch):
        return F.mse_loss(m(batch[0]), batch[1])

    for model, loss, mode, words in (
        (norm, mse, "train", "BatchNorm takes its statistics over a batch"),
        (norm, mse, "eval", None),
    ):
        with lent(Task(model, data, loss, mode=mode)) as (objective, _):
            found = why_not_cut(objective)
        assert (found is None) == (words is None), words
        assert words is None or words in found


def test_the_relief_of_a_network_leaves_its_data_alone():
    from hessdiag.backoff import relieve
    from hessdiag.network import Network

    block = find_blocks(task().model, ("whole",))[0]
    with lent(task()) as (objective, _):
        network = Network(objective, make_options(), lambda _: None)
        relieve(network, Relief(rows=3, notes=("cut",)))
        assert network.given is objective
        assert most_rows(network.objective) == 3
        assert network.is_exact(block)
        relieve(network, Relief(matrix_free=True))
        assert network.objective is objective
        assert not network.is_exact(block)


LIMITED = """
import resource, sys, torch
from torch import nn
from hessdiag import Task, analyze
torch.set_num_threads(1)
class Flat(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.p = nn.Parameter(torch.ones(n, dtype=torch.float64))
        self.register_buffer("d", torch.linspace(1, 2, n, dtype=torch.float64))
task = Task(Flat(300_000), [torch.zeros(1, 1)], lambda m, _: 0.5 * (m.d * m.p * m.p).sum())
analyze(task, blocks="whole", steps=5, probes=2)
with open("/proc/self/statm") as pages:
    now = int(pages.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 330 * 2**20, resource.RLIM_INFINITY))
found = analyze(task, blocks="whole", steps=150, probes=2, tolerance=1e-12)["whole"].variants["raw"]
top = found["lambda_max"]
print(found["skipped"], found["method"], top.value and top.low <= 2 <= top.high)
print(*found["notes"], sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_process_that_really_lacks_memory_goes_on_with_less():
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] in ("None lanczos True", "None power True")
    words = ("the Krylov basis is kept in float32", "power iteration, which keeps no Krylov basis")
    assert any(f"out of memory: {word}" in line for word in words for line in lines)
