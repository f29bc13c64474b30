"""A directory gives weights, optimizer and step, or says what it is and what to give instead."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hessdiag.checkpoint import read_checkpoint
from hessdiag.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the Trainer leaves at step 500."""
    path = tmp_path / "checkpoint-500"
    path.mkdir()
    model = nn.Linear(3, 2)
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    model(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    optimizer.step()
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    (path / "trainer_state.json").write_text('{"global_step": 500, "log_history": []}')
    (path / "training_args.bin").write_bytes(b"a pickle")
    return path


def test_weights_optimizer_step_and_configuration_are_read(folder):
    read = read_checkpoint(folder)
    assert read.format == "Hugging Face directory"
    assert list(read.weights) == ["bias", "weight"]
    assert len(read.optimizer["param_groups"]) == 2
    assert (read.step, read.task, read.notices) == (500, None, [])
    assert read.config == {"model_type": "gpt2"}
    assert read.path == folder


def test_a_directory_without_configuration_is_read_too(folder):
    (folder / "config.json").unlink()
    assert read_checkpoint(folder).format == "Hugging Face directory"
    (folder / "trainer_state.json").unlink()
    read = read_checkpoint(folder)
    assert (read.format, read.config, read.step) == ("directory of weights", None, None)


def test_the_working_directory_has_a_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert read_checkpoint(".").path.name == "checkpoint-500"


def test_safetensors_come_before_pickles_and_that_is_said(folder):
    torch.save({"other": torch.ones(1)}, folder / "pytorch_model.bin")
    read = read_checkpoint(folder)
    assert "weight" in read.weights
    assert "pytorch_model.bin beside it not used" in read.notices[0]
    (folder / "model.safetensors").unlink()
    assert list(read_checkpoint(folder).weights) == ["other"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(Path("x"), "would import pathlib"), ({"a": torch.ones(1)}, "no optimizer.state_dict()")],
)
def test_an_optimizer_that_cannot_be_used_costs_a_notice_only(folder, content, message):
    torch.save(content, folder / "optimizer.pt")
    read = read_checkpoint(folder)
    assert read.optimizer is None
    assert any(message in notice for notice in read.notices)


@pytest.mark.parametrize("text", ["{", '{"global_step": "many"}', '{"global_step": true}'])
def test_a_broken_trainer_state_leaves_the_step_unknown(folder, text):
    (folder / "trainer_state.json").write_text(text)
    assert read_checkpoint(folder).step is None


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 * 2**20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_text("{nonsense"), r"config\.json cannot be used"),
        (lambda p: p.write_text('["gpt2"]'), "holds a list, not an object"),
        (_huge, "has 104,857,600 bytes"),
        (lambda p: p.mkdir(), "is no file"),
        (lambda p: p.write_text("1" * 5000), "cannot be used"),
    ],
)
def test_a_configuration_that_is_none_is_refused(folder, make, message):
    (folder / "config.json").unlink()
    make(folder / "config.json")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


def _weights(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.ones(1)}, folder / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "is a directory without weights: none of model.safetensors"),
        (lambda p: (p / "config.json").write_text("{}"), "a Hugging Face directory without"),
        (lambda p: (p / "adapter_config.json").write_text("{}"), "merge_and_unload"),
        (lambda p: _weights(p, "x.fp16.safetensors"), r"give the file itself: .*x\.fp16\.safe"),
        (lambda p: _weights(p / "checkpoint-7", "model.safetensors"), "one of them: .*point-7"),
        (lambda p: (p / ".metadata").touch(), "distributed checkpoint"),
        (lambda p: [(p / "fsdp").mkdir(), (p / "fsdp/.metadata").touch()], "/fsdp is a distrib"),
    ],
)
def test_a_directory_without_weights_says_what_it_is(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_directory_is_refused(folder):
    folder.chmod(0)
    try:
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
            read_checkpoint(folder)
    finally:
        folder.chmod(0o755)


def test_a_path_that_the_system_refuses_is_one_message(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / ("x" * 5000))

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read_checkpoint(tmp_path)


def test_transposed_weights_of_other_frameworks_are_refused(tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "m.safetensors", metadata={"format": "flax"})
    with pytest.raises(CheckpointError, match="saved by flax"):
        read_checkpoint(tmp_path / "m.safetensors")


def test_an_index_that_points_nowhere_is_refused_in_its_directory(tmp_path):
    index = {"weight_map": {"w": "gone.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"not there .*gone\.safetensors"):
        read_checkpoint(tmp_path)
