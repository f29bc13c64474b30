"""An index puts shards together, and leads nowhere else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hessdiag.checkpoint import read_checkpoint
from hessdiag.errors import CheckpointError, UnsafeCheckpoint

FIRST, SECOND = "model-00001-of-00002", "model-00002-of-00002"
TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "b": torch.zeros(4)}


@pytest.fixture(params=["safetensors", "bin"])
def sharded(request, tmp_path: Path) -> Path:
    """The index of two shards."""
    suffix = request.param
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    for shard, names in ((FIRST, ["b"]), (SECOND, ["a.weight", "a.bias"])):
        part = {name: TENSORS[name] for name in names}
        path = tmp_path / f"{shard}.{suffix}"
        save_file(part, path) if suffix == "safetensors" else torch.save(part, path)
    weight_map = {
        "a.weight": f"{SECOND}.{suffix}", "b": f"{FIRST}.{suffix}", "a.bias": f"{SECOND}.{suffix}"
    }  # fmt: skip
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map}))
    return index


def rewrite(index: Path, change) -> None:
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def test_every_tensor_is_there_in_the_order_of_the_index(sharded):
    read = read_checkpoint(sharded)
    assert list(read.weights) == ["a.weight", "b", "a.bias"]
    assert all(torch.equal(read.weights[name], value) for name, value in TENSORS.items())
    assert read.format.endswith(" in 2 shards")
    assert (read.path, read.notices) == (sharded, [])


def test_the_directory_of_an_index_will_do(sharded):
    read = read_checkpoint(sharded.parent)
    assert all(torch.equal(read.weights[name], value) for name, value in TENSORS.items())
    assert read.path == sharded.parent


def test_a_missing_shard_is_named(sharded):
    next(sharded.parent.glob(f"{FIRST}*")).unlink()
    with pytest.raises(CheckpointError, match=rf"not there \(1 of 2\): {FIRST}"):
        read_checkpoint(sharded)


@pytest.mark.parametrize(
    "shard",
    ["../../etc/passwd", "sub/../../x.safetensors", "/etc/passwd", "C:\\x.bin", "..\\x.bin", "",
     "a\0b"],
)  # fmt: skip
def test_a_shard_outside_of_the_folder_is_refused(sharded, shard):
    rewrite(sharded, lambda names: names.update(b=shard))
    with pytest.raises(CheckpointError, match="not inside its own folder; nothing was read"):
        read_checkpoint(sharded)


def test_a_shard_that_is_a_loop_of_links_is_refused(sharded):
    loop = sharded.parent / "loop.safetensors"
    loop.symlink_to(loop)
    rewrite(sharded, lambda names: names.update(b=loop.name))
    with pytest.raises(CheckpointError, match=r"not there .*: loop\.safetensors"):
        read_checkpoint(sharded)


def test_a_link_to_a_shard_elsewhere_is_followed_as_the_hubs_cache_needs(sharded, tmp_path_factory):
    shard = next(sharded.parent.glob(f"{FIRST}*"))
    blob = tmp_path_factory.mktemp("blobs") / "0123abcd"
    shard.rename(blob)
    shard.symlink_to(blob)
    assert torch.equal(read_checkpoint(sharded).weights["b"], TENSORS["b"])


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded):
    rewrite(sharded, lambda names: names.update({"gone": names["b"]}))
    with pytest.raises(CheckpointError, match=r"holds gone \(1 of 2\), and it does not"):
        read_checkpoint(sharded)


def test_a_tensor_that_the_index_forgets_is_taken_and_said(sharded):
    rewrite(sharded, lambda names: names.pop("a.bias"))
    read = read_checkpoint(sharded)
    assert torch.equal(read.weights["a.bias"], TENSORS["a.bias"])
    assert "1 tensors of the shards are not in the index" in read.notices[0]


def test_of_a_tensor_in_two_shards_that_of_the_index_is_taken(tmp_path):
    for index, value in ((FIRST, 1.0), (SECOND, 2.0)):
        save_file({"w": torch.tensor([value]), index: torch.ones(1)}, tmp_path / f"{index}.x")
    path = tmp_path / "model.safetensors.index.json"
    weight_map = {"w": f"{SECOND}.x", FIRST: f"{FIRST}.x"}
    path.write_text(json.dumps({"weight_map": weight_map}))
    assert read_checkpoint(path).weights["w"] == 2.0
    del weight_map["w"]
    path.write_text(json.dumps({"weight_map": weight_map | {SECOND: f"{SECOND}.x"}}))
    with pytest.raises(CheckpointError, match=r"two shards .* hold w"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "needs a weight_map"),
        ('{"weight_map": {}}', "needs a weight_map"),
        ('{"weight_map": ["a"]}', "needs a weight_map"),
        ('{"weight_map": {"a": 1}}', "needs a weight_map"),
        ("[]", "holds a list"),
        ("not json", "cannot be used"),
        ("[" * 100_000, "cannot be used"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "says 'a' twice"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_a_shard_that_would_run_code_is_refused(tmp_path):
    torch.save({"w": torch.ones(1), "x": Path("x")}, tmp_path / "a.bin")
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text('{"weight_map": {"w": "a.bin"}}')
    with pytest.raises(UnsafeCheckpoint, match="pathlib"):
        read_checkpoint(path)
    assert read_checkpoint(path, trust=True).weights["w"] == 1
