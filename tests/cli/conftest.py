"""How the tests call a command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result


def invoke(command: Callable[..., Any], *arguments: str) -> Result:
    """Run one command's function as the app would; its errors come through as they are."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(autouse=True)
def no_asked_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runner's own terminal width is not the user's."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def call() -> Callable[..., Result]:
    """``call(command, *arguments)``."""
    return invoke
