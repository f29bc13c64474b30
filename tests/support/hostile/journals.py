"""Folders of unfinished analyses that are damaged, mixed up, or lead elsewhere."""

# ruff: noqa: E501 - a case a line

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from hessdiag.store.seal import seal
from hostile.texts import NAMES, damage_file

SEAL = 48
Edit = Callable[[Path], object]
"""Does something to ``out.h5.parts``."""


def resealed(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the JSON line of a part and seal it again, as an editor with intent would."""
    line, _, rest = path.read_bytes()[:-SEAL].partition(b"\n")
    document = json.loads(line)
    changed = change(document)
    content = json.dumps(document if changed is None else changed).encode() + b"\n" + rest
    path.write_bytes(content + seal(content))


def rewritten(path: Path, content: bytes) -> None:
    """Put other content under a valid seal."""
    path.write_bytes(content + seal(content))


def _entry(name: str, key: str, value: object) -> Edit:
    return lambda folder: resealed(_one(folder, name), lambda d: d.__setitem__(key, value))


def _one(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def _value(field: str, cells: object) -> Edit:
    def change(document: dict[str, object]) -> None:
        values = document["values"]
        assert isinstance(values, dict)
        values[field] = cells

    return lambda folder: resealed(_one(folder, "block-*"), change)


def _link(name: str, target: str) -> Edit:
    def change(folder: Path) -> None:
        path = _one(folder, name)
        path.unlink()
        path.symlink_to(target)

    return change


def _swapped(folder: Path) -> None:
    first, second = sorted(folder.glob("block-*"))[:2]
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def _directory(name: str) -> Edit:
    def change(folder: Path) -> None:
        path = _one(folder, name)
        path.unlink()
        path.mkdir()

    return change


def _fifo(name: str) -> Edit:
    def change(folder: Path) -> None:
        path = _one(folder, name)
        path.unlink()
        os.mkfifo(path)

    return change


def _somebody_elses(folder: Path) -> None:
    folder.mkdir()
    (folder / "a").write_text("x")


def _whole_folder(make: Callable[[Path], object]) -> Edit:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        make(folder)

    return change


def edits() -> dict[str, Edit]:
    """What may have become of the folder; after each, nothing of it may be taken on trust."""
    header, block, matrix = "header", "block-*", "whole-matrix"
    made: dict[str, Edit] = {
        "untouched": lambda folder: None,
        "no header": lambda folder: (folder / header).unlink(),
        "no lock": lambda folder: (folder / "lock").unlink(missing_ok=True),
        "an empty header": lambda folder: (folder / header).write_bytes(b""),
        "an empty part": lambda folder: _one(folder, block).write_bytes(b""),
        "a header of zeros": lambda folder: (folder / header).write_bytes(bytes(500)),
        "a part swapped with another": _swapped,
        "a part copied to another index": lambda folder: shutil.copy(_one(folder, block), folder / "block-0099-raw.part"),
        "a part copied to another variant": lambda folder: shutil.copy(_one(folder, block), folder / "block-0000-cooked.part"),
        "the header as a part": lambda folder: shutil.copy(folder / header, _one(folder, block)),
        "a part as the header": lambda folder: shutil.copy(_one(folder, block), folder / header),
        "a part as the matrix": lambda folder: shutil.copy(_one(folder, block), folder / matrix),
        "a stranger's file": lambda folder: (folder / "thesis.tex").write_text("words"),
        "a stranger's folder": lambda folder: (folder / "thesis").mkdir(),
        "a temporary file": lambda folder: (folder / f".hessdiag-{'0' * 16}.tmp").write_bytes(b"x"),
        "a temporary folder": lambda folder: (folder / f".hessdiag-{'0' * 16}.tmp").mkdir(),
        "a hostile file name": lambda folder: (folder / "\x1b[31m\n").write_text("x"),
        "a part that is a link": _link(block, "../keep.txt"),
        "a part that is a dangling link": _link(block, "nowhere"),
        "a part that is a loop": lambda folder: _link(block, _one(folder, block).name)(folder),
        "a header that is a link": _link(header, "../keep.txt"),
        "a lock that is a link": _link("lock", "../keep.txt"),
        "a part that is a folder": _directory(block),
        "a header that is a folder": _directory(header),
        "a lock that is a folder": _directory("lock"),
        "a part that is a FIFO": _fifo(block),
        "a header that is a FIFO": _fifo(header),
        "a lock that is a FIFO": _fifo("lock"),
        "the folder is a file": _whole_folder(lambda folder: folder.write_bytes(b"x")),
        "the folder is a link": _whole_folder(lambda folder: folder.symlink_to(folder.parent)),
        "the folder is a loop": _whole_folder(lambda folder: folder.symlink_to(folder)),
        "the folder is empty": _whole_folder(Path.mkdir),
        "the folder is somebody else's": _whole_folder(_somebody_elses),
        "a sealed part of nothing": lambda folder: rewritten(_one(folder, block), b""),
        "a sealed part of a line": lambda folder: rewritten(_one(folder, block), b"\n"),
        "a sealed list": lambda folder: rewritten(_one(folder, block), b"[]\n"),
        "a sealed number": lambda folder: rewritten(folder / header, b"7\n"),
        "sealed nesting": lambda folder: rewritten(_one(folder, block), b"[" * 100_000 + b"\n"),
        "a sealed header of nesting": lambda folder: rewritten(folder / header, b"[" * 100_000 + b"\n"),
        "sealed bytes": lambda folder: rewritten(_one(folder, block), b"\xff\xfe\n"),
        "a foreign format": _entry(block, "format", "pdf"),
        "another version": _entry(block, "version", "2.0.0"),
        "a version of a list": _entry(header, "version", [1]),
        "a header of ints": _entry(header, "blocks", 3),
        "a header of hostile names": _entry(header, "blocks", list(NAMES.values())[:3]),
        "a header with one block": _entry(header, "blocks", ["0"]),
        "a header whose blocks are lists": _entry(header, "blocks", [["0"], ["2"]]),
        "a header with another variant": _entry(header, "variants", ["cooked"]),
        "a header of no fingerprint": _entry(header, "fingerprint", None),
        "a header whose config is a list": _entry(header, "config", []),
        "a header of a hostile date": _entry(header, "created_at", "\x1b[31m"),
        "a header of an int date": _entry(header, "created_at", 3),
        "a header of a hostile release": _entry(header, "hessdiag_version", "\x1b[31m"),
        "a header with entries too many": _entry(header, "extra", 1),
        "a part of another run": _entry(block, "fingerprint", {"weights": "other"}),
        "a part of no fingerprint": _entry(block, "fingerprint", None),
        "a part whose fingerprint is a list": _entry(block, "fingerprint", [1, 2]),
        "a part whose block is a list": _entry(block, "block", ["0"]),
        "a part whose block is unknown": _entry(block, "block", "\x1b[31m"),
        "a part whose parameters are a number": _entry(block, "parameters", 3),
        "a part whose parameters are numbers": _entry(block, "parameters", [1, None]),
        "a part whose variant is null": _entry(block, "variant", None),
        "a part whose engine is a list": _entry(block, "engine", []),
        "a part whose seconds are text": _entry(block, "seconds", "long"),
        "a part whose limit is text": _entry(block, "max_seconds", "never"),
        "a part of no values": _entry(block, "values", {}),
        "values of null": _entry(block, "values", None),
        "kappa of text": _value("kappa", ["a", "b", "c", "exact", "d"]),
        "kappa of three cells": _value("kappa", [1.0, 2.0, 3.0]),
        "kappa of null": _value("kappa", None),
        "kappa of an unknown status": _value("kappa", [1.0, 1.0, 1.0, "certain", 1.0]),
        "a size of text": _value("size", ["many"]),
        "a negative size": _value("size", [-9]),
        "notes of numbers": _value("notes", [3]),
        "quantiles of nothing": _value("kappa_quantile", {}),
        "arrays of nowhere": _entry(block, "arrays", {"../x": ["<f8", [1]]}),
        "arrays of a petabyte": _entry(block, "arrays", {"rows/norm": ["<f8", [1 << 47]]}),
        "arrays of a negative length": _entry(block, "arrays", {"rows/norm": ["<f8", [-1]]}),
        "arrays of objects": _entry(block, "arrays", {"rows/norm": ["|O", [1]]}),
        "arrays of text": _entry(block, "arrays", {"rows/norm": "many"}),
        "arrays of a list": _entry(block, "arrays", []),
        "no arrays": _entry(block, "arrays", {}),
    }  # fmt: skip
    return made


def accident(folder: Path, rng: random.Random) -> None:
    """Let one accident happen to one file of the folder."""
    damage_file(rng.choice(sorted(p for p in folder.iterdir() if p.stat().st_size)), rng)
