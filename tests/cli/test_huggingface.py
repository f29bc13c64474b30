"""A Hugging Face directory on the command line needs no task, and the table says whose data."""

import functools
import json

import numpy as np
import pytest

import hessdiag
import language_models as tiny
from hessdiag.errors import OptionError
from hessdiag_cli.analyze import analyze
from hessdiag_cli.inspect import inspect


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HESSDIAG_TASK", raising=False)
    tiny.make_directory(tmp_path / "tiny-1.5", "llama")
    np.save("tokens.npy", np.arange(18).reshape(3, 6) % tiny.VOCABULARY)
    return tmp_path


def test_inspect_says_what_the_directory_is_and_which_task_it_has(here, call):
    found = json.loads(call(inspect, "tiny-1.5", "--json").stdout)
    assert found["format"] == "Hugging Face directory"
    assert found["task"] == {"reference": "hf:llama", "source": "the Hugging Face directory"}
    assert "lm_head.weight" in {tensor["name"] for tensor in found["tensors"]}


def test_analyze_needs_no_task_and_stores_under_the_directorys_whole_name(here, call):
    run = functools.partial(call, analyze, "tiny-1.5", "--blocks", "model.norm")
    result = run("--data", "tokens.npy", "--json")
    found = json.loads(result.stdout)
    assert found["task"] == "hf:llama"
    assert found["blocks"][0]["variants"]["raw"]["lambda_max"]["status"] == "exact"
    warnings = hessdiag.open_run(here / "tiny-1.5.h5").provenance.warnings
    assert not any("demo text" in warning for warning in warnings)
    with pytest.raises(OptionError, match="brings its own data"):
        run("--data", "tokens.npy", "--task", "demo:mlp")
