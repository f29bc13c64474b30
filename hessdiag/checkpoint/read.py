"""Tell what a file is by its content, and hand it to the reader of that format."""

from __future__ import annotations

import zipfile
from pathlib import Path

from hessdiag.checkpoint.contents import Checkpoint
from hessdiag.checkpoint.safetensors_file import read_safetensors
from hessdiag.checkpoint.torch_file import read_legacy, read_zip
from hessdiag.errors import CheckpointError

ZIP = b"PK\x03\x04"
HDF5 = b"\x89HDF\r\n\x1a\n"
LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""torch's magic number as pickled by every protocol, two or more bytes into the file."""


def read_checkpoint(path: Path | str, *, trust: bool = False) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in it is run unless ``trust`` is given.

    Args:
        path: A state dict or training dict of ``torch.save`` (zip or legacy), or safetensors.
        trust: Also load pickles that import and call what they name.

    Raises:
        UnsafeCheckpoint: The file would run code, and ``trust`` was not given.
        CheckpointError: The file is missing, damaged, or of a kind that cannot be used; the
            message says how to convert it.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(_directory(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint file")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path} is empty; copy or save the checkpoint again")
    if head.startswith(HDF5):
        raise CheckpointError(_hdf5(path))
    if head.startswith(ZIP):
        _check_zip(path)
        return read_zip(path, trust=trust)
    if path.suffix == ".safetensors" or _looks_like_safetensors(head):
        return read_safetensors(path)
    if LEGACY in head[:32]:
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


def _directory(path: Path) -> str:
    if (path / "config.json").exists():
        return (
            f"{path} is a Hugging Face directory, which this hessdiag does not support yet; write "
            "a task that builds the model, and give the file of its weights (*.safetensors)"
        )
    if (path / ".metadata").exists():
        return (
            f"{path} is a distributed checkpoint; convert it with\n  python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} {path.name}.pt"
        )
    return f"{path} is a directory; give the path of a checkpoint file"


def _hdf5(path: Path) -> str:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            ours = file.attrs.get("encoding-type") == "hessdiag-run"
    except OSError:
        ours = False
    if ours:
        return f"{path} is a run of hessdiag, not a checkpoint; read it with: hessdiag show {path}"
    return f"{path} is an HDF5 file, not a checkpoint of torch; save model.state_dict()"


def _check_zip(path: Path) -> None:
    """Refuse the zip files that are no checkpoint of ``torch.save``, by what is in them."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({error}); copy or save it again"
        ) from error
    inner = {name.split("/", 1)[-1] for name in names}
    save = f"python -c \"import torch; torch.save({{}}, '{path.stem}-weights.pt')\""
    if "constants.pkl" in inner:
        load = f"torch.jit.load('{path}', map_location='cpu').state_dict()"
        raise CheckpointError(
            f"{path} is a TorchScript program; convert it with\n  {save.format(load)}"
        )
    if any(n.startswith(("models/", "serialized_exported_program")) for n in {*inner, *names}):
        load = f"torch.export.load('{path}').state_dict"
        raise CheckpointError(
            f"{path} is an exported program (.pt2); convert it with\n  {save.format(load)}"
        )
    if "data.pkl" not in inner:
        kind = "a numpy archive" if any(n.endswith(".npy") for n in names) else "a zip file"
        raise CheckpointError(
            f"{path} is {kind}, not a checkpoint of torch.save; save model.state_dict()"
        )


def _looks_like_safetensors(head: bytes) -> bool:
    """Eight bytes that give the header's length, then the header, which is JSON."""
    return head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 32
