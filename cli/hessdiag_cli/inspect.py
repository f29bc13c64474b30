"""``hessdiag inspect``: what a checkpoint is, without running anything of the user's."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from hessdiag_cli import console
from hessdiag_cli.console import Debug, Json, Quiet, Verbose

if TYPE_CHECKING:
    from torch import Tensor

    from hessdiag.checkpoint import Checkpoint
    from hessdiag.resolve import Resolution

ROWS = 40


def inspect(
    checkpoint: Annotated[Path, Argument(metavar="CKPT", help="Checkpoint to look into.")],
    task: Annotated[
        str | None, Option(help="FILE.py[:NAME], pkg.mod[:NAME] or demo:NAME.", metavar="TASK")
    ] = None,
    task_arg: Annotated[
        list[str] | None, Option(help="key=value for the task; repeatable.", metavar="KEY=VALUE")
    ] = None,
    trust: Annotated[
        bool, Option("--trust", help="Load a pickled module, which runs code from the file.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Say what CKPT is, which task is found for it and by which rule, and list its tensors.

    Runs no user code. Example: hessdiag inspect model.pt
    """
    from hessdiag.checkpoint import read_checkpoint
    from hessdiag.resolve import find
    from hessdiag_cli.resolution import parse_arguments

    arguments = parse_arguments(task_arg or [])
    read = read_checkpoint(checkpoint, trust=trust)
    found = find(
        task,
        cwd=Path.cwd(),
        environ=os.environ,
        checkpoint_task=read.task,
        task_args=arguments,
    )
    if json:
        import json as encoder

        console.emit(encoder.dumps(document(read, found), ensure_ascii=False))
        return
    for line in read.notices:
        console.notice(f"notice: {line}", quiet=quiet)
    console.emit(_text(read, found, rows=None if verbose else ROWS, width=console.width()))


def document(checkpoint: Checkpoint, found: Resolution | None) -> dict[str, Any]:
    """The JSON of ``inspect --json``."""
    optimizer = checkpoint.optimizer
    return {
        "format": checkpoint.format,
        "path": str(checkpoint.path),
        "task": None if found is None else {"reference": found.reference, "source": found.source},
        "step": checkpoint.step,
        "tensors": [
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": _dtype(tensor),
                "finite": _nonfinite(tensor) == 0,
            }
            for name, tensor in checkpoint.weights.items()
        ],
        "optimizer": None if optimizer is None else _optimizer(optimizer),
        "notices": checkpoint.notices,
    }


def _text(checkpoint: Checkpoint, found: Resolution | None, *, rows: int | None, width: int) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    weights = checkpoint.weights
    values = sum(tensor.numel() for tensor in weights.values())
    lines = [
        f"file       {checkpoint.path}",
        f"format     {checkpoint.format}",
        f"weights    {len(weights)} tensors, {values:,} values",
        f"optimizer  {_optimizer_line(checkpoint.optimizer)}",
    ]
    if checkpoint.step is not None:
        lines.append(f"step       {checkpoint.step:,}")
    if found is None:
        lines.append(
            "task       none found; write one with: hessdiag init, or name one with --task FILE.py"
        )
    else:
        lines.append(f"task       {found.reference} (from {found.source})")

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("values", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, tensor in list(weights.items())[:rows]:
        bad = _nonfinite(tensor)
        table.add_row(
            Text(name),
            " × ".join(map(str, tensor.shape)) or "scalar",
            _dtype(tensor),
            f"{tensor.numel():,}",
            f"{bad:,} NaN or infinite" if bad else "",
        )
    buffer = io.StringIO()
    Console(file=buffer, width=width, highlight=False, color_system=None).print(table)
    body = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
    text = "\n".join([*lines, "", body])
    if rows is not None and len(weights) > rows:
        rest = list(weights.items())[rows:]
        text += f"\n… and {len(rest)} more tensors (-v lists them)"
        broken = [name for name, tensor in rest if _nonfinite(tensor)]
        if broken:
            text += f"; NaN or infinite values in {', '.join(broken[:4])}"
            text += ", …" if len(broken) > 4 else ""
    return text


def _optimizer(raw: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer's state holds: groups, parameters, kinds of state, whether it has names."""
    groups, state = raw["param_groups"], raw["state"]
    kinds: dict[str, None] = {}
    for held in state.values():
        kinds.update(dict.fromkeys(map(str, held) if isinstance(held, dict) else ()))
    return {
        "groups": len(groups),
        "parameters": sum(len(group["params"]) for group in groups),
        "with_state": len(state),
        "state": list(kinds),
        "named": all("param_names" in group for group in groups),
    }


def _optimizer_line(raw: dict[str, Any] | None) -> str:
    if raw is None:
        return "no state"
    found = _optimizer(raw)
    kinds = f" ({', '.join(found['state'])})" if found["state"] else ""
    return (
        f"state{kinds} of {found['with_state']} of {found['parameters']} parameters in "
        f"{found['groups']} group{'s' * (found['groups'] != 1)}, "
        f"{'with' if found['named'] else 'without'} parameter names"
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _nonfinite(tensor: Tensor) -> int:
    from hessdiag.checkpoint.names import finite

    return int((~finite(tensor)).sum())
