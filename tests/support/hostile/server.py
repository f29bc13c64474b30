"""Runs the command line many times: imports once, then a fork for each request.

A child that crashes, hangs or changes its own state harms no other. Requests are lines of JSON
on stdin, answers lines of JSON on stdout.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from hostile.harness import HUNG

PRELOADED = (
    *("hessdiag_cli.app", "hessdiag.analysis", "hessdiag.checkpoint", "hessdiag.diff"),
    *("hessdiag.resolve", "hessdiag.store", "hessdiag.tables", "rich.panel", "rich.progress"),
)


def serve() -> None:
    """Answer requests until stdin ends."""
    import torch

    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    _warm_up()
    gc.collect()
    gc.freeze()  # what every child shares stays shared
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request)
        answer = {"code": _wait(child, request["seconds"])}
        print(json.dumps(answer), flush=True)


def _warm_up() -> None:
    """One sound analysis, which imports what is imported late."""
    import torch

    from hostile.checkpoints import TASK, saved, training

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    streams, here = (sys.stdout, sys.stderr), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            sys.stdout = sys.stderr = io.StringIO()
            Path("hessdiag_task.py").write_text(TASK)
            Path("model.pt").write_bytes(saved(training()))
            for command in ("analyze model.pt", "show model.h5", "inspect model.pt", "show gone"):
                sys.argv = ["hessdiag", *command.split()]
                with contextlib.suppress(SystemExit):
                    _call()
        finally:
            sys.stdout, sys.stderr = streams
            os.chdir(here)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in [name for name in sys.modules if name.startswith("_hessdiag_task_")]:
        del sys.modules[name]
    torch.manual_seed(0)


def _run(request: dict[str, Any]) -> None:
    """The child: one call of the entry point, with its own streams, folder and memory."""
    import faulthandler
    import resource

    code = 70
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        out = os.open(request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        err = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for source, target in ((null, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        os.chdir(request["folder"])
        faulthandler.enable()
        faulthandler.dump_traceback_later(request["seconds"] * 0.9)
        if request["file_size"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
        sys.argv = ["hessdiag", *request["arguments"]]
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        for number, name in ((1, "stdout"), (2, "stderr")):
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        code = _weights(request["read"]) if request["read"] else _call()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _call() -> int:
    from hessdiag_cli.__main__ import main

    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def _weights(path: str) -> int:
    """Print a digest of each tensor that the library reads from a checkpoint."""
    from hashlib import sha256

    from hessdiag.checkpoint import read_checkpoint
    from hessdiag.errors import CheckpointError

    try:
        weights = read_checkpoint(path).weights
    except CheckpointError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    raw = {name: tensor.contiguous().numpy().tobytes() for name, tensor in weights.items()}
    print(json.dumps({name: sha256(content).hexdigest() for name, content in raw.items()}))
    return 0


def _wait(child: int, seconds: float) -> int:
    """The child's exit code; minus the signal that ended it; ``HUNG`` where we had to."""
    deadline = time.monotonic() + seconds
    pause = 0.001
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else code - 1000
        time.sleep(pause)
        pause = min(pause * 1.2, 0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return HUNG


if __name__ == "__main__":
    serve()
