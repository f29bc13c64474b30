import json

import pytest

import sample_runs
from hessdiag.errors import OptionError, StoreError
from hessdiag.store import read_run, write_run
from hessdiag.tables import summary_table
from hessdiag_cli.show import show


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run.h5"
    write_run(sample_runs.rich_run(), path)
    return path


def test_show_prints_the_table_of_raw_at_100_columns(stored, capsys):
    show(stored)
    out, err = capsys.readouterr()
    assert out == summary_table(read_run(stored), width=100)
    assert "\x1b" not in out
    assert err == ""


def test_show_prints_the_asked_variant(stored, capsys):
    show(stored, variant="bn+adam")
    assert capsys.readouterr().out == summary_table(read_run(stored), variant="bn+adam")


def test_show_json_is_the_whole_document_and_nothing_else(stored, capsys):
    show(stored, json=True)
    out, err = capsys.readouterr()
    assert json.loads(out) == read_run(stored).to_dict()
    assert err == ""


def test_show_json_of_one_variant_holds_only_that(stored, capsys):
    show(stored, variant="bn+adam", json=True)
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert len(blocks) == 8
    assert {name for block in blocks for name in block["variants"]} == {"bn+adam"}


def test_an_unknown_variant_is_refused_with_the_nearest(stored):
    with pytest.raises(OptionError, match=r"did you mean bn\+adam\? it has: raw, bn\+adam"):
        show(stored, variant="bn+adm")
    with pytest.raises(OptionError, match=r"no variant 'zzz'; it has: raw"):
        show(stored, variant="zzz")


def test_a_missing_run_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        show(tmp_path / "no.h5")
