"""Files of the safetensors library: names and tensors, and nothing that could run."""

from __future__ import annotations

from pathlib import Path

from hessdiag.checkpoint.contents import Checkpoint
from hessdiag.errors import CheckpointError


def read_safetensors(path: Path) -> Checkpoint:
    """Read a ``.safetensors`` file, memory-mapped, on the CPU.

    Raises:
        CheckpointError: The file is damaged, or holds no tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file, or is damaged or cut short ({error}); "
            "copy or save it again"
        ) from error
    if not weights:
        raise CheckpointError(f"{path} is a safetensors file without tensors; save it again")
    return Checkpoint(path, "safetensors", weights)
