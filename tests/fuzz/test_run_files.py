"""Run files that are damaged or edited: shown as they are, or refused; no other file is read."""

import random

import pytest

from hostile import run_files
from hostile.judge import REFUSED, faults, report
from hostile.rounds import ROUNDS, sample, seeds

EDITS = run_files.edits()
LEADING = [n for n in EDITS if n.startswith(("a link to", "a virtual", "external"))]
PRIVATE = (run_files.PRIVATE_TEXT, "31337", "31,337", "3.13e+04")


def commands():
    yield "show", "run.h5"
    if ROUNDS:
        yield "show", "run.h5", "--json"
        yield "validate", "run.h5"
        yield "validate", "run.h5", "--json"
        yield "diff", "run.h5", "other.h5"
        yield "diff", "other.h5", "run.h5", "--json"
        yield "analyze", "model.pt", "-o", "run.h5"
        yield "inspect", "run.h5"


def hold(hessdiag, folder):
    (folder / "other.h5").write_bytes(run_files.sound())
    for arguments in commands():
        outcome = hessdiag(folder, *arguments)
        found = faults(outcome)
        found += [f"it shows {text}" for text in PRIVATE if text in outcome.stdout]
        assert not found, report(outcome, found)
        yield outcome


def numbers(document):
    """Every number of a document, in order."""
    if isinstance(document, dict):
        return [n for value in document.values() for n in numbers(value)]
    if isinstance(document, list):
        return [n for value in document for n in numbers(value)]
    return [document] if isinstance(document, int | float) else []


@pytest.mark.parametrize("name", sample(EDITS, 8))
def test_an_edited_run_file_keeps_the_contract(name, hessdiag, folder):
    run_files.write_private(folder)
    run_files.edit(folder / "run.h5", EDITS[name])
    assert list(hold(hessdiag, folder))


@pytest.mark.parametrize("name", sample(LEADING, 3))
def test_a_run_file_that_leads_to_another_file_is_refused(name, hessdiag, folder):
    run_files.write_private(folder)
    run_files.edit(folder / "run.h5", EDITS[name])
    for outcome in hold(hessdiag, folder):
        assert outcome.code in REFUSED, report(outcome, ["not refused"])


@pytest.mark.parametrize("seed", seeds(3))
def test_a_damaged_run_file_is_refused_or_shown_as_it_was(seed, hessdiag, folder):
    path = folder / "run.h5"
    path.write_bytes(run_files.sound())
    shown = hessdiag(folder, "show", "run.h5", "--json").stdout
    path.write_bytes(run_files.accident(random.Random(f"sealed {seed}"), sealed=True))
    outcome = hessdiag(folder, "show", "run.h5", "--json")
    found = faults(outcome)
    if outcome.code == 0 and outcome.stdout != shown:
        found.append("other numbers")
    assert not found, report(outcome, found)
    assert list(hold(hessdiag, folder))


@pytest.mark.parametrize("seed", seeds(3))
def test_damage_without_a_seal_changes_no_number(seed, hessdiag, folder):
    path = folder / "run.h5"
    path.write_bytes(run_files.unsealed())
    shown = numbers(hessdiag(folder, "show", "run.h5", "--json").document["blocks"])
    path.write_bytes(run_files.accident(random.Random(f"unsealed {seed}"), sealed=False))
    outcome = hessdiag(folder, "show", "run.h5", "--json")
    found = faults(outcome)
    if outcome.code == 0 and numbers(outcome.document["blocks"]) != shown:
        found.append("other numbers")
    assert not found, report(outcome, found)
