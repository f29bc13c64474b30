"""``analyze --shard`` and ``merge`` from the command line: files, messages, exit codes."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import sample_runs
from hessdiag import open_run
from hessdiag.opened import Opened
from hessdiag.store import write_run
from hessdiag_cli.__main__ import main
from sharded_runs import complete_run, departures, write_parts

TASK = """
import torch
from torch import nn
from hessdiag import Task

def task():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    return Task(net, [x], lambda model, batch: model(batch).square().mean())
"""
NAMES = ["model.shard-1-of-3.h5", "model.shard-2-of-3.h5", "model.shard-3-of-3.h5"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HESSDIAG_TASK", raising=False)
    return tmp_path


@pytest.fixture
def hessdiag(here, monkeypatch, capsys):
    """``hessdiag("merge", …)`` -> exit code, stdout, stderr; through the real entry point."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hessdiag", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, " ".join(err.replace("│", " ").split())

    return run


@pytest.fixture
def parts(here):
    """The files of two shards of a synthetic run, and that run."""
    run = complete_run(sample_runs.full_run())
    return write_parts(run, here, [["whole"], ["0", "2"]]), run


def test_an_array_of_shards_becomes_the_run_that_analyze_reprints(here, hessdiag):
    (here / "hessdiag_task.py").write_text(TASK)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    torch.save(layers.state_dict(), here / "model.pt")
    options = ("model.pt", "--variants", "raw", "--blocks", "*")
    for number, name in enumerate(NAMES, 1):
        code, out, err = hessdiag("analyze", *options, "--shard", f"{number}/3")
        assert code == 0
        assert f"shard {number}/3" in out
        assert f"stored in {name}" in err
        assert (here / name).exists()
    assert "shard 3/3 holds none of the 2 blocks" in " ".join(out.split())
    code, out, err = hessdiag("merge", *NAMES, "-o", "model.h5", "--json")
    assert code == 0
    assert err == "3 runs stored in model.h5"
    again = hessdiag("analyze", *options, "--json", "-q")
    assert again == (0, out, "")
    code, table, _ = hessdiag("show", "model.h5")
    assert hessdiag("analyze", *options, "-q")[1] == table
    assert [block["name"] for block in json.loads(out)["blocks"]] == ["0", "2"]


def test_the_table_is_that_of_the_merged_run(hessdiag, parts):
    paths, run = parts
    code, out, err = hessdiag("merge", *paths, "-o", "run.h5", "-v")
    assert code == 0
    assert (out, "") == hessdiag("show", "run.h5")[1:]
    assert "run.shard-2-of-2.h5: 0, 2" in err
    assert departures(run, open_run("run.h5"), 0.0, frozenset({"warnings"})) == []


def test_failed_rows_end_the_merge_with_4_and_are_stored(hessdiag, parts):
    paths, _ = parts
    second = open_run(paths[1])
    told = second.provenance
    told = replace(told, environment=told.environment | {"failed": ["0"]})
    write_run(replace(second, provenance=told), paths[1], force=True)
    code, _, _ = hessdiag("merge", *paths, "-o", "run.h5", "-q")
    assert code == 4
    assert open_run("run.h5").provenance.environment["failed"] == ["0"]


def test_a_run_that_is_there_is_replaced_by_force_only(hessdiag, parts, here):
    paths, run = parts
    write_run(replace(run, created_at="long ago"), here / "run.h5")
    before = (here / "run.h5").read_bytes()
    code, out, err = hessdiag("merge", *paths, "-o", "run.h5")
    assert (code, out) == (2, "")
    assert "run.h5 exists; replace it with --force" in err
    assert (here / "run.h5").read_bytes() == before
    assert hessdiag("merge", *paths, "-o", "run.h5", "--force", "-q")[0] == 0
    assert open_run("run.h5").created_at != "long ago"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run.shard-1-of-2.h5", "-o", "run.h5"], "the shard 2/2 is missing; make it by"),
        (["run.shard-1-of-2.h5", "absent.h5", "-o", "run.h5"], "absent.h5 does not exist"),
        (["run.shard-1-of-2.h5", ".", "-o", "run.h5"], ". is not a file"),
        (["..", "run.shard-1-of-2.h5", "-o", "run.h5"], ".. is not a file"),
        (["run.shard-1-of-2.h5", "-o", "no/run.h5"], "the folder of no/run.h5 does not exist"),
        (["run.shard-1-of-2.h5", "-o", "run.shard-1-of-2.h5"], "is one of the runs to merge"),
    ],
)
def test_what_cannot_be_merged_ends_with_2_and_writes_nothing(
    hessdiag, parts, here, arguments, told
):
    names = sorted(path.name for path in here.iterdir())
    code, out, err = hessdiag("merge", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert sorted(path.name for path in here.iterdir()) == names


def test_merge_asks_for_runs_and_an_output(hessdiag):
    assert hessdiag("merge", "-o", "run.h5")[0] == 2
    code, _, err = hessdiag("merge", "run.h5")
    assert code == 2
    assert "--output" in err


def test_a_wrong_shard_ends_before_anything_is_read(hessdiag):
    code, _, err = hessdiag("analyze", "model.pt", "--shard", "0/4")
    assert code == 2
    assert "shard is '0/4'; it must be I/N" in err


def test_a_failed_row_of_a_shard_ends_it_with_4(here, hessdiag, monkeypatch):
    (here / "hessdiag_task.py").write_text(TASK)
    torch.save(
        nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).state_dict(), here / "model.pt"
    )

    def failing(opened):
        raise ValueError("too hot")

    monkeypatch.setattr(Opened, "solve", failing)
    options = ("model.pt", "--variants", "raw", "--blocks", "*", "-q")
    assert [hessdiag("analyze", *options, "--shard", f"{k}/2")[0] for k in (1, 2)] == [4, 4]
    names = ["model.shard-1-of-2.h5", "model.shard-2-of-2.h5"]
    assert hessdiag("merge", *names, "-o", "model.h5", "-q")[0] == 4
    assert sorted(open_run("model.h5").provenance.environment["failed"]) == ["0", "2"]
