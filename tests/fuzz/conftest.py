"""One command line for all of the fuzz, and a folder to run it in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile.checkpoints import TASK, saved, state
from hostile.harness import Hessdiag

PRECIOUS = "the user's own words"


@pytest.fixture(scope="session")
def hessdiag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hessdiag]:
    """The command line; each call is a process of its own."""
    with Hessdiag(tmp_path_factory.mktemp("streams")) as command:
        yield command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a task, a checkpoint that fits it, and a file of the user's."""
    (tmp_path / "hessdiag_task.py").write_text(TASK)
    (tmp_path / "model.pt").write_bytes(saved(state()))
    (tmp_path / "keep.txt").write_text(PRECIOUS)
    return tmp_path
