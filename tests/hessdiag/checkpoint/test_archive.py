"""A zip file of torch.save is read only if its bytes are those that were stored."""

import shlex
import zipfile

import pytest
import torch

from hessdiag.checkpoint import read_checkpoint
from hessdiag.errors import CheckpointError

WEIGHTS = {"weight": torch.linspace(1, 2, 40).view(5, 8), "bias": torch.linspace(3, 4, 5)}


@pytest.fixture
def path(tmp_path):
    torch.save(WEIGHTS, tmp_path / "m.pt")
    return tmp_path / "m.pt"


def packed_again(path, method, **changed):
    with zipfile.ZipFile(path) as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in (records | changed).items():
            archive.writestr(f"m/{name}", content)


@pytest.mark.parametrize("entry", range(0, 40, 13))
def test_a_flipped_bit_in_a_weight_is_refused(entry, path):
    content = bytearray(path.read_bytes())
    at = content.index(WEIGHTS["weight"].numpy().tobytes()) + 4 * entry + 3
    content[at] ^= 0x40
    path.write_bytes(content)
    # torch itself reads it, mapped or not: the number is another one.
    assert not torch.equal(torch.load(path)["weight"], WEIGHTS["weight"])
    with pytest.raises(CheckpointError, match=r"m.pt is damaged .*Bad CRC-32 .*copy or save"):
        read_checkpoint(path)


def test_a_file_saved_without_checksums_is_read(tmp_path):
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(computed)
    read = read_checkpoint(tmp_path / "m.pt").weights
    assert all(torch.equal(read[name], value) for name, value in WEIGHTS.items())


def test_a_compressed_file_is_refused_with_the_command_that_mends_it(path, monkeypatch):
    packed_again(path, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed") as caught:
        read_checkpoint(path)
    command = shlex.split(str(caught.value).splitlines()[-1])
    assert command[:2] == ["python", "-c"]
    monkeypatch.chdir(path.parent)
    exec(command[2], {})  # noqa: S102 - the command is ours
    read = read_checkpoint(path.parent / "m-weights.pt").weights
    assert all(torch.equal(read[name], value) for name, value in WEIGHTS.items())


def test_a_pickle_that_cannot_be_followed_is_refused(path):
    packed_again(path, zipfile.ZIP_STORED, **{"data.pkl": bytes(99)})
    with pytest.raises(CheckpointError, match=r"m.pt .*Unsupported operand 0"):
        read_checkpoint(path)
