import h5py
import numpy as np
import pytest

from hessdiag.errors import StoreError, UnknownSchema
from hessdiag.store import validate_run, write_run


def put(path, value, where=(0, 0)):
    return lambda file: file[f"summary/{path}"].__setitem__(where, value)


def both(*edits):
    return lambda file: [edit(file) for edit in edits]


def replaced(name, data):
    def edit(file):
        attrs = dict(file[name].attrs)
        del file[name]
        file[name] = data
        for key in ("units", "long_name"):
            file[name].attrs[key] = attrs[key]

    return edit


def test_what_hessdiag_writes_is_valid(small_file):
    assert validate_run(small_file) == []


EDITS = {
    "kappa_status holds the unknown status 'exakt'": put("kappa_status", "exakt"),
    "kappa is missing": lambda file: file["summary"].pop("kappa"),
    "/spectra is missing": lambda file: file.pop("spectra"),
    "fingerprint is missing": lambda file: file["provenance"].pop("fingerprint"),
    "warnings is not a JSON list": lambda file: file["provenance/warnings"].__setitem__((), "{}"),
    "lacks the attribute created_at": lambda file: file.attrs.pop("created_at"),
    "trace lacks the attribute units": lambda file: file["summary/trace"].attrs.pop("units"),
    "norm lacks the attribute long_name": lambda file: file["rows/raw/0/norm"].attrs.__setitem__(
        "long_name", ""
    ),
    "trace has length 2 along block, not 3": replaced("summary/trace", np.ones((2, 1))),
    "trace has 1 dimensions": replaced("summary/trace", np.ones(3)),
    "size holds float64, expected int": replaced("summary/size", np.ones((3, 1))),
    "trace holds object, expected float": replaced(
        "summary/trace", np.array([["a"], ["b"], ["c"]], dtype=h5py.string_dtype())
    ),
    "trace is not attached to the dimension scale block": replaced(
        "summary/trace", np.ones((3, 1))
    ),
    "quantile lacks some of 0.5, 0.9": put("quantile", 0.25, 0),
    "there is no such variant": lambda file: file.create_group("rows/adam"),
    "there is no such index": lambda file: file.create_group("rows/raw/3"),
    "its attribute block is not '0'": lambda file: file["spectra/raw/0"].attrs.__setitem__(
        "block", "zero"
    ),
    "kappa has low 5.0 above high 4.5": both(put("kappa_low", 5.0), put("kappa_high", 4.5)),
    "kappa has value 7.0 outside": put("kappa", 7.0),
    "kappa_quantile[0.9] has value 7.0 outside": put("kappa_quantile", 7.0, (0, 0, 1)),
    "kappa is exact without value": put("kappa", np.nan),
    "kappa is exact without confidence": put("kappa_confidence", np.nan),
    "kappa is lower-bound but has high": put("kappa_status", "lower-bound"),
    "kappa is unresolved but has value": put("kappa_status", "unresolved"),
    "kappa is absent but has value": put("kappa_status", ""),
    "kappa has confidence 1.5": put("kappa_confidence", 1.5),
    "kappa has the infinite high inf": put("kappa_high", np.inf),
    "n_positive + n_negative + n_zero is 5, not size 4": both(
        put("n_zero", 1.0), put("n_zero_low", 1.0), put("n_zero_high", 1.0)
    ),
    "inactive is 5 of size 4": put("inactive", 5),
    "eigenvalue is not ascending": lambda file: file["spectra/raw/0/eigenvalue"].__setitem__(
        0, 9.0
    ),
    "norm exceeds norm_high": lambda file: file["rows/raw/0/norm"].__setitem__(0, 99.0),
    "diagonal_low exceeds diagonal": lambda file: file["rows/raw/0/diagonal"].__setitem__(0, -99.0),
}


@pytest.mark.parametrize("problem", EDITS)
def test_each_departure_is_named(problem, edited):
    problems = validate_run(edited(EDITS[problem]))
    assert any(problem in found for found in problems), problems


def test_arrays_that_are_not_of_the_block_are_named(runs, tmp_path):
    odd = runs.VariantResult(runs.values(4), **runs.exact_arrays(6))
    write_run(runs.run((runs.BlockResult("0", (), {"raw": odd}),)), tmp_path / "run.h5")
    problems = validate_run(tmp_path / "run.h5")
    assert "block '0', variant 'raw': eigenvalue has 6 entries, not size 4" in problems
    assert "block '0', variant 'raw': diagonal_low has 6 entries, not size 4" in problems


def test_a_problem_says_where_it_is(edited):
    problems = validate_run(edited(put("kappa", 7.0, (1, 0))))
    assert problems == [
        "block '2', variant 'raw': kappa has value 7.0 outside [3.999999999999, 4.000000000001]"
    ]


def test_additions_are_allowed_when_they_are_labelled(edited):
    def add(file):
        file["summary/novel"] = np.ones(3)
        file["summary/novel"].attrs.update(units="1", long_name="something later")

    assert validate_run(edited(add)) == []


def test_another_major_version_and_foreign_bytes_are_refused(edited, tmp_path):
    with pytest.raises(UnknownSchema):
        validate_run(edited(lambda file: file.attrs.modify("encoding-version", "2.0.0")))
    (tmp_path / "x").write_text("x")
    with pytest.raises(StoreError):
        validate_run(tmp_path / "x")
