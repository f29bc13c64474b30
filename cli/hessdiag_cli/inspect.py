"""``hessdiag inspect``: what a checkpoint is, and on request what its analysis will cost."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from hessdiag_cli import console
from hessdiag_cli.console import Debug, Json, Quiet, Verbose

if TYPE_CHECKING:
    from torch import Tensor

    from hessdiag.checkpoint import Checkpoint
    from hessdiag.estimated import Estimate
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
    data: Annotated[
        Path | None,
        Option(metavar="FILE", help="Tokens for a Hugging Face directory: .npy, .pt or .txt."),
    ] = None,
    estimate: Annotated[
        bool,
        Option("--estimate", help="Predict what analyze takes; this runs the task's code."),
    ] = False,
    variants: Annotated[str | None, Option(help="With --estimate, as for analyze.")] = None,
    blocks: Annotated[str | None, Option(help="With --estimate, as for analyze.")] = None,
    curvature: Annotated[str | None, Option(metavar="hessian|ggn", help="With --estimate.")] = None,
    exact_limit: Annotated[int | None, Option(help="With --estimate.")] = None,
    steps: Annotated[int | None, Option(help="With --estimate.")] = None,
    probes: Annotated[int | None, Option(help="With --estimate.")] = None,
    density: Annotated[bool, Option("--density", help="With --estimate.")] = False,
    eigensolver: Annotated[
        str | None, Option(metavar="lanczos|power", help="With --estimate.")
    ] = None,
    batch_size: Annotated[int | None, Option(help="With --estimate.")] = None,
    max_examples: Annotated[int | None, Option(help="With --estimate.")] = None,
    engine: Annotated[
        str | None,
        Option(metavar="auto|kept|linearized|recompute|difference", help="With --estimate."),
    ] = None,
    memory_budget: Annotated[str | None, Option(help="With --estimate.")] = None,
    dtype: Annotated[str | None, Option(metavar="float64|float32", help="With --estimate.")] = None,
    device: Annotated[str | None, Option(metavar="DEVICE", help="With --estimate.")] = None,
    shard: Annotated[
        str | None, Option(metavar="I/N", help="With --estimate: of this shard's blocks.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Say what CKPT is, which task is found for it and by which rule, and list its tensors.

    Runs no user code, unless --estimate asks for the products, seconds and memory that analyze
    will take: that runs the task and times a few products of each block.

    Example: hessdiag inspect model.pt --estimate
    """
    from hessdiag.checkpoint import read_checkpoint
    from hessdiag_cli.resolution import find_task, look_for_task

    given: dict[str, Any] = {
        "variants": variants,
        "blocks": blocks,
        "curvature": curvature,
        "exact_limit": exact_limit,
        "steps": steps,
        "probes": probes,
        "density": density or None,
        "eigensolver": eigensolver,
        "batch_size": batch_size,
        "max_examples": max_examples,
        "engine": engine,
        "memory_budget": memory_budget,
        "dtype": dtype,
        "device": device,
        "shard": shard,
    }
    options = {name: value for name, value in given.items() if value is not None}
    _check(options, estimate=estimate)
    read = read_checkpoint(checkpoint, trust=trust)
    look = find_task if estimate else look_for_task
    found = look(read, task, task_arg or [], data)
    if not json:
        for line in read.notices:
            console.notice(f"notice: {line}", quiet=quiet)
    cost = None
    if estimate and found is not None:
        cost = _cost(found, read, options, quiet=quiet)
    if json:
        import json as encoder

        told = document(read, found)
        if cost is not None:
            told["estimate"] = cost.to_dict()
        console.emit(encoder.dumps(told, ensure_ascii=False))
        return
    text = _text(read, found, rows=None if verbose else ROWS, width=console.width())
    if cost is not None:
        from hessdiag.tables.estimate import estimate_table

        text += "\n\n" + estimate_table(cost, width=console.width(), color=console.color())
    console.emit(text)


def _check(options: dict[str, Any], *, estimate: bool) -> None:
    """Refuse options that make no sense, or that only an estimate has a use for."""
    from hessdiag.errors import OptionError
    from hessdiag.options import make_options

    if options and not estimate:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise OptionError(f"{names}: only --estimate has a use for that; add it, or leave it out")
    make_options(**options)


def _cost(found: Resolution, read: Checkpoint, options: dict[str, Any], *, quiet: bool) -> Estimate:
    """Runs the task's code, whose prints are no part of the result."""
    from hessdiag.estimate import estimate as predict
    from hessdiag_cli.progress import progress

    with progress(quiet=quiet) as report, redirect_stdout(sys.stderr):
        return predict(found.load(), read, report=report, **options)


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

    from hessdiag.plain import printable, printable_lines

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
            Text(printable(name)),
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
    return printable_lines(text)


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
