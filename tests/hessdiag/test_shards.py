"""Shards of real analyses: together they are the analysis in one piece, to 1e-12."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import sample_networks
from hessdiag import Task, analyze, open_run
from hessdiag.errors import StoreError
from hessdiag.estimate import estimate
from hessdiag.merging import merge_runs
from hessdiag.opened import Opened
from hessdiag.store import validate_run
from hessdiag.tables import summary_table
from sharded_runs import COSTS, departures

EQUAL = 1e-12
SECONDS = frozenset({"seconds"})
MIXED = {"variants": "raw,bn,bnp", "exact_limit": 12}
"""Layers of 9 and 4 parameters are assembled; whole, of 13, and bn's, of more, are not."""


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    return Task(model, sample_networks.pairs(2, out=1, sizes=(6, 4)), sample_networks.mse)


def shards(folder, count, **options):
    """The files of all shards, computed backwards, for they know nothing of each other."""
    paths = [folder / f"{k}-of-{count}.h5" for k in range(1, count + 1)]
    for k, path in reversed([*enumerate(paths, 1)]):
        analyze(task(), output=path, shard=f"{k}/{count}", **options)
    return paths


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The unsharded run, and its four shards."""
    folder = tmp_path_factory.mktemp("mixed")
    options = MIXED | {"max_examples": 8}
    return analyze(task(), output=folder / "all.h5", **options), shards(folder, 4, **options)


def test_shards_are_the_analysis_in_one_piece(mixed):
    """Assembled and matrix-free, another network, the halves of a subset; more than the blocks."""
    run, paths = mixed
    names = [[block.name for block in open_run(path).blocks] for path in paths]
    assert sorted(itertools.chain(*names)) == ["0", "2", "whole"]
    assert [] in names
    for path, own in zip(paths, names, strict=True):
        explained = open_run(path).hidden.values()
        assert {layer.layer for layers in explained for layer in layers} == {*own} - {"whole"}
    merged = merge_runs(paths)
    assert departures(run, merged, EQUAL, SECONDS) == []
    assert merged.provenance.fingerprint == run.provenance.fingerprint
    assert merged.provenance.warnings == run.provenance.warnings
    assert set(merged.provenance.environment["engine"]) == set(run.provenance.environment["engine"])
    assert merged.provenance.environment["hidden"] == run.provenance.environment["hidden"]


def test_a_shard_is_a_valid_file_and_finished_when_it_is_repeated(mixed, monkeypatch):
    _, paths = mixed
    assert [validate_run(path) for path in paths] == [[], [], [], []]
    monkeypatch.setattr("hessdiag.analysis.run_selfchecks", lambda *a, **k: pytest.fail("worked"))
    again = analyze(task(), output=paths[0], shard="1/4", max_examples=8, **MIXED)
    assert again.to_dict() == open_run(paths[0]).to_dict()
    with pytest.raises(StoreError, match=r"holds another analysis: shard differs"):
        analyze(task(), output=paths[0], shard="2/4", max_examples=8, **MIXED)


def test_the_merged_file_is_the_finished_analysis(mixed, tmp_path, monkeypatch):
    _, paths = mixed
    merged = merge_runs(paths)
    merged.save(tmp_path / "run.h5")
    assert validate_run(tmp_path / "run.h5") == []
    monkeypatch.setattr("hessdiag.analysis.run_selfchecks", lambda *a, **k: pytest.fail("worked"))
    again = analyze(task(), output=tmp_path / "run.h5", max_examples=8, **MIXED)
    assert again.to_dict() == merged.to_dict()


@pytest.mark.slow
def test_layers_without_the_matrix_of_whole_have_the_same_numbers(tmp_path):
    """Whose products the rows took is all that differs: each layer is assembled on its own."""
    run = analyze(task(), variants="raw,bnp")
    merged = merge_runs(shards(tmp_path, 2, variants="raw,bnp"))
    for block in run.blocks:
        for variant, result in block.variants.items():
            other = merged[block.name].variants[variant]
            norm = result["lambda_max"].value
            for name in ("eigenvalue", "vector_value"):
                ours, theirs = result.spectrum[name], other.spectrum[name]
                assert abs(ours - theirs).max() <= EQUAL * norm
            for name in ("norm", "diagonal"):
                assert abs(result.rows[name] - other.rows[name]).max() <= EQUAL * norm
            for name in ("n_positive", "n_negative", "n_zero"):
                assert result[name].value == other[name].value
    assert summary_table(merged).splitlines()[0] == summary_table(run).splitlines()[0]


@pytest.mark.slow
def test_a_killed_shard_is_resumed_by_the_same_command(mixed, tmp_path, monkeypatch):
    run, paths = mixed
    names = [[block.name for block in open_run(path).blocks] for path in paths]
    position = names.index(["whole"])
    solve, calls = Opened.solve, []

    def killed(opened):
        calls.append(opened.network.changed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(opened)

    options = MIXED | {"max_examples": 8, "shard": f"{position + 1}/4"}
    with monkeypatch.context() as patch:
        patch.setattr(Opened, "solve", killed)
        with pytest.raises(KeyboardInterrupt) as stopped:
            analyze(task(), output=tmp_path / "shard.h5", **options)
    assert calls == [False, True]
    assert "of 3 rows are finished and kept" in stopped.value.__notes__[0]
    with pytest.raises(StoreError, match=r"shard.h5 is unfinished: 2 of 3 rows .*: `hessdiag"):
        merge_runs([tmp_path / "shard.h5", *paths])
    told = []
    analyze(task(), output=tmp_path / "shard.h5", report=told.append, **options)
    assert "resuming: 2 of 3 rows were finished" in [event.message for event in told]
    assert f"shard {position + 1}/4 holds 1 of 3 blocks" in " ".join(e.message for e in told)
    paths = [*paths[:position], tmp_path / "shard.h5", *paths[position + 1 :]]
    assert departures(run, merge_runs(paths), EQUAL, SECONDS) == []


@pytest.mark.slow
def test_cosines_and_a_failed_row_are_kept(tmp_path, monkeypatch):
    """The shard of whole has the cosines; a row that failed is computed after the merge."""
    given = task()
    for step in (1, 2):
        torch.save(
            {name: p + step / 10 for name, p in given.model.state_dict().items()},
            tmp_path / f"step-{step}.pt",
        )
    options = {"variants": "raw", "exact_limit": 12, "iterates": str(tmp_path / "step-*.pt")}
    run = analyze(task(), **options)
    solve = Opened.solve

    def failing(opened):
        if opened.block.name == "0":
            raise ValueError("too hot")
        return solve(opened)

    with monkeypatch.context() as patch:
        patch.setattr(Opened, "solve", failing)
        paths = shards(tmp_path, 2, **options)
    merged = merge_runs(paths)
    assert merged.provenance.environment["failed"] == ["0"]
    assert "too hot" in merged["0"].variants["raw"]["skipped"]
    merged.save(tmp_path / "run.h5")
    told = []
    again = analyze(task(), output=tmp_path / "run.h5", report=told.append, **options)
    assert "resuming: 2 of 3 blocks were finished" in [event.message for event in told]
    assert run.cosines
    assert departures(run, again, EQUAL, SECONDS) == []


def test_an_estimate_of_a_shard_is_of_the_blocks_that_it_computes(mixed):
    _, paths = mixed
    for number, path in enumerate(paths[:2], 1):
        cost = estimate(task(), shard=f"{number}/4", max_examples=8, **MIXED)
        assert [b.name for b in cost.blocks] == [b.name for b in open_run(path).blocks]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize(
    "options",
    [
        {"exact_limit": 0},
        {"exact_limit": 12, "density": True},
        {"exact_limit": 12, "blocks": "parameter"},
        {"exact_limit": 12, "blocks": "whole,two=2.*,0"},
        {"blocks": "parameter", "curvature": "ggn"},
    ],
)
def test_any_number_of_shards_of_any_blocks_is_the_same_analysis(tmp_path, count, options):
    options = {"variants": "raw,adam,bn,bn+jacobi,bnp,without-bn", "max_examples": 9} | options
    run = analyze(task(), **options)
    merged = merge_runs(shards(tmp_path, count, **options))
    assert departures(run, merged, EQUAL, SECONDS) == []


@pytest.mark.slow
def test_the_default_analysis_in_shards_differs_in_its_costs_alone(tmp_path):
    options = {"variants": "raw,adam,bn,bn+jacobi,bnp"}
    run = analyze(task(), **options)
    merged = merge_runs(shards(tmp_path, 3, **options))
    bounds = {"low", "high", "margin_below", "margin_above"}
    assert departures(run, merged, 1e-9, COSTS | bounds) == []
