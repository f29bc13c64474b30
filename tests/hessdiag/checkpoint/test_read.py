"""A file is told by its content, read on the CPU, and never runs anything unasked."""

import json
import pickle
import shlex
import struct
import subprocess
import sys
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file
from torch import nn

from hessdiag.checkpoint import read_checkpoint
from hessdiag.errors import CheckpointError, UnsafeCheckpoint

ZIP_AND_LEGACY = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def save(content, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def same(weights, model) -> bool:
    state = model.state_dict()
    return list(weights) == list(state) and all(torch.equal(weights[k], state[k]) for k in state)


class Evil:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@ZIP_AND_LEGACY
def test_a_state_dict_is_read_bit_for_bit(tmp_path, zipped):
    read = read_checkpoint(save(network().state_dict(), tmp_path / "m.pt", zipped))
    assert same(read.weights, network())
    assert read.format == f"state dict ({'torch zip' if zipped else 'legacy torch pickle'})"
    assert (read.optimizer, read.task, read.step, read.notices) == (None, None, None, [])


@ZIP_AND_LEGACY
def test_a_file_from_a_gpu_is_read_without_one(tmp_path, monkeypatch, zipped):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        path = save(network().state_dict(), tmp_path / "m.pt", zipped)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            assert b"cuda:3" in archive.read("m/data.pkl")
    else:
        assert b"cuda:3" in path.read_bytes()
    read = read_checkpoint(path)
    assert same(read.weights, network())
    assert all(tensor.device.type == "cpu" for tensor in read.weights.values())


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", "network"])
@pytest.mark.parametrize("optimizer_key", ["optimizer", "optimizer_state_dict", "optim"])
def test_a_training_dict_gives_weights_optimizer_step_and_task(tmp_path, key, optimizer_key):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    content = {
        "epoch": 3,
        "step": 70,
        "loss": torch.tensor(0.5),
        key: model.state_dict(),
        optimizer_key: optimizer.state_dict(),
        "hessdiag": {"task": "demo:mlp"},
    }
    read = read_checkpoint(save(content, tmp_path / "m.pt"))
    assert same(read.weights, model)
    assert read.optimizer == optimizer.state_dict()
    assert (read.step, read.task) == (70, "demo:mlp")
    assert read.format == "training checkpoint (torch zip)"


def test_averaged_weights_beside_the_model_are_named(tmp_path):
    content = {"model": network().state_dict(), "model_ema": {"0.weight": torch.ones(4, 3)}}
    read = read_checkpoint(save(content, tmp_path / "m.pt"))
    assert same(read.weights, network())
    assert read.notices == ["the weights are those under 'model' in the file; "
                            "it also holds model_ema, not used"]  # fmt: skip


def test_several_networks_under_unusual_names_are_refused(tmp_path):
    path = save({"G": {"w": torch.ones(2)}, "D": {"w": torch.ones(2)}}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"several networks .G, D"):
        read_checkpoint(path)


def test_entries_that_are_no_tensors_are_left_out_with_a_notice(tmp_path):
    state = {"w": torch.ones(2), "a._extra_state": torch.ones(3), "version": 2, "name": "x"}
    read = read_checkpoint(save(state, tmp_path / "m.pt"))
    assert list(read.weights) == ["w"]
    assert read.notices[0].endswith("3 entries of the file that are no weights: "
                                    "a._extra_state, version, name")  # fmt: skip


def test_safetensors_are_read(tmp_path):
    for name in ("m.safetensors", "without-a-suffix"):
        save_file(network().state_dict(), tmp_path / name)
        read = read_checkpoint(tmp_path / name)
        assert read.format == "safetensors"
        assert {k: v.tolist() for k, v in read.weights.items()} == {
            k: v.tolist() for k, v in network().state_dict().items()
        }


@ZIP_AND_LEGACY
def test_a_pickle_that_would_run_code_is_refused_and_its_function_named(tmp_path, zipped):
    trace = tmp_path / "ran"
    path = save({"w": torch.ones(2), "x": Evil(trace)}, tmp_path / "m.pt", zipped)
    with pytest.raises(UnsafeCheckpoint, match=r"would import .*getattr.*--trust") as caught:
        read_checkpoint(path)
    assert "pathlib" in str(caught.value)
    assert "torch._utils" not in str(caught.value)
    assert not trace.exists()
    read_checkpoint(path, trust=True)
    assert trace.exists()


@ZIP_AND_LEGACY
def test_every_refused_global_is_named(tmp_path, zipped):
    content = {"model": {"w": torch.ones(2)}, "args": Namespace(a=1), "best": np.float64(1.0)}
    path = save(content, tmp_path / "m.pt", zipped)
    with pytest.raises(UnsafeCheckpoint, match=r"argparse\.Namespace.*numpy\S+scalar"):
        read_checkpoint(path)
    assert list(read_checkpoint(path, trust=True).weights) == ["w"]


@pytest.mark.parametrize("protocol", [2, 4])
def test_names_of_a_legacy_pickle_of_any_protocol_are_found(tmp_path, protocol):
    path = tmp_path / "m.pt"
    torch.save(
        {"x": Namespace()}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False
    )
    with pytest.raises(UnsafeCheckpoint, match=r"would import argparse\.Namespace\."):
        read_checkpoint(path)


@ZIP_AND_LEGACY
def test_a_pickled_module_needs_trust(tmp_path, zipped):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save(network(), tmp_path / "m.pt", zipped)
    with pytest.raises(UnsafeCheckpoint, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(path)
    read = read_checkpoint(path, trust=True)
    assert same(read.weights, network())
    assert read.format.startswith("pickled module")


def test_a_module_whose_class_is_gone_says_so(tmp_path, monkeypatch):
    gone = type("Gone", (nn.Linear,), {"__module__": "gone_module_x"})
    module = type(json)("gone_module_x")
    module.Gone = gone
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "gone_module_x", module)
        path = save(gone(1, 1), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"cannot be imported here.*gone_module_x"):
        read_checkpoint(path, trust=True)


def _truncated_zip(path):
    whole = save(network().state_dict(), path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _truncated_legacy(path):
    path.write_bytes(save(network().state_dict(), path, False).read_bytes()[:-9])


def _truncated_safetensors(path):
    save_file(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-9])


def _run(path):
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"] = "hessdiag-run"


def _keras(path):
    with h5py.File(path, "w") as file:
        file["w"] = 1


def _numpy(path):
    with path.open("wb") as file:
        np.savez(file, w=np.ones(2))


def _script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(path))


def _exported(path):
    target = path.with_suffix(".pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), target)
    target.rename(path)


def _distributed(path):
    path.mkdir()
    (path / ".metadata").touch()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is a directory"),
        (_distributed, "dcp_to_torch"),
        (lambda p: p.touch(), "is empty"),
        (lambda p: p.write_bytes(b"hello " * 20), "is not a checkpoint"),
        (lambda p: p.write_bytes(b"PK\x03\x04rest"), "damaged or cut short"),
        (lambda p: p.write_bytes(struct.pack("<Q", 40) + b"{broken"), "safetensors"),
        (_truncated_zip, "damaged or cut short"),
        (_truncated_legacy, "damaged or cut short"),
        (_truncated_safetensors, "damaged or cut short"),
        (lambda p: p.write_bytes(pickle.dumps({"w": 1})), "plain Python pickle"),
        (_run, "hessdiag show"),
        (_keras, "an HDF5 file"),
        (_script, r"TorchScript[\s\S]*torch\.jit\.load"),
        (_exported, r"exported program[\s\S]*torch\.export\.load"),
        (_numpy, "numpy archive"),
        (lambda p: save([1, 2], p), "holds a list"),
        (lambda p: save({"epoch": 1}, p), r"no weights .keys: epoch"),
        (lambda p: save(torch.optim.SGD([nn.Parameter(torch.ones(1))]).state_dict(), p),
         "optimizer's state and no weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_apart_with_a_remedy(tmp_path, make, message):
    path = tmp_path / "m.bin"
    make(path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def _dcp(path):
    state = {name: tensor.clone() for name, tensor in nn.Linear(2, 2).state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save(state, checkpoint_id=path, no_dist=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "name", "target"),
    [
        (_script, "it's a model.pt", "it's a model-weights.pt"),
        (_exported, "model 1.pt2", "model 1-weights.pt"),
        (_dcp, "step 5 (best)", "step 5 (best).pt"),
    ],
)
def test_the_commands_that_convert_do(tmp_path, make, name, target):
    make(tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / name)
    command = str(caught.value).splitlines()[-1].strip()
    assert command.startswith("python ")
    run = command.replace("python", shlex.quote(sys.executable), 1)
    work = tmp_path / "elsewhere"
    work.mkdir()
    subprocess.run(run, shell=True, cwd=work, check=True, capture_output=True)  # noqa: S602
    assert set(read_checkpoint(work / target).weights) == {"weight", "bias"}


@pytest.mark.parametrize(
    "state",
    [
        *({"state": None, "param_groups": None}, {"state": [], "param_groups": []}),
        *({"state": 3, "param_groups": 4}, {"state": {}, "param_groups": [1, 2]}),
        *({"state": {}, "param_groups": [{}]}, {"state": {}, "param_groups": [{"params": None}]}),
        {"state": {}, "param_groups": [{"params": [[0], [1]]}]},
        {"state": torch.ones(2), "param_groups": torch.ones(2)},
    ],
)
def test_what_only_looks_like_an_optimizers_state_is_left_out_with_a_notice(state, tmp_path):
    content = {"model": network().state_dict(), "optimizer": state}
    read = read_checkpoint(save(content, tmp_path / "m.pt"))
    assert same(read.weights, network())
    assert read.optimizer is None
    assert read.notices == ["'optimizer' holds no optimizer.state_dict(); it is not used"]


def test_tensors_without_values_are_refused_by_name(tmp_path):
    content = network().state_dict() | {"0.bias": torch.ones(4, device="meta")}
    with pytest.raises(CheckpointError, match=r"on the meta device, .* no values \(0.bias\)"):
        read_checkpoint(save(content, tmp_path / "m.pt"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_left_out_with_a_notice(tmp_path):
    content = network().state_dict() | {"rows": torch.nested.nested_tensor([torch.ones(3)])}
    read = read_checkpoint(save(content, tmp_path / "m.pt"))
    assert same(read.weights, network())
    assert read.notices == ["left out 1 entries of the file that are no weights: rows"]


def test_a_step_beyond_64_bits_is_not_believed(tmp_path):
    content = {"model": network().state_dict(), "step": 10**600}
    assert read_checkpoint(save(content, tmp_path / "m.pt")).step is None


def test_an_hdf5_file_with_nonsense_inside_is_refused_as_what_it_is(tmp_path):
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"] = "hessdiag-run"
    content = path.read_bytes()
    for at in range(8, len(content), 83):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=r"HDF5 file, not a checkpoint|run of hessdiag"):
            read_checkpoint(path)
