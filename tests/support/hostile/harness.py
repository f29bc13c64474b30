"""Calls the command line in a folder, and notes all that it did there."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[3]
SECONDS = 20.0
"""A case that takes longer hangs."""

HUNG = -1
"""The exit code of what had to be killed."""

STREAMS = ("stdout", "stderr")


@dataclass(frozen=True)
class Outcome:
    """What one call of the command line answered and did.

    Attributes:
        arguments: The command line.
        code: Its exit code; negative where it hung (``HUNG``) or a signal killed it (below -1000).
        stdout: What it printed.
        stderr: What it said.
        before: Every path of the folder before the call, with a digest of what it holds.
        after: The same after the call.
    """

    arguments: tuple[str, ...]
    code: int
    stdout: str
    stderr: str
    before: Mapping[str, str]
    after: Mapping[str, str]

    @property
    def document(self) -> Any:
        """The JSON on stdout; NaN and Infinity are no JSON."""
        return json.loads(self.stdout, parse_constant=_no_json)

    @property
    def made(self) -> set[str]:
        """Paths that are new."""
        return self.after.keys() - self.before.keys()

    @property
    def changed(self) -> set[str]:
        """Paths that were there and are gone or hold something else."""
        return {name for name, held in self.before.items() if self.after.get(name) != held}


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


class Hessdiag:
    """The command line, started once; a context manager."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        paths = [ROOT / "tests" / "support", ROOT, ROOT / "cli", ROOT / "probes"]
        inherited = [path for path in sys.path if path]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*map(str, paths), *inherited]),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for name in ("COLUMNS", "HESSDIAG_TASK", "FORCE_COLOR"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hostile.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=scratch,
            text=True,
        )
        self._answer()

    def __enter__(self) -> Hessdiag:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=SECONDS)
        self._process.stdout.close()

    def __call__(self, folder: Path, *arguments: str, file_size: int | None = None) -> Outcome:
        """Run ``hessdiag ARGUMENTS`` with ``folder`` as the working directory.

        Args:
            folder: Also what is looked over before and after.
            *arguments: The command line without its first word.
            file_size: Most bytes that a file may get, as a quota would have it.
        """
        return self._ask(folder, arguments, file_size=file_size)

    def weights(self, path: Path) -> Outcome:
        """Digests of the tensors that the library reads from a checkpoint, as JSON."""
        return self._ask(path.parent, ("--json",), read=path.name)

    def _ask(
        self,
        folder: Path,
        arguments: tuple[str, ...],
        *,
        file_size: int | None = None,
        read: str | None = None,
    ) -> Outcome:
        before = contents(folder)
        streams = {name: str(self._scratch / name) for name in STREAMS}
        request = {
            "arguments": arguments,
            "folder": str(folder),
            "read": read,
            "file_size": file_size,
            "seconds": SECONDS,
            **streams,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._answer())["code"]
        said = {
            name: Path(path).read_bytes().decode(errors="backslashreplace")
            for name, path in streams.items()
        }
        return Outcome(arguments, code, **said, before=before, after=contents(folder))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the server of the fuzz died")
        return line


def contents(folder: Path) -> dict[str, str]:
    """Every path below ``folder``, with its kind and a digest of what it holds."""
    found: dict[str, str] = {}
    for parent, names, files in os.walk(folder):
        for name in (*names, *files):
            path = Path(parent, name)
            if name == "__pycache__" or "__pycache__" in path.parts:
                continue
            found[str(path.relative_to(folder))] = _digest(path)
    return found


def _digest(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"link to {os.readlink(path)}"  # noqa: PTH115 - as it is written
    if not stat.S_ISREG(mode):
        return f"kind {stat.S_IFMT(mode):o}"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except PermissionError:
        return "closed"
