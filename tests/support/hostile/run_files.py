"""Run files that are damaged, edited, or lead elsewhere."""

# ruff: noqa: E501 - a case a line

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import sample_runs
from hessdiag.store import write_run
from hostile.texts import NAMES, damaged

Edit = Callable[[h5py.File], None]
PRIVATE = "private.h5"
"""A user's other file, beside the run; its numbers and its text must not be shown."""

PRIVATE_NUMBER = 31337.5
PRIVATE_TEXT = "the user's own words"
SEAL = 48
"""Bytes of the checksum behind the HDF5 data."""


@cache
def sound() -> bytes:
    """A small valid run file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.h5")
        write_run(sample_runs.small_run(), path)
        return path.read_bytes()


def unsealed() -> bytes:
    """The same without its checksum, as after an edit through HDF5."""
    return sound()[:-SEAL]


def write_private(folder: Path) -> None:
    """Lay a file into ``folder`` that no link in a run file may lead to."""
    with h5py.File(folder / PRIVATE, "w") as file:
        file["numbers"] = np.full((3, 1), PRIVATE_NUMBER)
        file["texts"] = np.array([PRIVATE_TEXT] * 3, dtype=h5py.string_dtype())
        file.create_group("summary")["kappa"] = np.full((3, 1), PRIVATE_NUMBER)
    (folder / "raw.bin").write_bytes(np.full(3, PRIVATE_NUMBER).tobytes())


def edit(path: Path, change: Edit) -> None:
    """Write the sound run at ``path`` and change it through HDF5, which drops the checksum."""
    path.write_bytes(unsealed())
    with h5py.File(path, "r+") as file:
        change(file)


def edits() -> dict[str, Edit]:
    """What somebody else's program, or somebody else, may do to a run file."""
    made: dict[str, Edit] = {
        "no attributes": lambda f: f.attrs.clear(),
        "no groups": lambda f: f.clear(),
        "no summary": _deleted("summary"),
        "no blocks": _deleted("summary/block"),
        "no kappa": _deleted("summary/kappa"),
        "no provenance": _deleted("provenance"),
        "no fingerprint": _deleted("provenance/fingerprint"),
        "no spectra": _deleted("spectra"),
        "summary is a dataset": _replaced("summary", 3),
        "a coordinate is a group": _group("summary/block"),
        "kappa is a group": _group("summary/kappa"),
        "kappa is text": _replaced("summary/kappa", np.full((3, 1), "big", dtype=object)),
        "kappa is an int": _replaced("summary/kappa", np.ones((3, 1), dtype=int)),
        "kappa is complex": _replaced("summary/kappa", np.full((3, 1), 1j)),
        "kappa is a record": _replaced("summary/kappa", np.zeros((3, 1), [("a", "f8")])),
        "kappa is a scalar": _replaced("summary/kappa", 1.0),
        "kappa is short": _replaced("summary/kappa", np.ones((2, 1))),
        "kappa is empty": _replaced("summary/kappa", h5py.Empty("f8")),
        "kappa is infinite": _replaced("summary/kappa", np.full((3, 1), np.inf)),
        "kappa is NaN": _replaced("summary/kappa", np.full((3, 1), np.nan)),
        "kappa is negative": _replaced("summary/kappa", np.full((3, 1), -1.0)),
        "kappa is huge": _replaced("summary/kappa", np.full((3, 1), 1.7e308)),
        "kappa is a reference": _reference,
        "kappa would be a petabyte": _petabyte("summary/kappa", (1 << 40, 1 << 7)),
        "block names would be a petabyte": _petabyte("summary/block", (1 << 47,)),
        "size is negative": _replaced("summary/size", np.full((3, 1), -5)),
        "size is huge": _replaced("summary/size", np.full((3, 1), 1 << 62)),
        "a status is unknown": _replaced("summary/kappa_status", _texts("certain")),
        "a status is hostile": _replaced("summary/kappa_status", _texts("\x1b[31m")),
        "a bool is seven": _replaced("summary/ambiguous", np.full((3, 1), 7, dtype="i1")),
        "parameters are no JSON": _replaced("summary/parameters", _texts("[", 1)),
        "parameters are numbers": _replaced("summary/parameters", _texts("[1, 2]", 1)),
        "parameters are deep": _replaced("summary/parameters", _texts("[" * 100_000, 1)),
        "blocks have one name": _replaced("summary/block", _texts("0", 1)),
        "the variant is not raw": _replaced("summary/variant", _texts("cooked", 1)[:1]),
        "the variant is empty": _replaced("summary/variant", _texts("", 1)[:1]),
        "the variant climbs": _replaced("summary/variant", _texts("../summary", 1)[:1]),
        "no variants": _replaced("summary/variant", _texts("", 1)[:0]),
        "notes are no JSON": _replaced("summary/notes", _texts("{")),
        "notes are a number": _replaced("summary/notes", _texts("3")),
        "notes are hostile": _replaced("summary/notes", _texts(json.dumps(list(NAMES.values())))),
        "a skipped reason is hostile": _replaced("summary/skipped", _texts("\x1b[31m[red]\n")),
        "the quantiles are others": _replaced("summary/quantile", np.array([0.1, 0.2])),
        "the quantiles are NaN": _replaced("summary/quantile", np.full(2, np.nan)),
        "config is a list": _replaced("provenance/config", "[]"),
        "config is no JSON": _replaced("provenance/config", "{"),
        "config is deep": _replaced("provenance/config", "[" * 100_000),
        "config is bytes": _replaced("provenance/config", np.bytes_(b"\xff\xfe")),
        "config is a number": _replaced("provenance/config", 3.0),
        "config is confused": _replaced("provenance/config", json.dumps(CONFUSED)),
        "config holds NaN": _replaced("provenance/config", '{"weight_decay": NaN, "a": Infinity}'),
        "config is hostile": _replaced("provenance/config", json.dumps({"task": "\x1b[31m\n[red]"})),
        "environment is confused": _replaced("provenance/environment", json.dumps(ENVIRONMENT)),
        "warnings are numbers": _replaced("provenance/warnings", "[1, null, {}]"),
        "warnings are hostile": _replaced("provenance/warnings", json.dumps(list(NAMES.values()))),
        "fingerprint is confused": _replaced("provenance/fingerprint", '{"weights": [], "loss": {}}'),
        "a huge text": _replaced("provenance/warnings", json.dumps(["x" * 3_000_000])),
        "an eigenvalue is text": _replaced("spectra/raw/0/eigenvalue", np.array(["a"], dtype=object)),
        "eigenvalues are a matrix": _replaced("spectra/raw/0/eigenvalue", np.ones((2, 2))),
        "an index is a name": lambda f: f.move("spectra/raw/0", "spectra/raw/zero"),
        "a link to a file": _linked("summary/kappa", h5py.ExternalLink(PRIVATE, "/numbers")),
        "a link to a group": _linked("summary", h5py.ExternalLink(PRIVATE, "/summary")),
        "a link to texts": _linked("summary/block", h5py.ExternalLink(PRIVATE, "/texts")),
        "a link to nowhere": _linked("summary/kappa", h5py.ExternalLink("gone.h5", "/x")),
        "a soft link to nowhere": _linked("summary/kappa", h5py.SoftLink("/nowhere")),
        "a soft link to itself": _linked("summary/kappa", h5py.SoftLink("/summary/kappa")),
        "a soft link to another": _linked("summary/kappa", h5py.SoftLink("/summary/lambda_max")),
        "a cycle of groups": lambda f: f["summary"].__setitem__("again", f["/"]),
        "a virtual dataset": _virtual,
        "external storage": _external,
        "a filter nobody has": _unknown_filter,
    }  # fmt: skip
    for name, text in NAMES.items():
        if "\0" not in text and "\ud800" not in text:
            made[f"a block called {name}"] = _replaced("summary/block", _texts(text, 1))
            made[f"a variant called {name}"] = _replaced("summary/variant", _texts(text, 1)[:1])
    for version in (
        "",
        "2.0.0",
        "1",
        "0.9",
        "1.0.0.0",
        "one",
        "\x1b[31m",
        "9" * 5000,
        1,
        1.5,
        [1, 0],
        b"\xff",
    ):
        made[f"version {str(version)[:9]!r}"] = _attribute("encoding-version", version)
    for kind in ("", "hessdiag", 7, [1.0], b"\xff"):
        made[f"type {kind!r}"] = _attribute("encoding-type", kind)
    for date in ("", "\x1b[31m", 3, [1, 2], "9" * 60_000):
        made[f"date {str(date)[:9]!r}"] = _attribute("created_at", date)
    return made


CONFUSED = {
    **{"task": [1], "checkpoint": {"a": 1}, "curvature": None, "device": 3, "seed": "x"},
    **{"weight_decay": "much", "max_examples": [1], "mode": {}, "blocks": 3, "variants": "raw"},
}
ENVIRONMENT = {"engine": [1], "checks": 3, "timings": "x", "failed": 7, "torch": None, "seconds": 3}


def _texts(text: str, dimensions: int = 2) -> Any:
    return np.full((3,) if dimensions == 1 else (3, 1), text, dtype=object)


def _deleted(name: str) -> Edit:
    def change(file: h5py.File) -> None:
        del file[name]

    return change


def _replaced(name: str, value: Any) -> Edit:
    """The dataset with other content, its labels and scales kept as far as they fit."""

    def change(file: h5py.File) -> None:
        old = file[name]
        labels = dict(old.attrs) if isinstance(old, h5py.Dataset) else {}
        del file[name]
        kind = h5py.string_dtype() if getattr(value, "dtype", None) == np.dtype(object) else None
        new = file.create_dataset(name, data=value, dtype=kind)
        for label in ("units", "long_name"):
            if label in labels:
                new.attrs[label] = labels[label]

    return change


def _group(name: str) -> Edit:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_group(name)

    return change


def _attribute(name: str, value: Any) -> Edit:
    return lambda file: file.attrs.__setitem__(name, value)


def _linked(name: str, link: h5py.ExternalLink | h5py.SoftLink) -> Edit:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = link

    return change


def _petabyte(name: str, shape: tuple[int, ...]) -> Edit:
    def change(file: h5py.File) -> None:
        kind = file[name].dtype
        del file[name]
        file.create_dataset(name, shape=shape, dtype=kind, chunks=(1 << 7,) * len(shape))

    return change


def _reference(file: h5py.File) -> None:
    del file["summary/kappa"]
    held = file.create_dataset("summary/kappa", shape=(3, 1), dtype=h5py.ref_dtype)
    held[0, 0] = file["summary"].ref


def _virtual(file: h5py.File) -> None:
    del file["summary/kappa"]
    layout = h5py.VirtualLayout((3, 1), "f8")
    layout[:] = h5py.VirtualSource(PRIVATE, "numbers", (3, 1))
    file.create_virtual_dataset("summary/kappa", layout)


def _external(file: h5py.File) -> None:
    del file["summary/kappa"]
    where = [("raw.bin", 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("summary/kappa", shape=(3, 1), dtype="f8", external=where)


def _unknown_filter(file: h5py.File) -> None:
    del file["summary/kappa"]
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((3, 1))
    settings.set_filter(32000, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple((3, 1))
    h5py.h5d.create(file["summary"].id, b"kappa", h5py.h5t.NATIVE_DOUBLE, space, settings)


def accident(rng: random.Random, *, sealed: bool) -> bytes:
    """A sound run file after one accident."""
    return damaged(sound() if sealed else unsealed(), rng)
