import h5py
import pytest

import sample_runs
from hessdiag.errors import OptionError
from hessdiag.store import read_run, write_run
from hessdiag.tables.hidden import hidden_table
from hessdiag_cli.show import show


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run.h5"
    write_run(sample_runs.full_run(), path)
    return path


def test_show_hidden_prints_the_table_of_the_layer(stored, capsys):
    show(stored, hidden="0")
    out, err = capsys.readouterr()
    assert out == hidden_table(read_run(stored), "0", width=100)
    assert "H_e = [eᵀ; H] of 0: the row of ones and 2 features, 3 positions" in out
    assert "\x1b" not in out
    assert err == ""


def test_show_hidden_of_one_variant_shows_that_alone(stored, capsys):
    show(stored, hidden="0", variant="bnp")
    assert capsys.readouterr().out == hidden_table(read_run(stored), "0", variant="bnp", width=100)


def test_show_hidden_fits_the_width_that_is_asked_for(stored, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show(stored, hidden="0")
    assert capsys.readouterr().out == hidden_table(read_run(stored), "0", width=80)


def test_an_unknown_layer_is_refused_with_the_nearest(stored, call):
    with pytest.raises(OptionError, match=r"did you mean 'encoder/2'\? it has: 0, encoder/2"):
        call(show, str(stored), "--hidden", "encoder/3")


def test_a_run_without_h_e_says_how_to_get_it(tmp_path):
    write_run(sample_runs.small_run(), tmp_path / "run.h5")
    with pytest.raises(OptionError, match="analyse the checkpoint again"):
        show(tmp_path / "run.h5", hidden="0")


def test_json_and_hidden_together_are_refused_and_say_where_h_e_is(stored):
    with pytest.raises(OptionError, match="under /hidden and /neurons"):
        show(stored, hidden="0", json=True)
    with h5py.File(stored) as file:
        assert {"hidden", "neurons"} <= set(file)
