"""Import a user's own Python, and say where in it an error came from."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from hessdiag.errors import TaskError

T = TypeVar("T")


@contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """Let modules in ``folder`` be imported by their names within this context."""
    entry = str(folder)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def import_file(path: Path) -> ModuleType:
    """Run a Python file as a module whose name cannot clash with an installed one.

    Raises:
        TaskError: The file cannot be run; where and why.
    """
    name = f"_hessdiag_task_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        guarded(lambda: spec.loader.exec_module(module), path)  # type: ignore[union-attr]
    except TaskError:
        del sys.modules[name]
        raise
    return module


def import_named(name: str) -> ModuleType:
    """Import ``pkg.mod``.

    Raises:
        TaskError: It does not exist, or raises when it is imported.
    """
    try:
        return guarded(lambda: importlib.import_module(name), None)
    except TaskError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{name}.".startswith(f"{cause.name}."):
            raise TaskError(
                f"there is no module {cause.name!r} to take the task from; run in the folder that "
                "holds it, or give the file: --task FILE.py"
            ) from cause
        raise


def guarded(call: Callable[[], T], path: Path | None) -> T:
    """Run the user's code; what it raises becomes a TaskError that says where.

    Args:
        call: The user's code.
        path: The user's file, if the task is one: its own lines are named before those of
            the libraries that it calls.
    """
    try:
        return call()
    except (Exception, SystemExit) as error:
        reason = str(error) if isinstance(error, TaskError) else _described(error)
        raise TaskError(f"{_place(error, path)}{reason}") from error


def _described(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    try:
        words = str(error)
    except Exception:  # it is the user's class
        words = ""
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _place(error: BaseException, path: Path | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    own = Path(__file__).parent
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith("<") and own not in Path(f.filename).parents
    ]
    in_file = [f for f in frames if path is not None and Path(f.filename) == path]
    user = in_file or [f for f in frames if "site-packages" not in f.filename] or frames
    return f"{user[-1].filename}:{user[-1].lineno}: " if user else ""
