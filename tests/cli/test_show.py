import dataclasses
import json

import pytest

import sample_runs
from hessdiag.errors import OptionError, StoreError
from hessdiag.store import read_run, write_run
from hessdiag.tables import summary_table
from hessdiag_cli.diff import diff
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
        show(stored, variant="bn+adamw")
    with pytest.raises(OptionError, match=r"no variant 'kfac'; it has: raw"):
        show(stored, variant="kfac")


@pytest.mark.parametrize("spelled", ["adam+bn", " bn + adam"])
def test_a_variant_is_found_by_every_spelling_that_analyze_takes(spelled, stored, capsys):
    show(stored, variant=spelled)
    assert capsys.readouterr().out == summary_table(read_run(stored), variant="bn+adam")


def test_a_variant_against_the_grammar_is_refused_in_the_words_of_analyze(stored):
    with pytest.raises(OptionError, match=r"unknown variant 'adm' \(did you mean 'adam'\?\)"):
        show(stored, variant="bn+adm")
    with pytest.raises(OptionError, match=r"names two networks"):
        show(stored, variant="bn+ln")


def test_a_variant_of_another_release_is_found_by_its_name(tmp_path, capsys):
    found = sample_runs.small_run()
    blocks = tuple(
        dataclasses.replace(
            block, variants={"raw": block.variants["raw"], "gone": block.variants["raw"]}
        )
        for block in found.blocks
    )
    write_run(
        dataclasses.replace(found, blocks=blocks, variants=("raw", "gone")), tmp_path / "r.h5"
    )
    show(tmp_path / "r.h5", variant="gone")
    diff(tmp_path / "r.h5", tmp_path / "r.h5", variant="gone")
    assert capsys.readouterr().out.count("variant gone") == 3


def test_a_missing_run_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        show(tmp_path / "no.h5")
