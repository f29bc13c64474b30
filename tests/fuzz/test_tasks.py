"""Tasks, options, outputs and configuration that go wrong: one message, and nothing is lost."""

import random

import pytest

from hostile import tasks
from hostile.judge import REFUSED, faults, report
from hostile.rounds import ROUNDS, sample, seeds

ANALYZE = ("analyze", "model.pt", "-o", "out.h5", "--json")
SOURCES = tasks.sources()
MODELS = tasks.own_models()
OUTPUTS = tasks.outputs()
CONFIGURATIONS = tasks.configurations()
INTERRUPTED = 130


def hold(outcome, writes=("out.h5",), codes=()):
    """A run that is refused leaves nothing; one that is not writes its file and no other."""
    wrong = faults(outcome, writes=() if outcome.code in REFUSED else writes, codes=codes)
    assert not wrong, report(outcome, wrong)


@pytest.mark.parametrize("name", sample(SOURCES, 6))
def test_a_task_that_goes_wrong_keeps_the_contract(name, hessdiag, folder):
    (folder / "hessdiag_task.py").write_text(SOURCES[name])
    codes = (INTERRUPTED,) if "interrupt" in name else ()
    hold(hessdiag(folder, *ANALYZE), codes=codes)
    if ROUNDS and "prints" not in name:
        hold(hessdiag(folder, *ANALYZE[:2], "-o", "table.h5"), writes=["table.h5"], codes=codes)


@pytest.mark.parametrize("name", sample(MODELS, 2))
def test_a_model_of_strange_parts_keeps_the_contract(name, hessdiag, folder):
    (folder / "hessdiag_task.py").write_text(MODELS[name])
    hessdiag(folder, "analyze", "model.pt")  # writes own.pt, which fits the model
    (folder / "model.h5").unlink(missing_ok=True)
    analyze = ("analyze", "own.pt", "-o", "out.h5")
    outcome = hessdiag(folder, *analyze)
    writes = {"own.pt"} | ({"out.h5"} if outcome.code not in REFUSED else set())
    assert not faults(outcome, writes=writes), report(outcome, faults(outcome, writes=writes))
    for again in (("show", "out.h5"), ("validate", "out.h5"), ("diff", *["out.h5"] * 2), analyze):
        if outcome.code == 0 and (ROUNDS or again[0] == "show"):
            later = hessdiag(folder, *again)
            wrong = faults(later, writes=["own.pt"])
            assert later.code == 0, report(later, wrong)
            assert not wrong, report(later, wrong)


@pytest.mark.parametrize("seed", seeds(2))
def test_a_damaged_task_file_keeps_the_contract(seed, hessdiag, folder):
    content = tasks.accident(random.Random(f"task {seed}"))
    (folder / "hessdiag_task.py").write_bytes(content)
    hold(hessdiag(folder, *ANALYZE))


@pytest.mark.parametrize("seed", seeds(4))
def test_options_that_make_no_sense_keep_the_contract(seed, hessdiag, folder):
    options = tasks.junk(random.Random(f"options {seed}"))
    hold(hessdiag(folder, "analyze", "model.pt", "-o", "out.h5", *options))


@pytest.mark.parametrize("name", sample(OUTPUTS, 4))
def test_an_output_that_cannot_be_is_refused_and_nothing_is_lost(name, hessdiag, folder):
    output = OUTPUTS[name](folder)
    for force in ((), ("--force",))[: 2 if ROUNDS else 1]:
        outcome = hessdiag(folder, "analyze", "model.pt", "-o", output, *force)
        hold(outcome, writes=())
        assert outcome.code in REFUSED, report(outcome, ["not refused"])


@pytest.mark.parametrize("name", sample(CONFIGURATIONS, 4))
def test_a_configuration_that_is_none_keeps_the_contract(name, hessdiag, folder):
    file, content = CONFIGURATIONS[name]
    (folder / "hessdiag_task.py").unlink()
    (folder / file).write_bytes(content)
    hold(hessdiag(folder, "inspect", "model.pt"))
    if ROUNDS:
        outcome = hessdiag(folder, *ANALYZE)
        hold(outcome)
        assert outcome.code == 2, report(outcome, ["there is no task"])
