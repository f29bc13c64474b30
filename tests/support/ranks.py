"""Real ranks of one analysis: processes with the environment that torchrun gives them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("rank_program.py")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(size: int, *command: str, cwd: Path, **more: str) -> list[subprocess.Popen[str]]:
    """A process per rank, which runs ``python`` with these arguments."""
    inside = (ROOT, ROOT / "cli", ROOT / "probes", PROGRAM.parent)
    common = {
        "PYTHONPATH": os.pathsep.join(map(str, inside)),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "test",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-B", *command],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | more,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each rank, the latter without the frame of a panel."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            found.append((process.returncode, out, " ".join(err.replace("│", " ").split())))
    finally:
        for process in processes:  # ranks that wait for each other would do so for ever
            process.kill()
    return found


def analyze(size: int, folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """``hessdiag analyze model.pt`` on so many ranks."""
    return start(size, "-m", "hessdiag_cli", "analyze", "model.pt", *arguments, cwd=folder)


def run_program(size: int, folder: Path, **more: str) -> list[dict[str, Any]]:
    """What :mod:`rank_program` found, by rank."""
    import torch

    outcomes = finish(start(size, str(PROGRAM), str(folder), cwd=folder, **more))
    assert all(code == 0 for code, _, _ in outcomes), outcomes
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
