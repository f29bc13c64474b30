"""The synthetic runs, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

import sample_runs
from hessdiag.store import write_run


@pytest.fixture(scope="session")
def small_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "run.h5"
    write_run(sample_runs.small_run(), path)
    return path.read_bytes()


@pytest.fixture
def small_file(small_bytes, tmp_path) -> Path:
    path = tmp_path / "run.h5"
    path.write_bytes(small_bytes)
    return path


@pytest.fixture
def edited(small_file) -> Callable[[Callable[[h5py.File], None]], Path]:
    """A small run after ``edit(file)``, as a script in any language could leave it."""

    def make(edit: Callable[[h5py.File], None]) -> Path:
        with h5py.File(small_file, "r+") as file:
            edit(file)
        return small_file

    return make
