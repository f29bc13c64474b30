"""Small networks as test cases, with a dense float64 oracle of each."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"hessdiag_tests_{name}", Path(__file__).with_name(f"{name}.py")
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


NETWORKS = _load("networks")


@pytest.fixture
def networks() -> ModuleType:
    """The module of networks: its builders, ``lent`` and the oracles."""
    return NETWORKS


@pytest.fixture(params=NETWORKS.CASES)
def case(request: pytest.FixtureRequest):
    """Each network in turn."""
    return NETWORKS.make(request.param)
