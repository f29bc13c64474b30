"""transformers, borrowed: offline, quiet, and only when a Hugging Face directory is analysed."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from hessdiag.errors import MissingExtra

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@contextmanager
def transformers() -> Iterator[Any]:
    """The library, for the length of a ``with``: it fetches nothing, and its chatter is off.

    Raises:
        MissingExtra: It is not installed, or cannot be imported.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if not _imports("torchvision"):
            # transformers imports it wherever it is installed, and language models need none.
            stack.enter_context(_entry(sys.modules, "torchvision", None))
        library, hub = _library()
        # Only now: what reads these while it is imported would keep them for ever.
        for name in OFFLINE:
            stack.enter_context(_entry(os.environ, name, "1"))
        stack.enter_context(_entry(vars(hub), "HF_HUB_OFFLINE", True))
        stack.callback(library.logging.set_verbosity, library.logging.get_verbosity())
        library.logging.set_verbosity_error()
        yield library


@contextmanager
def _entry(table: MutableMapping[str, Any], name: str, value: Any) -> Iterator[None]:
    """One entry of a table, put back afterwards; nothing else in it is touched."""
    there, before = name in table, table.get(name)
    table[name] = value
    try:
        yield
    finally:
        if there:
            table[name] = before
        else:
            del table[name]


def _library() -> tuple[ModuleType, ModuleType]:
    """transformers, and what says whether the hub may be asked."""
    try:
        library = importlib.import_module("transformers")
        importlib.import_module("transformers.utils.hub")
        return library, importlib.import_module("huggingface_hub.constants")
    except ImportError as error:
        raise MissingExtra(
            "a Hugging Face directory needs transformers, which cannot be imported "
            f"({error}); install it with\n  pip install 'hessdiag[hf]'\n"
            "or write a task that builds the model: hessdiag init"
        ) from error


def _imports(name: str) -> bool:
    """Whether a module is missing or works; a build for another torch is there and does not."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return error.name == name
    except Exception:
        return False
    return True
