"""What a command line says of checkpoint, task and data, and what its run file is called."""

from pathlib import Path

import pytest
import torch

from hessdiag.checkpoint import Checkpoint
from hessdiag.errors import OptionError, TaskError
from hessdiag_cli.resolution import default_output, find_task, look_for_task

CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Checkpoint:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HESSDIAG_TASK", raising=False)
    weights = {"w": torch.ones(1)}
    return Checkpoint(Path("gpt"), "Hugging Face directory", weights, config=CONFIG)


@pytest.mark.parametrize("look", [find_task, look_for_task])
def test_data_reach_the_task_of_a_directory_and_no_other(folder, look):
    assert look(folder, None, [], Path("t.npy")).reference == "hf:gpt2"
    with pytest.raises(OptionError, match="brings its own data"):
        look(folder, "demo:mlp", [], Path("t.npy"))
    with pytest.raises(OptionError, match="not key=value"):
        look(folder, None, ["length"])


def test_without_a_task_one_raises_and_the_other_returns_none(folder):
    bare = Checkpoint(Path("m.pt"), "state dict", {"w": torch.ones(1)})
    assert look_for_task(bare, None, []) is None
    with pytest.raises(TaskError, match="no task was found"):
        find_task(bare, None, [])


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("model.pt", "model.h5"),
        ("deep/run.v2.ckpt", "run.v2.h5"),
        ("x/model.safetensors.index.json", "model.h5"),
        ("x" * 5000, "x" * 5000 + ".h5"),
    ],
)
def test_a_run_is_called_like_its_file(name, output):
    assert default_output(Path(name)) == Path(output)
    assert default_output(Path(name), "2/8") == Path(
        f"{output.removesuffix('.h5')}.shard-2-of-8.h5"
    )


@pytest.mark.parametrize("name", ["checkpoint-500", "gpt-1.5b"])
def test_a_run_of_a_directory_has_its_whole_name(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    assert default_output(tmp_path / name) == Path(f"{name}.h5")
    monkeypatch.chdir(tmp_path / name)
    assert default_output(Path()) == Path(f"{name}.h5")
