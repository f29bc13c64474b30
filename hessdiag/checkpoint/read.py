"""Tell what a file is by its content, and hand it to the reader of that format."""

from __future__ import annotations

from pathlib import Path

from hessdiag.checkpoint import refusals
from hessdiag.checkpoint.archive import opened
from hessdiag.checkpoint.contents import Checkpoint
from hessdiag.checkpoint.directory import read_directory
from hessdiag.checkpoint.safetensors_file import read_safetensors
from hessdiag.checkpoint.sharded import is_index, read_sharded
from hessdiag.checkpoint.torch_file import ZIP, is_legacy, read_legacy, read_zip
from hessdiag.errors import CheckpointError

HDF5 = b"\x89HDF\r\n\x1a\n"


def read_checkpoint(path: Path | str, *, trust: bool = False) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in it is run unless ``trust`` is given.

    Args:
        path: A state dict or training dict of ``torch.save`` (zip or legacy), a Lightning
            checkpoint, safetensors, the index of sharded weights, or a Hugging Face directory.
        trust: Also load pickles that import and call what they name.

    Raises:
        UnsafeCheckpoint: The file would run code, and ``trust`` was not given.
        CheckpointError: The file is missing, damaged, or of a kind that cannot be used; the
            message says how to convert it.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return read_directory(path, lambda file: _read_file(file, trust=trust))
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; give the path of a checkpoint")
        if is_index(path):
            return read_sharded(path, lambda file: _read_file(file, trust=trust))
        return _read_file(path, trust=trust)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_file(path: Path, *, trust: bool) -> Checkpoint:
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file; give the path of a checkpoint")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path} is empty; copy or save the checkpoint again")
    if head.startswith(HDF5):
        raise CheckpointError(refusals.hdf5(path))
    if head.startswith(ZIP):
        _check_zip(path)
        return read_zip(path, trust=trust)
    if path.suffix == ".safetensors" or _looks_like_safetensors(head):
        return read_safetensors(path)
    if is_legacy(head):
        return read_legacy(path, trust=trust)
    if head.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is a plain Python pickle, which runs code when it is loaded, and not a file "
            "of torch.save; load it where it was made and torch.save the model's state_dict()"
        )
    raise CheckpointError(
        f"{path} is not a checkpoint: its first bytes are neither those of torch.save "
        "nor of safetensors"
    )


def _check_zip(path: Path) -> None:
    """Refuse the zip files that are no checkpoint of ``torch.save``, by what is in them."""
    with opened(path) as archive:
        names = archive.namelist()
    inner = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in inner:
        raise CheckpointError(refusals.torchscript(path))
    if any(n.startswith(("models/", "serialized_exported_program")) for n in {*inner, *names}):
        raise CheckpointError(refusals.exported(path))
    if "data.pkl" not in inner:
        kind = "a numpy archive" if any(n.endswith(".npy") for n in names) else "a zip file"
        raise CheckpointError(
            f"{path} is {kind}, not a checkpoint of torch.save; save model.state_dict()"
        )


def _looks_like_safetensors(head: bytes) -> bool:
    """Eight bytes that give the header's length, then the header, which is JSON."""
    return head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 32
