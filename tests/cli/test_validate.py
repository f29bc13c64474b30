import json

import h5py
import pytest

import sample_runs
from hessdiag.errors import StoreError
from hessdiag.store import write_run
from hessdiag_cli.validate import validate


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "run.h5"
    write_run(sample_runs.small_run(), path)
    return path


def spoil(path):
    with h5py.File(path, "r+") as file:
        file["summary/kappa"][0, 0] = 7.0
        file["summary/trace_confidence"][1, 0] = 2.0


def test_a_valid_run_is_one_line(stored, capsys):
    validate(stored)
    out, err = capsys.readouterr()
    assert out == "valid hessdiag-run 1.0.0: 3 blocks, 1 variant\n"
    assert err == ""


def test_a_valid_run_as_json(stored, capsys):
    validate(stored, json=True)
    assert json.loads(capsys.readouterr().out) == {
        "file": str(stored),
        "valid": True,
        "format": "hessdiag-run",
        "version": "1.0.0",
        "blocks": 3,
        "variants": 1,
        "unfinished": False,
        "problems": [],
    }


def test_problems_are_listed_and_the_command_fails(stored, capsys):
    spoil(stored)
    with pytest.raises(StoreError, match="2 problems"):
        validate(stored)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "kappa has value 7.0 outside" in lines[0]
    assert "trace has confidence 2.0" in lines[1]


def test_problems_as_json_are_one_document(stored, capsys):
    spoil(stored)
    with pytest.raises(StoreError):
        validate(stored, json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["valid"] is False
    assert len(document["problems"]) == 2


def test_a_foreign_file_is_a_store_error(tmp_path, capsys):
    (tmp_path / "x.h5").write_text("x")
    with pytest.raises(StoreError, match="not a run file"):
        validate(tmp_path / "x.h5")
    assert capsys.readouterr().out == ""
