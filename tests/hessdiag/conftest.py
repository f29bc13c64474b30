"""Small networks as test cases, and synthetic runs."""

from __future__ import annotations

from types import ModuleType

import pytest

import sample_networks
import sample_runs


@pytest.fixture
def networks() -> ModuleType:
    """The module of networks: its builders, ``lent`` and the oracles."""
    return sample_networks


@pytest.fixture(params=sample_networks.CASES)
def case(request: pytest.FixtureRequest):
    """Each network in turn."""
    return sample_networks.make(request.param)


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """The module of synthetic runs."""
    return sample_runs
