"""Several runs of one training: in which order, at which steps, as one document."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from hessdiag.run import Run

FORMAT = "hessdiag-runs"
VERSION = "1.0.0"

COUNTED = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt)s?[-_=. ]?(\d+)", re.IGNORECASE)


def step_of(run: Run) -> int | None:
    """The training step of a run: what its checkpoint says, else a number in its file name.

    A name counts with a word such as ``step-200``, or when it is nothing but a number: a seed, a
    size or an epoch is no step.
    """
    config = run.provenance.config
    step = config.get("step")
    if isinstance(step, int) and not isinstance(step, bool):
        return step
    return named_step(str(config.get("checkpoint") or ""))


def named_step(name: str) -> int | None:
    """The training step that a file name tells, or None."""
    stem = PurePath(name).stem if "." in name else name
    counted = COUNTED.findall(stem)
    if counted:
        return int(counted[-1])
    return int(stem) if stem.isdecimal() else None


def runs_document(runs: Sequence[Run]) -> dict[str, Any]:
    """One document of several runs, in their order; each is that of ``--json`` with its step."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "runs": [run.to_dict() | {"step": step_of(run)} for run in runs],
    }


def runs_json(runs: Sequence[Run]) -> str:
    """As :func:`runs_document`, as text."""
    return json.dumps(runs_document(runs), allow_nan=False, ensure_ascii=False)
