"""An analysis that ends early: what is kept, and what the same call does with it."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import hessdiag.block_hessian
import hessdiag.resume
import sample_runs
from hessdiag import Task, open_run
from hessdiag import analyze as analyze_all
from hessdiag.errors import OutOfResources, StoreError
from hessdiag.finished import still_good
from hessdiag.opened import Opened
from hessdiag.options import Options
from hessdiag.run import BlockResult, VariantResult
from hessdiag.solve import Solved
from hessdiag.solve.problem import CUT_SHORT
from hessdiag.store import atomic, journal, read_run
from hessdiag.store.parts import Finished
from hessdiag.tables import summary_table

ORDER = ["whole", "0", "2"]


def analyze(task, **options):
    """Of raw alone, so that a row is a block."""
    return analyze_all(task, **{"variants": "raw"} | options)


def build() -> Task:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)]
        inputs = torch.randn(14, 3)
    return Task(nn.Sequential(*layers), [(inputs, inputs[:, :2].sin())], nn.MSELoss())


@pytest.fixture
def task() -> Task:
    return build()


@pytest.fixture(scope="module")
def undisturbed():
    """The run in one piece, and the Hessian's eigenvalues by torch's own dense route."""
    run, task = analyze(build()), build()
    net = task.model.double()
    inputs, targets = (part.double() for part in task.data[0])
    shapes = {name: p.shape for name, p in net.named_parameters()}

    def loss(flat):
        pieces = flat.split([s.numel() for s in shapes.values()])
        named = {n: p.view(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        return task.loss(torch.func.functional_call(net, named, (inputs,)), targets)

    start = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    dense = torch.autograd.functional.hessian(loss, start)
    found = run["whole"].variants["raw"].spectrum["eigenvalue"]
    np.testing.assert_allclose(found, torch.linalg.eigvalsh(dense).numpy(), atol=1e-14)
    return run


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


@pytest.fixture
def folder(path):
    return path.with_name("run.h5.parts")


def quiet(run):
    """The run without what may differ between two processes."""
    blocks = tuple(
        replace(b, variants={v: timeless(result) for v, result in b.variants.items()})
        for b in run.blocks
    )
    return replace(run, blocks=blocks, provenance=None, created_at="")


def timeless(result):
    return replace(result, values=dict(result.values) | {"seconds": 0.0})


def same(one, other):
    assert sample_runs.differences(quiet(one), quiet(other)) == []
    ignored = {"seconds", "symmetry_products"}  # of the process that computed
    for run in (one, other):
        ignored |= set(run.provenance.environment) - set(other.provenance.environment)
    for name in set(other.provenance.environment) - ignored:
        ours, theirs = (run.provenance.environment[name] for run in (one, other))
        assert ours == theirs, name


class Solving:
    """Stands in for ``Opened.solve``: counts, and does something at one block."""

    def __init__(self, monkeypatch, **at):
        self.calls, self.at, self.solve = [], at, Opened.solve
        monkeypatch.setattr(Opened, "solve", lambda opened: self(opened))

    def __call__(self, opened):
        self.calls.append(opened.block.name)
        act = self.at.get(f"b{opened.block.name}")
        solved = self.solve(opened)
        return act(opened.network, solved) if act else solved


def interrupt(*_):
    raise KeyboardInterrupt


def break_down(*_):
    raise RuntimeError("device lost")


def end_of_time(network, solved):
    network.deadline = 0.0
    return solved


def cut_short(_network, solved):
    found, products = solved
    return Solved(found.values | {"notes": [CUT_SHORT]}, found.spectrum, found.rows), products


@pytest.mark.parametrize("last", [0, 1, 2])
def test_an_interrupted_analysis_keeps_its_blocks_and_the_same_call_does_the_rest(
    last, task, undisturbed, path, folder, monkeypatch
):
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    with monkeypatch.context() as first:
        Solving(first, **{f"b{ORDER[last]}": interrupt})
        with pytest.raises(KeyboardInterrupt) as stopped:
            analyze(task, output=path)
    assert not path.exists()
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    if last:
        verb = "is" if last == 1 else "are"
        assert stopped.value.__notes__ == [
            f"{last} of 3 blocks {verb} finished and kept in {folder}; the same command resumes"
        ]
        assert {b.name for b in open_run(path).blocks} == set(ORDER[:last])
    else:
        assert not hasattr(stopped.value, "__notes__")
        assert not folder.exists()
    events = []
    solving = Solving(monkeypatch)
    run = analyze(task, output=path, report=events.append)
    assert solving.calls == ORDER[last:]
    resumed = [e.message for e in events if "resuming" in e.message]
    assert resumed == ([f"resuming: {last} of 3 blocks were finished"] if last else [])
    same(run, undisturbed)
    assert sample_runs.differences(run, read_run(path)) == []
    assert [p.name for p in path.parent.iterdir()] == ["run.h5"]


def test_an_interrupt_at_any_write_loses_no_finished_block(task, undisturbed, path, folder):
    """At every flush of a file or a folder: of header, matrix, parts and the run itself."""
    fsync, kept, at = os.fsync, 0, 0

    def stop_at(count):
        left = [count]

        def flush(descriptor):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            fsync(descriptor)

        return flush

    while True:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(atomic.os, "fsync", stop_at((0, 3, 1, 2)[at % 4]))
            try:
                run = analyze(task, output=path)
                break
            except KeyboardInterrupt:
                pass
        parts = list(folder.glob("block-*")) if folder.exists() else []
        assert path.exists() or len(parts) >= kept
        assert not list(path.parent.rglob("*.tmp"))
        kept, at = len(parts), at + 1
        assert at < 60
    same(run, undisturbed)
    assert at > 3
    assert [p.name for p in path.parent.iterdir()] == ["run.h5"]


def test_a_run_that_was_moved_but_not_tidied_is_reprinted_and_tidied(
    task, undisturbed, path, folder, monkeypatch
):
    write_run = journal.write_run

    def moved(*args, **kwargs):
        write_run(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(journal, "write_run", moved)
        with pytest.raises(KeyboardInterrupt):
            analyze(task, output=path)
    assert len(list(folder.iterdir())) == 6
    monkeypatch.setattr("hessdiag.analysis.run_selfchecks", lambda *a, **k: pytest.fail("worked"))
    same(analyze(task, output=path), undisturbed)
    assert [p.name for p in path.parent.iterdir()] == ["run.h5"]


def test_only_what_failed_is_done_again_from_the_kept_matrix(
    task, undisturbed, path, folder, monkeypatch
):
    with monkeypatch.context() as first:
        Solving(first, b2=break_down)
        run = analyze(task, output=path)
    assert run.provenance.environment["failed"] == ["2"]
    assert "device lost" in run["2"].variants["raw"]["skipped"]
    assert sorted(p.name for p in folder.iterdir()) == ["header", "lock", "whole-matrix"]
    solving = Solving(monkeypatch)
    again = analyze(task, output=path)
    assert solving.calls == ["2"]
    same(again, undisturbed)
    assert again["2"].variants["raw"]["products"] == 0
    assert [p.name for p in path.parent.iterdir()] == ["run.h5"]


def test_what_failed_is_done_again_without_the_folder_too(task, path, folder, monkeypatch):
    with monkeypatch.context() as first:
        Solving(first, b2=break_down)
        analyze(task, output=path)
    for part in folder.iterdir():
        part.unlink()
    folder.rmdir()
    solving = Solving(monkeypatch)
    again = analyze(task, output=path)
    assert solving.calls == ["2"]
    assert again["2"].variants["raw"]["products"] == 10  # assembled by itself
    assert not folder.exists()


def test_an_interrupted_repair_keeps_what_both_files_hold(
    task, undisturbed, path, folder, monkeypatch
):
    with monkeypatch.context() as first:
        Solving(first, b0=break_down, b2=break_down)
        analyze(task, output=path)
    with monkeypatch.context() as second:
        Solving(second, b2=interrupt)
        with pytest.raises(KeyboardInterrupt) as stopped:
            analyze(task, output=path)
    assert "2 of 3 blocks are finished" in stopped.value.__notes__[0]
    solving = Solving(monkeypatch)
    same(analyze(task, output=path), undisturbed)
    assert solving.calls == ["2"]


def test_blocks_that_time_did_not_reach_are_rows_that_say_so_and_are_done_later(
    task, undisturbed, path, monkeypatch
):
    with monkeypatch.context() as first:
        Solving(first, bwhole=end_of_time)
        run = analyze(task, output=path, max_seconds=1e6)
    assert run.provenance.environment["failed"] == ["0", "2", "H_e of the network"]
    assert any("H_e of the network" in warning for warning in run.provenance.warnings)
    for name in ("0", "2"):
        found = run[name].variants["raw"]
        assert found["skipped"] == "not begun within --max-seconds 1e+06"
        assert found["kappa"].status is None
    assert "not begun within --max-seconds" in summary_table(run)
    solving = Solving(monkeypatch)
    same(analyze(task, output=path, max_seconds=2e6), undisturbed)
    assert solving.calls == ["0", "2"]


def test_no_time_at_all_begins_no_block_and_never_loses_one(task, undisturbed, path, folder):
    run = analyze(task, output=path, max_seconds=0)
    assert run.provenance.environment["failed"] == [*ORDER, "H_e of the network"]
    assert not folder.exists()
    same(analyze(task, output=path), undisturbed)
    reprinted = analyze(task, output=path, max_seconds=0)
    same(reprinted, undisturbed)


def test_without_max_seconds_there_is_no_deadline(task, monkeypatch):
    seen = []
    solve = Opened.solve

    def watched(opened):
        seen.append(opened.network.deadline)
        return solve(opened)

    monkeypatch.setattr(Opened, "solve", watched)
    analyze(task, blocks="2")
    analyze(task, blocks="2", max_seconds=1000)
    assert seen[0] is None
    assert seen[1] > 0


@pytest.mark.parametrize(
    ("then", "now", "good"),
    [(5, None, False), (5, 6, False), (5, 5, True), (5, 4, True), (None, 5, False)],
)
def test_a_row_that_time_cut_short_is_good_for_a_call_that_allows_no_more(then, now, good):
    for notes, expected in (([CUT_SHORT, "another"], good), (["another"], True)):
        result = VariantResult(sample_runs.values(notes=notes))
        done = Finished(BlockResult("2", (), {"raw": result}), "raw", None, 0.0, then)
        assert still_good(done, Options(max_seconds=now)) is expected


@pytest.mark.parametrize("ended", [True, False])
def test_a_row_that_time_cut_short_is_done_again_from_the_run_and_from_its_parts(
    ended, task, path, monkeypatch
):
    def limited(seconds, **at):
        with monkeypatch.context() as patch:
            patch.setattr("hessdiag.network.time.monotonic", lambda: 0.0)
            solving = Solving(patch, **at)
            try:
                run = analyze(task, output=path, blocks="0,2", max_seconds=seconds)
            except KeyboardInterrupt:
                return None, solving.calls
            return run, solving.calls

    first, _ = limited(5, b0=cut_short, b2=(lambda _, s: s) if ended else interrupt)
    assert (first is None) is not ended
    again, calls = limited(4)
    assert calls == ([] if ended else ["2"])
    assert CUT_SHORT in again["0"].variants["raw"]["notes"]
    longer, calls = limited(None)
    assert calls == ["0"]
    assert CUT_SHORT not in longer["0"].variants["raw"]["notes"]


def test_another_analysis_is_refused_by_field_and_touches_nothing(task, path, folder, monkeypatch):
    with monkeypatch.context() as first:
        Solving(first, b2=interrupt)
        with pytest.raises(KeyboardInterrupt):
            analyze(task, output=path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(StoreError, match=r"run\.h5\.parts holds another analysis: seed differs"):
        analyze(task, output=path, seed=1)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    solving = Solving(monkeypatch)
    assert analyze(task, output=path, seed=1, force=True).provenance.config["seed"] == 1
    assert solving.calls == ORDER
    assert not folder.exists()


def test_an_interrupted_overwrite_leaves_the_old_run_and_the_same_call_resumes(
    task, path, folder, monkeypatch
):
    analyze(task, output=path)
    before = path.read_bytes()
    with monkeypatch.context() as second:
        Solving(second, b2=interrupt)
        with pytest.raises(KeyboardInterrupt):
            analyze(task, output=path, seed=1, force=True)
    assert path.read_bytes() == before
    analyze(task, output=path)  # the old run, reprinted
    assert len(list(folder.glob("block-*"))) == 2
    solving = Solving(monkeypatch)
    assert analyze(task, output=path, seed=1, force=True).provenance.config["seed"] == 1
    assert solving.calls == ["2"]
    assert not folder.exists()


def test_two_analyses_of_one_output_are_one_analysis_and_one_error(
    task, undisturbed, path, monkeypatch
):
    errors, other = [], build()

    def another(_network, solved):
        with pytest.raises(StoreError, match="another hessdiag is analysing into") as refused:
            analyze(other, output=path, force=True)
        errors.append(refused.value)
        return solved

    Solving(monkeypatch, b2=another)
    same(analyze(task, output=path), undisturbed)
    assert len(errors) == 1


def test_a_twin_that_finishes_first_gives_the_run(task, undisturbed, path, monkeypatch):
    opened, other = hessdiag.resume.open_journal, build()

    def late(*args, **kwargs):
        with monkeypatch.context() as twin:
            twin.setattr(hessdiag.resume, "open_journal", opened)
            analyze(other, output=path)
        return opened(*args, **kwargs)

    monkeypatch.setattr(hessdiag.resume, "open_journal", late)
    same(analyze(task, output=path), undisturbed)
    assert [p.name for p in path.parent.iterdir()] == ["run.h5"]


@pytest.mark.parametrize("at", [1, 3, 5, 6])
def test_a_full_disk_ends_the_analysis_and_keeps_what_is_finished(
    at, task, undisturbed, path, folder, monkeypatch
):
    """Header, matrix, whole, 0, 2, run: the files in the order of their flushes."""
    fsync, flushed = os.fsync, []

    def flush(descriptor):
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            flushed.append(descriptor)
            if len(flushed) >= at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as full:
        full.setattr(atomic.os, "fsync", flush)
        with pytest.raises(OutOfResources, match="no room for") as stopped:
            analyze(task, output=path)
    finished = max(0, at - 3)
    assert len(list(folder.glob("block-*"))) == finished
    if finished:
        assert f"{finished} of 3 blocks" in stopped.value.__notes__[0]
        assert "the same command resumes" in stopped.value.__notes__[0]
    assert not path.exists()
    same(analyze(task, output=path), undisturbed)


def test_nothing_is_written_where_no_output_is_asked_for(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Solving(monkeypatch, b2=interrupt)
    with pytest.raises(KeyboardInterrupt) as stopped:
        analyze(task)
    assert not hasattr(stopped.value, "__notes__")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 251, "x" * 4000])
def test_a_name_that_no_file_can_have_is_one_error(name, task, tmp_path):
    with pytest.raises(StoreError, match=r"-o/--output"):
        analyze(task, output=tmp_path / name, blocks="2")
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_of_the_parts_is_refused_before_any_work(task, path, folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    task = replace(task, loss=lambda *_: pytest.fail("worked"))
    with pytest.raises(StoreError, match="is not a folder of hessdiag"):
        analyze(task, output=path, force=True)
    assert (folder / "thesis.tex").read_text() == "mine"


def test_a_half_ratio_that_fails_is_a_note_of_its_row_and_costs_no_number(
    task, undisturbed, monkeypatch
):
    monkeypatch.setattr("hessdiag.rows.half_ratio", break_down)
    run = analyze(task)
    for block in run.blocks:
        found = block.variants["raw"]
        assert found["half_ratio"].status == "unresolved"
        assert "its half_ratio failed: device lost" in found["notes"]
        assert found["kappa"] == undisturbed[block.name].variants["raw"]["kappa"]


@pytest.mark.parametrize(("examples", "status"), [(8, "unresolved"), (None, None)])
def test_a_row_that_time_cut_short_takes_no_more_products_for_the_ratio_of_its_halves(
    examples, status, task, monkeypatch
):
    Solving(monkeypatch, b2=cut_short)
    monkeypatch.setattr("hessdiag.rows.half_ratio", lambda *_: pytest.fail("took more time"))
    run = analyze(task, blocks="2", max_examples=examples)
    assert run["2"].variants["raw"]["half_ratio"].status == status


def test_rows_of_a_changed_network_are_the_same_after_an_interruption(task, path, monkeypatch):
    variants = "raw,bn,bn+jacobi"
    undisturbed = analyze_all(build(), variants=variants)
    with monkeypatch.context() as first:
        seen = []

        def second(opened):
            seen.append(opened.row.name)
            if seen[-1] == "0 [bn]":
                raise KeyboardInterrupt
            return solve(opened)

        solve = Opened.solve
        first.setattr(Opened, "solve", second)
        with pytest.raises(KeyboardInterrupt):
            analyze_all(task, variants=variants, output=path)
    assert "whole [bn]" in seen
    resumed = analyze_all(task, variants=variants, output=path)
    assert sample_runs.differences(quiet(resumed), quiet(undisturbed)) == []


def test_what_does_not_apply_is_kept_too_and_a_resumed_run_assembles_nothing_again(
    path, monkeypatch
):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)]
    task = Task(nn.Sequential(*layers), build().data, nn.MSELoss())
    options = {"blocks": "0,2", "output": path, "variants": "raw,bnp"}
    with monkeypatch.context() as first:
        Solving(first, b2=interrupt)
        with pytest.raises(KeyboardInterrupt):
            analyze_all(task, **options)
    assembled = []
    made = hessdiag.block_hessian.assemble

    def counted(product, size, **kind):
        assembled.append(size)
        return made(product, size, **kind)

    monkeypatch.setattr(hessdiag.block_hessian, "assemble", counted)
    run = analyze_all(task, **options)
    assert assembled == [8]
    assert "no bias" in run["0"].variants["bnp"]["skipped"]


def test_a_change_that_memory_did_not_allow_is_tried_again_with_another_budget(task, path):
    options = {"variants": "raw,bn", "blocks": "2", "output": path}
    small = analyze_all(task, memory_budget=1000, **options)
    assert "raise --memory-budget" in small["2"].variants["bn"]["skipped"]
    again = analyze_all(task, memory_budget=1000, **options)
    assert again["2"].variants["bn"]["skipped"] is not None
    large = analyze_all(task, memory_budget="4G", **options)
    assert large["2"].variants["bn"]["skipped"] is None


def test_h_e_that_fails_is_a_warning_and_costs_no_row(task, monkeypatch):
    def broken(*_, **__):
        raise ArithmeticError("no QR")

    monkeypatch.setattr("hessdiag.explained.explain_layers", broken)
    run = analyze_all(task, variants="raw,bn")
    assert all(r["skipped"] is None for r in run["2"].variants.values())
    assert "H_e of bn is not complete: failed: ArithmeticError: no QR" in run.provenance.warnings
    assert run.hidden == {}


def test_replayed_gradients_make_the_cut_of_the_data_part_of_the_analysis(task, path):
    inputs, targets = task.data[0]
    halves = replace(task, data=[(inputs[:7], targets[:7]), (inputs[7:], targets[7:])])
    analyze_all(task, variants="raw,adam", output=path)
    with pytest.raises(StoreError, match="batches"):
        analyze_all(halves, variants="raw,adam", output=path)
    other = path.with_name("other.h5")
    analyze(task, output=other)
    same(analyze(halves, output=other), open_run(other))


def test_a_full_disk_ends_the_rows_of_a_changed_network_as_any_other(task, path, monkeypatch):
    add = journal.Journal.add

    def full(self, done):
        if done.variant == "bn":
            raise OutOfResources("no space left")
        add(self, done)

    monkeypatch.setattr(journal.Journal, "add", full)
    with pytest.raises(OutOfResources, match="no space left"):
        analyze_all(task, variants="raw,bn", blocks="2", output=path)
