"""Files of the safetensors library: names and tensors, and nothing that could run."""

from __future__ import annotations

from pathlib import Path

from hessdiag.checkpoint.contents import Checkpoint
from hessdiag.errors import CheckpointError

TRANSPOSED = ("tf", "flax")


def read_safetensors(path: Path) -> Checkpoint:
    """Read a ``.safetensors`` file, memory-mapped, on the CPU.

    Raises:
        CheckpointError: The file is damaged, holds no tensors, or is of a framework that stores
            them transposed.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            framework = (file.metadata() or {}).get("format", "pt")
        weights = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file, or is damaged or cut short ({error}); "
            "copy or save it again"
        ) from error
    if framework in TRANSPOSED:
        raise CheckpointError(
            f"{path} was saved by {framework}, whose layers hold transposed weights; load it with "
            "transformers' from_pretrained and save_pretrained it from torch"
        )
    if not weights:
        raise CheckpointError(f"{path} is a safetensors file without tensors; save it again")
    return Checkpoint(path, "safetensors", weights)
