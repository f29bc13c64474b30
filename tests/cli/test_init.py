"""``init`` writes a task that works as it is, and never over another file unasked."""

import functools
from pathlib import Path

import pytest
import torch

from hessdiag.errors import InputError
from hessdiag.resolve import find
from hessdiag.task import as_loss, units
from hessdiag_cli.init import init


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(call):
    return functools.partial(call, init)


def test_the_file_is_found_and_is_a_task_that_works(here, run):
    result = run()
    assert result.stdout == "hessdiag_task.py\n"
    assert "hessdiag analyze CKPT" in result.stderr
    hit = find(None, cwd=here, environ={}, task_args={"width": "5"})
    task = hit.load()
    batches = list(task.data)
    assert sum(units(task)(batch) for batch in batches) == 64
    assert task.model[0].out_features == 5
    assert torch.isfinite(as_loss(task)(task.model, batches[0]))
    assert len(task.optimizer(task.model).param_groups) == 1


def test_an_existing_file_is_kept_unless_forced(here, run):
    Path("hessdiag_task.py").write_text("mine")
    with pytest.raises(InputError, match="exists already; add --force"):
        run()
    assert Path("hessdiag_task.py").read_text() == "mine"
    run("--force", "-q")
    assert "hessdiag.Task(" in Path("hessdiag_task.py").read_text()


def test_another_name_and_a_folder_that_is_not_there(here, run):
    assert "--task other.py" in run("-o", "other.py").stderr
    with pytest.raises(InputError, match="cannot be written"):
        run("-o", "gone/other.py")
