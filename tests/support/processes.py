"""Real ``hessdiag`` processes on a small task, and the comparison of what two of them found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hessdiag import open_run
from hessdiag.run import Run

ROOT = Path(__file__).parents[2]

TASK = """
import time
import torch
from torch import nn
from hessdiag import Task

def task(pause=0.002):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=source)
    def loss(model, batch):
        time.sleep(float(pause))
        return (model(batch) - batch.sin()).square().mean()
    layers = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())]
    return Task(nn.Sequential(*layers), [x], loss)
"""
BLOCKS = 7
ROWS = 2 * BLOCKS  # raw and bnp: there is no optimizer state


def prepare(folder: Path) -> None:
    """A checkpoint and its task."""
    (folder / "hessdiag_task.py").write_text(TASK)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())]
        torch.save(nn.Sequential(*layers).state_dict(), folder / "model.pt")


def start(folder: Path, *arguments: str, command: str = "analyze", **options: Any):
    """A process of ``hessdiag analyze model.pt``, or of another command."""
    paths = [str(ROOT), str(ROOT / "cli"), str(ROOT / "probes")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    target = "model.pt" if command == "analyze" else "model.h5"
    return subprocess.Popen(
        [sys.executable, "-B", "-m", "hessdiag_cli", command, target, *arguments],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, the latter without the frame of an error panel."""
    with process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, " ".join(err.replace("│", " ").split())


def parts(folder: Path) -> set[str]:
    """The finished blocks in the folder of the unfinished run."""
    return {path.name for path in (folder / "model.h5.parts").glob("block-*")}


def deviations(one: Run, other: Run, tolerance: float = 1e-12) -> list[str]:
    """Where two runs differ, times apart: any text, and any number beyond ``tolerance``."""
    found = [
        f"{path}: {left!r} {right!r}"
        for (path, left), (_, right) in zip(
            leaves(one.to_dict()), leaves(other.to_dict()), strict=True
        )
        if path[-1] != "seconds" and not close(left, right, tolerance)
    ]
    for ours, theirs in zip(one.blocks, other.blocks, strict=True):
        for variant, result in ours.variants.items():
            twin = theirs.variants[variant]
            for kind in ("spectrum", "rows"):
                mine, its = getattr(result, kind), getattr(twin, kind)
                if mine.keys() != its.keys():
                    found.append(f"{ours.name} {kind}: {set(mine) ^ set(its)}")
                found += [
                    f"{ours.name} {kind} {name}"
                    for name in mine.keys() & its.keys()
                    if not np.allclose(mine[name], its[name], rtol=tolerance, atol=0)
                ]
    for field in ("fingerprint", "config"):
        mine, its = (getattr(run.provenance, field) for run in (one, other))
        if mine != its:
            found.append(field)
    if one.provenance.environment["engine"] != other.provenance.environment["engine"]:
        found.append("engine")
    return found


def leaves(tree: Any, path: tuple[str, ...] = ()):
    """Every value of a document with its place."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def close(left: Any, right: Any, tolerance: float) -> bool:
    """Whether two values are the same, numbers within the tolerance."""
    if isinstance(left, float) and isinstance(right, float):
        return abs(left - right) <= tolerance * max(abs(left), abs(right))
    return left == right


def stored(folder: Path) -> Run:
    """The run or the unfinished one."""
    return open_run(folder / "model.h5")


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Put back the signal handlers that the entry point sets."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    kept = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, kept, strict=True):
            signal.signal(number, handler)
