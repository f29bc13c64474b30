"""The names a pickle would import, read from its opcodes without running it."""

from __future__ import annotations

import pickletools
import re
import warnings
from pathlib import Path
from typing import IO

import torch

LEGACY_PICKLES = 5
"""torch's legacy file: magic number, protocol, system, the object, the keys of its storages."""

_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING"}
_HARMLESS = re.compile(
    r"(collections\.(OrderedDict|defaultdict|Counter)|_codecs\.encode"
    r"|torch\.(_utils|_tensor)\._rebuild\w*|torch\.nn\.parameter\.(Parameter|Buffer)"
    r"|torch\.(storage\.)?\w*Storage|torch\.(Size|Tensor|device)"
    r"|torch\.(serialization\._get_layout|strided)"
    r"|torch\.b?(float|complex|q?u?int)\d\w*|torch\.bool)"
)


def refused_globals(path: Path, *, legacy: bool) -> list[str]:
    """What keeps the safe reader from loading this torch file, each as ``module.name``, sorted.

    Empty where torch cannot follow the pickle.
    """
    if not legacy:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # whatever its unpickler makes of bytes that are no pickle
            return []
    with path.open("rb") as file:
        found = {name for _ in range(LEGACY_PICKLES) for name in imported_names(file)}
    return sorted(name for name in found if not _HARMLESS.fullmatch(name))


def imported_names(file: IO[bytes]) -> set[str]:
    """All ``module.name`` that the pickle at the file's position would import.

    A damaged pickle yields the names up to the damage.
    """
    names: set[str] = set()
    texts: list[str] = []  # strings in the order pushed: STACK_GLOBAL takes the last two
    memo: dict[int, str] = {}
    last: str | None = None
    try:
        for op, arg, _ in pickletools.genops(file):
            if op.name in ("GLOBAL", "INST"):
                names.add(str(arg).replace(" ", "."))
                last = None
            elif op.name == "STACK_GLOBAL":
                names.add(".".join(texts[-2:]))
                last = None
            elif op.name in _TEXT:
                last = str(arg)
                texts.append(last)
            elif op.name == "MEMOIZE":
                memo[len(memo)] = last or ""
            elif op.name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[int(arg or 0)] = last or ""
            elif op.name in ("BINGET", "LONG_BINGET", "GET"):
                last = memo.get(int(arg or 0))
                texts.extend([last] if last else [])
            else:
                last = None
    except (ValueError, EOFError, UnicodeDecodeError):
        pass
    return names
