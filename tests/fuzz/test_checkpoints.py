"""Checkpoints that are damaged, confused or hostile: read as they are or refused."""

import random
import warnings

import pytest

from hostile import checkpoints, files
from hostile.judge import REFUSED, faults, report
from hostile.rounds import ROUNDS, sample, seeds

WELL_FORMED = checkpoints.typed() | checkpoints.named() | checkpoints.optimizers()
OTHERS = files.headers() | files.archives() | files.pickles() | files.plain()
DIRECTORIES = files.directories()
EXECUTING = checkpoints.executing()
CHECKED = ("zip.pt", "lightning.ckpt")
"""Formats whose files carry a checksum of every tensor."""


def commands(file):
    """In the ordinary suite the one that reads; with more rounds also the one that computes."""
    yield "inspect", file
    if ROUNDS:
        yield "inspect", file, "--json"
        yield "analyze", file, "-o", "out.h5", "--json"


def write(make, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the kinds of tensors that nobody uses
        make(path)


def hold(hessdiag, folder, file):
    for arguments in commands(file):
        outcome = hessdiag(folder, *arguments)
        found = faults(outcome, writes=["out.h5"])
        assert not found, report(outcome, found)
        yield outcome


@pytest.mark.parametrize("name", sample(WELL_FORMED, 16))
def test_a_file_of_torch_save_with_anything_in_it_keeps_the_contract(name, hessdiag, folder):
    write(WELL_FORMED[name], folder / "case.pt")
    assert list(hold(hessdiag, folder, "case.pt"))


@pytest.mark.parametrize("name", sample(OTHERS, 8))
def test_a_file_of_another_kind_keeps_the_contract(name, hessdiag, folder):
    file = "case.safetensors" if name.startswith("safetensors") else "case.pt"
    write(OTHERS[name], folder / file)
    assert list(hold(hessdiag, folder, file))


@pytest.mark.parametrize("name", sample(DIRECTORIES, 5))
def test_a_directory_of_strange_files_keeps_the_contract(name, hessdiag, folder):
    write(DIRECTORIES[name], folder / "case")
    assert list(hold(hessdiag, folder, "case"))


@pytest.mark.parametrize("name", sample(EXECUTING, 5))
def test_a_pickle_that_would_run_code_is_refused_by_the_name_of_what_it_calls(
    name, hessdiag, folder
):
    make, shown = EXECUTING[name]
    write(make, folder / "case.pt")
    for outcome in hold(hessdiag, folder, "case.pt"):
        assert outcome.code == 2, report(outcome, ["not refused"])
        assert shown in outcome.stderr, report(outcome, [f"{shown} is not named"])


@pytest.mark.parametrize("seed", seeds(6))
def test_a_damaged_checkpoint_keeps_the_contract(seed, hessdiag, folder):
    file, content = checkpoints.accident(random.Random(f"checkpoint {seed}"))
    (folder / file).write_bytes(content)
    assert list(hold(hessdiag, folder, file))


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("file", CHECKED)
def test_damage_never_changes_a_number_that_has_a_checksum(file, seed, hessdiag, folder):
    rng = random.Random(f"{file} {seed}")
    sound = checkpoints.sound()[file]
    (folder / file).write_bytes(sound)
    before = hessdiag.weights(folder / file).document
    (folder / file).write_bytes(checkpoints.damaged(sound, rng))
    outcome = hessdiag.weights(folder / file)
    refused = outcome.code in REFUSED and outcome.stderr.strip()
    assert refused or outcome.document == before, report(outcome, ["other numbers"])


def test_a_zip_that_was_compressed_is_refused(hessdiag, folder):
    write(OTHERS["a zip deflated"], folder / "case.pt")
    outcome = hessdiag.weights(folder / "case.pt")
    assert outcome.code in REFUSED, report(outcome, ["torch maps compressed bytes as numbers"])
