"""Lightning's files: a real one, and what users put into theirs."""

import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from hessdiag.checkpoint import map_optimizer, match_weights, read_checkpoint
from hessdiag.errors import CheckpointError, UnsafeCheckpoint

REAL = Path(__file__).parents[2] / "data" / "lightning-2.6.ckpt"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def imitation(path: Path, state, **more) -> Path:
    content = {
        "epoch": 1,
        "global_step": 6,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": dict(state),
        "optimizer_states": [],
        "hyper_parameters": {"rate": 0.1, "weights": torch.ones(3)},
        "callbacks": {},
        "loops": {},
    }
    torch.save(content | more, path)
    return path


def under(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in network().state_dict().items()}


def test_a_real_file_gives_the_network_and_leaves_loss_and_metric_out():
    read = read_checkpoint(REAL)
    assert read.format == "Lightning checkpoint (torch zip)"
    assert (read.step, read.task, read.notices) == (6, None, [])
    matched = match_weights(read, network())
    state = torch.load(REAL, weights_only=True)["state_dict"]
    assert list(matched.weights) == list(network().state_dict())
    assert all(torch.equal(v, state[f"model.{k}"]) for k, v in matched.weights.items())
    assert matched.notices == [
        "removed 'model.' from the names in the file",
        "left out 2 tensors of the file that are outside of the network: "
        "loss.weight, confusion.confmat",
    ]


def test_the_optimizers_state_of_a_real_file_finds_its_parameters():
    state = map_optimizer(read_checkpoint(REAL).optimizer, network())
    raw = torch.load(REAL, weights_only=True)["optimizer_states"][0]["state"]
    names = [name for name, _ in network().named_parameters()]
    assert (state.class_name, state.mapped_by) == ("AdamW", "single group")
    assert list(state.state) == names
    for index, name in enumerate(names):
        assert torch.equal(state.state[name]["exp_avg_sq"], raw[index]["exp_avg_sq"])


def test_hyper_parameters_with_tensors_are_no_network(tmp_path):
    read = read_checkpoint(imitation(tmp_path / "m.ckpt", under("net.")))
    assert read.notices == []
    assert match_weights(read, network()).notices == ["removed 'net.' from the names in the file"]


def test_hyper_parameters_of_other_classes_are_named_and_need_trust(tmp_path):
    path = imitation(
        tmp_path / "m.ckpt",
        under("net."),
        hyper_parameters={"args": Namespace(width=5), "root": Path("data")},
    )
    with pytest.raises(UnsafeCheckpoint, match=r"argparse\.Namespace.*pathlib.*--trust"):
        read_checkpoint(path)
    assert len(match_weights(read_checkpoint(path, trust=True), network()).weights) == 9


def test_several_optimizers_are_not_used_and_said(tmp_path):
    one = torch.optim.SGD(network().parameters(), lr=0.1).state_dict()
    path = imitation(tmp_path / "m.ckpt", under("net."), optimizer_states=[one, one])
    read = read_checkpoint(path)
    assert read.optimizer is None
    assert read.notices == ["'optimizer_states' holds 2 optimizers; their state is not used"]


def test_a_student_and_a_teacher_are_refused_with_a_command_that_takes_one(tmp_path, monkeypatch):
    path = imitation(tmp_path / "it's mine.ckpt", under("student.") | under("teacher."))
    with pytest.raises(CheckpointError, match=r"under 'student\.' and 'teacher\.'") as caught:
        match_weights(read_checkpoint(path), network())
    python, option, code = shlex.split(str(caught.value).splitlines()[-1])
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102
    part = read_checkpoint(tmp_path / "it's mine-part.pt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert list(part.weights) == list(network().state_dict())
    assert torch.equal(part.weights["0.weight"], state["student.0.weight"])


def test_an_averaged_state_says_so(tmp_path):
    path = imitation(
        tmp_path / "m.ckpt",
        under("net."),
        current_model_state=under("net."),
        averaging_state={"n_averaged": torch.tensor(3)},
    )
    assert "running average" in read_checkpoint(path).notices[0]


def test_a_file_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="Lightning checkpoint without weights"):
        read_checkpoint(imitation(tmp_path / "m.ckpt", {}))


def test_weights_of_torchs_averaged_model_are_read_with_a_notice(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(network())
    for _ in range(3):
        averaged.update_parameters(network())
    torch.save(averaged.state_dict(), tmp_path / "m.pt")
    read = read_checkpoint(tmp_path / "m.pt")
    matched = match_weights(read, network())
    assert torch.equal(matched.weights["0.weight"], averaged.module[0].weight)
    assert matched.notices == [
        "the weights are an average over 3 models (torch's AveragedModel)",
        "removed 'module.' from the names in the file",
    ]
    own = match_weights(read, torch.optim.swa_utils.AveragedModel(network()))
    assert int(own.weights["n_averaged"]) == 3


def test_a_counter_beside_names_that_are_no_averaged_models_stays_unknown(tmp_path):
    for state in (
        network().state_dict() | {"n_averaged": torch.tensor(3)},
        under("module.") | {"n_averaged": torch.tensor(float("nan"))},
    ):
        torch.save(state, tmp_path / "m.pt")
        with pytest.raises(CheckpointError, match=r"unknown to the model \(\d+\): .*n_averaged"):
            match_weights(read_checkpoint(tmp_path / "m.pt"), network())
