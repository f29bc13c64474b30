"""``inspect`` says what a file is and which task it has, and runs nothing."""

import functools
import json

import pytest
import torch
from torch import nn

from hessdiag.errors import CheckpointError, OptionError, TaskError
from hessdiag_cli.inspect import inspect

FATAL = "raise RuntimeError('user code ran')\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HESSDIAG_TASK", raising=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = model.state_dict()
    state["1.bias"][0] = float("nan")
    content = {"model": state, "optimizer": optimizer.state_dict(), "step": 1, "epoch": 2}
    torch.save(content, tmp_path / "m.pt")
    torch.save({f"layers.{i}.weight": torch.ones(2, 2) for i in range(60)}, tmp_path / "deep.pt")
    return tmp_path


@pytest.fixture
def run(call):
    return functools.partial(call, inspect)


def test_the_table_shows_file_optimizer_tensors_and_what_is_not_finite(here, run):
    lines = run("m.pt").stdout.splitlines()
    text = "\n".join(lines)
    assert "training checkpoint (torch zip)" in text
    assert "4 tensors, 26 values" in text
    assert "state (step, exp_avg, exp_avg_sq) of 4 of 4 parameters in 1 group, with param" in text
    assert "none found; write one with: hessdiag init" in text
    assert [line.split() for line in lines[-4:]] == [
        ["0.weight", "4", "×", "3", "float32", "12"],
        ["0.bias", "4", "float32", "4"],
        ["1.weight", "2", "×", "4", "float32", "8"],
        ["1.bias", "2", "float32", "2", "1", "NaN", "or", "infinite"],
    ]
    assert max(map(len, lines)) <= 100


def test_json_is_one_document(here, run):
    result = run("m.pt", "--json", "--task", "demo:mlp")
    found = json.loads(result.stdout)
    assert result.stderr == ""
    assert set(found) == {"format", "path", "task", "step", "tensors", "optimizer", "notices"}
    assert found["task"] == {"reference": "demo:mlp", "source": "--task"}
    assert found["tensors"][3] == {
        "name": "1.bias",
        "shape": [2],
        "dtype": "float32",
        "finite": False,
    }
    assert found["optimizer"] == {
        "groups": 1,
        "parameters": 4,
        "with_state": 4,
        "state": ["step", "exp_avg", "exp_avg_sq"],
        "named": True,
    }
    bare = json.loads(run("deep.pt", "--json").stdout)
    assert bare["task"] is bare["optimizer"] is None


def test_a_long_list_is_cut_unless_verbose(here, run):
    short, long = run("deep.pt").stdout, run("deep.pt", "-v").stdout
    assert "… and 20 more tensors (-v lists them)" in short
    assert "layers.39.weight" in short
    assert "layers.40.weight" not in short
    assert "layers.59.weight" in long


@pytest.mark.parametrize("by", ["--task", "file"])
def test_no_user_code_runs(here, by, run):
    (here / "hessdiag_task.py").write_text(FATAL)
    arguments = ["--task", "hessdiag_task.py:net"] if by == "--task" else []
    text = run("m.pt", *arguments).stdout
    assert ("hessdiag_task.py:net (from --task)" in text) is (by == "--task")
    assert ("hessdiag_task.py:task (from hessdiag_task.py of" in text) is (by == "file")


def test_wrong_input_raises_the_trees_errors(here, run):
    with pytest.raises(TaskError, match=r"no file gone.py"):
        run("m.pt", "--task", "gone.py")
    with pytest.raises(CheckpointError, match="does not exist"):
        run("gone.pt")


TASK = """
import torch
from torch import nn
from hessdiag import Task

def task():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return Task(net, [(torch.randn(9, 3), torch.zeros(9, 2))], nn.MSELoss())
"""


@pytest.fixture
def fitting(here):
    (here / "hessdiag_task.py").write_text(TASK)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    torch.save(model.state_dict(), here / "fits.pt")
    return "fits.pt"


def test_an_estimate_runs_the_task_and_adds_what_each_block_costs(fitting, run):
    plain, result = run(fitting, "--json"), run(fitting, "--json", "--estimate", "-q")
    found = json.loads(result.stdout)
    cost = found.pop("estimate")
    assert result.stderr == ""
    assert found == json.loads(plain.stdout)
    assert [(b["name"], b["method"], b["products"]) for b in cost["blocks"]] == [
        ("0", "cut from whole", 0),
        ("1", "cut from whole", 0),
        ("whole", "exact", 26),
    ]
    assert cost["products"] == 26
    assert cost["seconds"] > 0
    options = ("--exact-limit", "0", "--blocks", "1", "--probes", "3", "--variants", "raw")
    text = run(fitting, "--estimate", *options)
    line = next(line for line in text.stdout.splitlines() if "lanczos" in line)
    assert line.split()[:4] == ["1", "10", "lanczos", "23"]
    assert "timing block 1/1 1" in text.stderr
    assert "0.weight" in text.stdout


def test_an_estimate_needs_a_task_and_its_options_need_it(here, fitting, run):
    with pytest.raises(OptionError, match=r"--blocks, --density: only --estimate has a use"):
        run(fitting, "--blocks", "1", "--density")
    with pytest.raises(OptionError, match="steps is 0"):
        run(fitting, "--estimate", "--steps", "0")
    with pytest.raises(CheckpointError, match=r"m.pt .*NaN|NaN"):
        run("m.pt", "--estimate")
    (here / "hessdiag_task.py").unlink()
    with pytest.raises(TaskError, match="hessdiag init"):
        run(fitting, "--estimate")


def test_names_are_shown_and_never_obeyed(here, run):
    names = ("\x1b[31mred", "line\nbreak", "a\u202eb", "[bold]x[/]")
    torch.save({name: torch.ones(1) for name in names}, here / "names.pt")
    out = run("names.pt").stdout
    assert all(line.isprintable() for line in out.splitlines())
    for shown in (r"\x1b[31mred", r"line\nbreak", r"a\u202eb", "[bold]x[/]"):
        assert any(line.startswith(shown) for line in out.splitlines())
