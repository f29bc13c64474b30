"""``demo`` trains, says what it wrote, and what to type next."""

import functools
import json
import shlex

import pytest

import hessdiag.demos
from hessdiag.errors import StoreError, TaskError
from hessdiag_cli.demo import demo


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory, and a training that is over at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hessdiag.demos, "train", functools.partial(hessdiag.demos.train, steps=10))
    return tmp_path


@pytest.fixture
def run(call):
    return functools.partial(call, demo)


def test_without_a_name_the_mlp_is_written_here_and_the_next_command_said(here, run):
    result = run()
    assert (here / "model.pt").is_file()
    assert len(list((here / "iterates").iterdir())) == 10
    lines = result.stdout.splitlines()
    assert lines[0].startswith("trained demo:mlp: 2,410 parameters, 10 steps")
    assert lines[-1] == "next: hessdiag analyze model.pt"
    assert result.stderr == "training, 10 steps\n"


def test_the_next_command_can_be_pasted_for_any_directory(here, run):
    last = run("convnet", "-o", "two words").stdout.splitlines()[-1]
    assert shlex.split(last) == ["next:", "hessdiag", "analyze", "two words/model.pt"]
    assert (here / "two words" / "model.pt").is_file()


def test_json_is_one_document_that_names_every_file(here, run):
    document = json.loads(run("transformer", "--json").stdout)
    assert document["task"] == "demo:transformer"
    assert document["parameters"] == 842
    assert document["steps"] == 10
    assert 0 <= document["accuracy"] <= 1
    assert document["path"] == "model.pt"
    assert sorted(document["iterates"]) == sorted(
        str(path.relative_to(here)) for path in (here / "iterates").iterdir()
    )


def test_quiet_says_nothing_on_stderr_and_verbose_lists_the_iterates(run):
    assert run("-q").stderr == ""
    assert "wrote iterates/step-000010.pt" in run("--force", "-v").stderr


def test_a_demo_that_is_there_stays_unless_forced(here, run):
    run()
    before = (here / "model.pt").read_bytes()
    with pytest.raises(StoreError, match="--force"):
        run("convnet")
    assert (here / "model.pt").read_bytes() == before
    run("convnet", "--force")
    assert (here / "model.pt").read_bytes() != before


def test_an_unknown_name_is_refused_with_the_nearest_one(here, run):
    with pytest.raises(TaskError, match="did you mean convnet"):
        run("convnets")
    assert not list(here.iterdir())


def test_the_help_names_every_demo(run):
    text = run("--help").stdout
    assert all(name in text for name in hessdiag.demos.DEMOS)
