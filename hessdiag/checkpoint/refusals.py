"""What is recognised and not read, with the command that makes it readable."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path


def torchscript(path: Path) -> str:
    """For a program of ``torch.jit.save``."""
    load = f"torch.jit.load({str(path)!r}, map_location='cpu').state_dict()"
    return f"{path} is a TorchScript program; convert it with\n  {_save(path, load)}"


def exported(path: Path) -> str:
    """For a program of ``torch.export.save``."""
    load = f"torch.export.load({str(path)!r}).state_dict"
    return f"{path} is an exported program (.pt2); convert it with\n  {_save(path, load)}"


def compressed(path: Path) -> str:
    """For a zip file that was packed again."""
    load = f"torch.load({str(path)!r}, map_location='cpu', weights_only=True)"
    return (
        f"{path} is compressed, which files of torch.save are not; convert it with\n"
        f"  {_save(path, load)}"
    )


def distributed(path: Path) -> str:
    """For a directory of ``torch.distributed.checkpoint``."""
    module = "torch.distributed.checkpoint.format_utils"
    target = f"{path.resolve().name}.pt"
    command = shlex.join(["python", "-m", module, "dcp_to_torch", str(path), target])
    return f"{path} is a distributed checkpoint; convert it with\n  {command}"


def adapter(path: Path) -> str:
    """For a directory of peft, which holds a change of weights and no network."""
    return (
        f"{path} is an adapter (LoRA and its kin) and not a network; where peft is installed, "
        "load it on its base model, then model.merge_and_unload().save_pretrained(DIR), and give "
        "DIR"
    )


def checkpoints_inside(path: Path, names: Iterable[str]) -> str:
    """For the output directory of a Trainer."""
    return (
        f"{path} is a directory of checkpoints; give one of them: "
        f"{', '.join(str(path / name) for name in names)}"
    )


def hdf5(path: Path) -> str:
    """For an HDF5 file, which may be a run of ours."""
    from hessdiag.store.read import is_run

    if is_run(path):
        show = shlex.join(["hessdiag", "show", str(path)])
        return f"{path} is a run of hessdiag, not a checkpoint; read it with: {show}"
    return f"{path} is an HDF5 file, not a checkpoint of torch; save model.state_dict()"


def _save(path: Path, load: str) -> str:
    code = f"import torch; torch.save({load}, {path.stem + '-weights.pt'!r})"
    return shlex.join(["python", "-c", code])
