"""Folders of unfinished analyses that are damaged: resumed to the same numbers, or refused."""

import json
import random
import shutil

import pytest

from hostile import journals
from hostile.checkpoints import TASK, saved, state
from hostile.judge import REFUSED, faults, report
from hostile.rounds import ROUNDS, sample, seeds

ANALYZE = ("analyze", "model.pt", "-o", "out.h5", "--json")
EDITS = journals.edits()
SMALL = 30_000
"""Bytes: the parts of this run fit, the run does not."""

WRITES = ("out.h5", "out.h5.parts", "out.h5.parts/*")
FORGED = ("a negative size", "notes of numbers", "a header of hostile names")
"""Lies under a valid seal; they are taken at their word."""


def values(outcome):
    """The numbers of a run without what differs from one undisturbed run to the next."""
    blocks = outcome.document["blocks"]
    for block in blocks:
        for result in block["variants"].values():
            result.pop("seconds")
    return json.dumps(blocks)


@pytest.fixture(scope="module")
def unfinished(hessdiag, tmp_path_factory):
    """What a full disk leaves: all blocks, no run; and what the run would have held."""
    folder = tmp_path_factory.mktemp("unfinished")
    (folder / "hessdiag_task.py").write_text(TASK)
    (folder / "model.pt").write_bytes(saved(state()))
    (folder / "keep.txt").write_text("precious")
    outcome = hessdiag(folder, *ANALYZE[:4], file_size=SMALL)
    assert outcome.code == 5, report(outcome, ["not out of disk"])
    assert not faults(outcome, writes=WRITES[1:]), report(outcome, [])
    whole = tmp_path_factory.mktemp("whole")
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, whole)
    return folder, values(hessdiag(whole, *ANALYZE))


@pytest.fixture
def case(unfinished, tmp_path):
    """A copy of the unfinished analysis, and its numbers."""
    folder = tmp_path / "case"
    shutil.copytree(unfinished[0], folder)
    return folder, unfinished[1]


def resume(hessdiag, folder, numbers, *, forged=False):
    for arguments in (("show", "out.h5"), ("validate", "out.h5", "--json")):
        outcome = hessdiag(folder, *arguments)
        assert not faults(outcome), report(outcome, faults(outcome))
    outcome = hessdiag(folder, *ANALYZE)
    found = faults(outcome, writes=WRITES)
    if outcome.code in REFUSED:
        # The lock of a folder that had none, and what a kill left half written, are no loss.
        lost = [p for p in outcome.changed if not p.endswith((".parts", ".tmp"))]
        found += [f"it refused and changed {p}" for p in lost]
        found += ["it refused and wrote the run"] if "out.h5" in outcome.made else []
    elif not forged and values(outcome) != numbers:
        found.append("other numbers")
    assert not found, report(outcome, found)
    if ROUNDS:
        outcome = hessdiag(folder, *ANALYZE, "--force")
        found = faults(outcome, writes=WRITES)
        if outcome.code not in REFUSED and values(outcome) != numbers:
            found.append("other numbers")
        assert not found, report(outcome, found)


def test_an_unfinished_analysis_resumes_to_the_same_numbers(hessdiag, case):
    folder, numbers = case
    outcome = hessdiag(folder, *ANALYZE)
    assert outcome.code == 0, report(outcome, ["it does not resume"])
    assert "resuming: 6 of 6 rows were finished" in outcome.stderr
    assert values(outcome) == numbers


@pytest.mark.parametrize("name", sample(EDITS, 4))
def test_a_journal_that_was_tampered_with_keeps_the_contract(name, hessdiag, case):
    folder, numbers = case
    EDITS[name](folder / "out.h5.parts")
    resume(hessdiag, folder, numbers, forged=name in FORGED)


@pytest.mark.parametrize("seed", seeds(2))
def test_a_damaged_journal_is_refused_or_resumes_to_the_same_numbers(seed, hessdiag, case):
    folder, numbers = case
    journals.accident(folder / "out.h5.parts", random.Random(f"journal {seed}"))
    resume(hessdiag, folder, numbers)
