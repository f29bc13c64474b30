"""The contract that every answer keeps, whatever went in."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from fnmatch import fnmatch

from hostile.harness import HUNG, Outcome

CODES = frozenset({0, 1, 2, 3, 4, 5})
REFUSED = frozenset({2, 5})
MARKER = "EXECUTED"
"""The file that hostile code would write, were it run."""

TRACES = (
    "Traceback (most recent call last)",
    "internal error",
    "Fatal Python error",
    "Stack (most",
)


def faults(outcome: Outcome, *, writes: Iterable[str] = (), codes: Iterable[int] = ()) -> list[str]:
    """Every way in which an answer breaks the contract; empty when it keeps it.

    Args:
        outcome: The answer.
        writes: Patterns of the paths that the command may make, change or remove.
        codes: Exit codes that are right here, too.
    """
    found = []
    said = outcome.stdout + outcome.stderr
    if outcome.code == HUNG:
        found.append("it hung")
    elif outcome.code not in {*CODES, *codes}:
        found.append(f"exit code {outcome.code}")
    found += [f"it printed {trace!r}" for trace in TRACES if trace in said]
    if outcome.code and not outcome.stderr.strip():
        found.append("it failed without a word")
    if outcome.code == 0 and not outcome.stdout.strip():
        found.append("it succeeded without a result")
    if any(MARKER in path for path in outcome.made):
        found.append("code of the input was run")
    for verb, paths in (("made", outcome.made), ("changed", outcome.changed)):
        stray = [p for p in paths if not any(fnmatch(p, pattern) for pattern in writes)]
        if stray:
            found.append(f"it {verb} {sorted(stray)}")
    found += _raw(outcome)
    if "--json" in outcome.arguments and (outcome.code == 0 or outcome.stdout.strip()):
        try:
            _ = outcome.document
        except ValueError as error:
            found.append(f"stdout is no JSON: {error}")
    return found


def _raw(outcome: Outcome) -> list[str]:
    """Characters that a terminal would obey."""
    found = []
    for stream in ("stdout", "stderr"):
        if stream == "stdout" and "--json" in outcome.arguments:
            continue  # a document is data, and JSON escapes the worst itself
        text = getattr(outcome, stream)
        bad = {c for c in text if c != "\n" and unicodedata.category(c) in {"Cc", "Cf"}}
        if bad:
            near = re.search(r".{0,20}[" + re.escape("".join(bad)) + r"].{0,20}", text)
            found.append(f"{stream} holds {sorted(bad)!r}: {near and near[0]!r}")
    return found


def report(outcome: Outcome, found: Iterable[str]) -> str:
    """What a person needs to see what went wrong."""
    return (
        f"{'; '.join(found)}\n$ hessdiag {' '.join(map(repr, outcome.arguments))}\n"
        f"code {outcome.code}\n--- stdout\n{outcome.stdout[-1500:]}\n--- stderr\n"
        f"{outcome.stderr[-3000:]}"
    )
