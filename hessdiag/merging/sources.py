"""The runs that are merged: where they are, and the command that makes one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from hessdiag.errors import StoreError
from hessdiag.finished import finished_rows
from hessdiag.options import Options
from hessdiag.run import Run
from hessdiag.shard import Shard, shard_of
from hessdiag.store.folder import HEADER, parts_folder
from hessdiag.store.journal import is_unfinished, open_run
from hessdiag.store.write import check_target

OF_THE_MACHINE = {"engine", "memory_budget", "device", "max_seconds", "shard"}
"""Options that another shard may have otherwise."""


@dataclass(frozen=True)
class Source:
    """One of the runs, and where it is."""

    path: Path
    run: Run

    @cached_property
    def shard(self) -> Shard | None:
        """Which; None for a run of all blocks."""
        return shard_of(self.run)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of its analysis."""
        return self.run.provenance.fingerprint

    @cached_property
    def settled(self) -> frozenset[tuple[str, str]]:
        """Rows that need not be computed again."""
        return frozenset(finished_rows(self.run))

    def record(self, name: str) -> Any:
        """A part of the environment, or None."""
        return self.run.provenance.environment.get(name)


def check_place(output: Path, paths: Sequence[Path], *, force: bool) -> None:
    """Refuse an ``output`` that must not be written, before any work.

    Raises:
        StoreError: It is taken, one of the runs themselves, or an analysis is under way there.
    """
    if any(output.resolve() == path.resolve() for path in paths):
        raise StoreError(f"{output} is one of the runs to merge; choose another name with -o")
    check_target(output, force=force)
    folder = parts_folder(output)
    if os.path.lexists(folder / HEADER):
        raise StoreError(
            f"{folder} holds an unfinished analysis; finish it by the same command, remove that "
            "folder, or choose another name with -o"
        )


def named_once(paths: Sequence[Path]) -> Sequence[Path]:
    """``paths``, no file twice.

    Raises:
        StoreError: One is named twice.
    """
    seen: set[Path] = set()
    for path in paths:
        where = path.resolve()
        if where in seen:
            raise StoreError(f"{path} is named twice; name every run once")
        seen.add(where)
    return paths


def opened(path: Path) -> Source:
    """The finished run at ``path``.

    Raises:
        StoreError: It is unfinished, or none.
    """
    unfinished = is_unfinished(path)
    run = open_run(path)
    if unfinished:
        told = run.provenance.warnings[0].partition(";")[0]
        raise StoreError(f"{path} is {told}; finish it first: {command(run, shard_of(run))}")
    return Source(path, run)


def command(run: Run, shard: Shard | None) -> str:
    """The command line that makes a run like this one, as far as the file tells it."""
    config = run.provenance.config
    words = ["hessdiag", "analyze", str(config.get("checkpoint") or "CKPT")]
    for option in fields(Options):
        value = config.get(option.name)
        default = list(option.default) if isinstance(option.default, tuple) else option.default
        if option.name in OF_THE_MACHINE or value is None or value == default:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(f"--{option.name.replace('_', '-')}")
        words += [] if value is True else [text]
    words += [] if shard is None else ["--shard", str(shard)]
    return f"`{shlex.join(words)}`, with the checkpoint and the task of the others"
