"""``crosscheck`` prints PyHessian's numbers beside certified ones and never fails for PyHessian."""

import functools
import json
import sys

import pytest
import torch
from torch import nn

from hessdiag.errors import MissingExtra, OptionError
from hessdiag_cli.__main__ import exit_code
from hessdiag_cli.crosscheck import crosscheck

TASK = """
import torch
from torch import nn
from hessdiag import Task

def task(width="4"):
    torch.manual_seed(0)
    data = [(torch.randn(5, 3), torch.randn(5, 2)), (torch.randn(2, 3), torch.randn(2, 2))]
    net = nn.Sequential(nn.Linear(3, int(width)), nn.Tanh(), nn.Linear(int(width), 2))
    return Task(net, data, nn.MSELoss(), name="toy")

def straight():
    print("user code")
    found = task()
    total = lambda model, batch: sum(p.sum() for p in model.parameters())
    return Task(found.model, found.data, total)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HESSDIAG_TASK", raising=False)
    (tmp_path / "t.py").write_text(TASK)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    return tmp_path


@pytest.fixture
def run(call, here):
    return functools.partial(call, crosscheck, "m.pt", "--task")


def test_the_table_goes_to_stdout_and_progress_to_stderr(run):
    done = run("t.py", "--max-examples", "6")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[2].startswith("λ_max  PyHessian, eigenvalues()")
    assert any(line.startswith("trace  PyHessian, trace()") for line in lines)
    assert "toy, 26 parameters, cpu, float64" in done.stdout
    assert max(map(len, lines)) <= 100
    assert "task t.py:task (--task)" in done.stderr
    assert run("t.py", "-q").stderr == ""


def test_json_is_one_document_with_a_quantity_a_deviation_and_a_cost_per_method(run):
    done = run("t.py", "--json", "-q", "--seed", "3", "--exact-limit", "0", "--probes", "4")
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert set(found) == {
        *("format", "version", "task", "checkpoint", "size", "device", "engine", "curvature"),
        *("dtype", "seed", "steps", "probes", "tolerance", "threads", "torch", "setup_seconds"),
        *("entries", "notes"),
    }
    assert (found["format"], found["version"]) == ("hessdiag-crosscheck", "1.0.0")
    assert (found["task"], found["checkpoint"], found["size"]) == ("toy", "m.pt", 26)
    assert (found["seed"], found["steps"], found["probes"]) == (3, 100, 4)
    assert [(e["quantity"], e["method"]) for e in found["entries"]] == [
        ("lambda_max", "PyHessian, eigenvalues()"),
        ("lambda_max", "hessdiag, power iteration"),
        ("lambda_max", "hessdiag, Lanczos"),
        ("trace", "PyHessian, trace()"),
        ("trace", "hessdiag, Lanczos and probes"),
    ]
    for entry in found["entries"]:
        assert set(entry) == {
            *("quantity", "method", "value", "low", "high", "status", "confidence", "deviation"),
            *("products", "seconds", "failure"),
        }
        assert set(entry["deviation"]) == {"relative", "at_least"}
        assert entry["products"] >= 1
        assert entry["seconds"] > 0
    assert found["entries"][2]["status"] == "interval"


def test_where_pyhessian_raises_the_command_succeeds_and_says_why(run):
    done = run("t.py:straight")
    assert done.exit_code == 0
    assert "failed: see below" in done.stdout
    assert "PyHessian, trace(): RuntimeError: element 0 of tensors" in done.stdout
    assert "user code" not in done.stdout


def test_without_pyhessian_there_is_one_error_and_exit_code_2(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    with pytest.raises(MissingExtra, match="pip install pyhessian") as error:
        run("t.py")
    assert exit_code(error.value) == 2


def test_what_makes_no_sense_is_refused_before_any_work(run):
    with pytest.raises(OptionError, match="steps is 0"):
        run("t.py", "--steps", "0")
    with pytest.raises(OptionError, match="dtype is 'float16'"):
        run("t.py", "--dtype", "float16")


def test_task_arguments_and_precision_reach_the_analysis(run):
    done = run("t.py", "--task-arg", "width=4", "--dtype", "float32", "--json", "-q")
    assert json.loads(done.stdout)["dtype"] == "float32"
