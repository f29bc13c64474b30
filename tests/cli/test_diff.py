"""``diff`` prints two stored runs side by side, whether or not they differ."""

import functools
import json

import pytest

from hessdiag.errors import OptionError, StoreError
from hessdiag.quantity import Quantity
from hessdiag.run import BlockResult, VariantResult
from hessdiag.store import write_run
from hessdiag_cli.diff import diff
from sample_runs import rich_run, run, small_run, values


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(small_run(), tmp_path / "a.h5")
    changed = values(4, lambda_max=Quantity.exact(10.0))
    block = BlockResult("0", ("0.weight",), {"raw": VariantResult(changed)})
    write_run(run((block,)), tmp_path / "b.h5")
    write_run(rich_run(), tmp_path / "rich.h5")
    return tmp_path


@pytest.fixture
def compare(call, here):
    return functools.partial(call, diff)


def test_the_table_goes_to_stdout_and_a_difference_is_no_failure(compare):
    done = compare("a.h5", "b.h5")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["first", "a.h5"], ["second", "b.h5"]]
    assert any(line.split()[-3:] == ["↑", "=", "×2.50"] for line in lines)
    assert "not in the second run" in done.stdout
    assert max(map(len, lines)) <= 100
    assert compare("a.h5", "a.h5").exit_code == 0


def test_json_is_one_document_of_both_runs(compare):
    done = compare("a.h5", "b.h5", "--json")
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert done.stderr == ""
    top = found["blocks"][0]["variants"]["raw"]["lambda_max"]
    assert (top["first"]["value"], top["second"]["value"]) == (4.0, 10.0)
    assert top["ratio"]["value"] == 2.5
    assert [block["name"] for block in found["blocks"]] == ["0", "2", "whole"]


def test_a_block_shows_every_quantity_and_a_variant_is_chosen_by_name(compare):
    short, long = compare("a.h5", "b.h5").stdout, compare("a.h5", "b.h5", "--block", "0").stdout
    assert "profile.1e-03.kappa" in long
    assert "profile.1e-03.kappa" not in short
    assert "whole" not in long
    chosen = compare("rich.h5", "rich.h5", "--variant", "bn+adam").stdout
    assert "variant bn+adam" in chosen
    assert compare("rich.h5", "rich.h5", "--variant", "adam+bn").stdout == chosen


def test_names_that_neither_run_has_are_refused_with_those_that_there_are(compare):
    with pytest.raises(OptionError, match=r"no block|neither run has a block 'wole'.*whole"):
        compare("a.h5", "b.h5", "--block", "wole")
    with pytest.raises(OptionError, match=r"variant 'adam'.*there are: raw"):
        compare("a.h5", "b.h5", "--variant", "adam")
    with pytest.raises(OptionError, match=r"unknown variant 'adm' \(did you mean 'adam'\?\)"):
        compare("a.h5", "b.h5", "--variant", "adm")
    with pytest.raises(StoreError, match=r"gone\.h5 does not exist"):
        compare("a.h5", "gone.h5")
