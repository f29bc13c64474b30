from dataclasses import replace

import h5py
import numpy as np
import pytest
import xarray

from hessdiag.errors import StoreError
from hessdiag.store import read_run, validate_run, write_run
from hessdiag.store.schema import COSINES, HIDDEN, NEURONS


@pytest.fixture(scope="module")
def full_bytes(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "run.h5"
    write_run(runs.full_run(), path)
    return path.read_bytes()


@pytest.fixture
def full_file(full_bytes, tmp_path):
    path = tmp_path / "run.h5"
    path.write_bytes(full_bytes)
    return path


def test_everything_stands_where_the_contract_says(full_file):
    with h5py.File(full_file) as file:
        assert set(file["hidden"]) == {"raw", "bnp"}
        assert set(file["hidden/bnp"]) == {"0", "10"}
        assert file["hidden/bnp/10"].attrs["layer"] == "encoder/2"
        assert file["neurons/bnp/0"].attrs["layer"] == "0"
        assert "10" not in file["neurons/bnp"]
        named = {d.name for d in HIDDEN} | {"feature", "position", "singular_index"}
        assert set(file["hidden/raw/0"]) == named
        assert set(file["neurons/raw/0"]) == {d.name for d in NEURONS} | {"neuron"}
        assert set(file["cosines"]) == {d.name for d in COSINES} | {"iterate", "parameter"}
        assert file["cosines/cosine"].shape == (3, 4)
        assert file["cosines/valid"].dtype == file["hidden/raw/0/dead"].dtype == np.int8
        assert file["hidden/raw/0/kappa"].shape == file["hidden/raw/0/rank"].shape == ()
        assert file["hidden/raw/0/centring_holds"][()] == 0
        assert np.isnan(file["cosines/cosine"][2]).all()


def test_every_dataset_has_units_a_long_name_and_scales(full_file):
    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            assert item.attrs["units"], name
            assert item.attrs["long_name"], name
            for position in range(item.ndim):
                assert item.is_scale or len(item.dims[position]) == 1, name

    with h5py.File(full_file) as file:
        file.visititems(visit)
        assert file["cosines/row_norm"].attrs["units"] == "loss"


def test_xarray_opens_each_group_and_knows_the_coordinates(full_file):
    with xarray.open_dataset(full_file, engine="h5netcdf", group="cosines") as found:
        assert {"step", "distance"} <= set(found.coords)
        assert found["cosine"].dims == ("iterate", "parameter")
        assert found["cosine"].where(found["valid"]).isel(parameter=0).count() == 2
    for group, size in (("hidden/raw/0", ("feature", 3)), ("neurons/bnp/0", ("neuron", 2))):
        with xarray.open_dataset(full_file, engine="h5netcdf", group=group) as found:
            assert found.sizes[size[0]] == size[1]
    with xarray.open_datatree(full_file, engine="h5netcdf") as tree:
        assert "singular_value" in tree["hidden/bnp/10"]


def test_what_hessdiag_writes_is_valid(full_file):
    assert validate_run(full_file) == []


def test_a_file_without_these_groups_is_valid(runs, tmp_path):
    write_run(runs.small_run(), tmp_path / "run.h5")
    with h5py.File(tmp_path / "run.h5") as file:
        assert not {"hidden", "neurons", "cosines"} & set(file)
    assert validate_run(tmp_path / "run.h5") == []


def put(path, value, where):
    return lambda file: file[path].__setitem__(where, value)


EDITS = {
    "cosine is missing": lambda file: file["cosines"].pop("cosine"),
    "cosines/distance lacks the attribute units": lambda file: file["cosines/distance"].attrs.pop(
        "units"
    ),
    "/hidden/adam/0: there is no such variant": lambda file: file.create_group("hidden/adam/0"),
    "'x' is no index of a layer": lambda file: file.create_group("hidden/raw/x"),
    "'01' is no index of a layer": lambda file: file.create_group("hidden/raw/01"),
    "/hidden/raw/0 lacks the attribute layer": lambda file: file["hidden/raw/0"].attrs.pop("layer"),
    "there is no /hidden/bnp/3": lambda file: file.create_group("neurons/bnp/3"),
    "row_norm is not attached to": lambda file: (
        file["hidden/raw/0/row_norm"].dims[0].detach_scale(file["hidden/raw/0/feature"])
    ),
    "layer '0', variant 'raw': singular_value is not descending": put(
        "hidden/raw/0/singular_value", 9.0, 2
    ),
    "layer '0', variant 'bnp': row_norm has negative entries": put(
        "hidden/bnp/0/row_norm", -1.0, 1
    ),
    "bias_cosine has entries beyond 1": put("hidden/raw/0/bias_cosine", -1.1, 1),
    "kappa is 0.5, below 1": put("hidden/raw/0/kappa", 0.5, ()),
    "rank is 4 of 3 singular values": put("hidden/raw/0/rank", 4.0, ()),
    "s_zero has negative entries": put("neurons/raw/0/s_zero", -1.0, 0),
    "cosines: cosine_low exceeds cosine": put("cosines/cosine_low", 0.99, (0, 0)),
    "cosines: cosine exceeds cosine_high": put("cosines/cosine_high", -0.99, (0, 0)),
    "cosines: row_norm exceeds row_norm_high": put("cosines/row_norm_high", 0.1, 0),
    "cosines: cosine is not a number exactly where valid is 1": put(
        "cosines/cosine", np.nan, (0, 0)
    ),
    "cosines: cosine_high is not a number exactly where": put("cosines/valid", 0, (0, 0)),
    "cosines: cosine_high has entries beyond 1": put("cosines/cosine_high", 1.1, (0, 0)),
    "cosines: an iterate that is p* itself has valid cosines": put("cosines/distance", 0.0, 0),
    "cosines: gradient_rms has negative entries": put("cosines/gradient_rms", -1.0, 0),
    "cosines: fraction_above lies outside of 0 to 1": put("cosines/fraction_above", 1.5, 0),
}


@pytest.mark.parametrize("problem", EDITS)
def test_each_departure_is_named(problem, full_file):
    with h5py.File(full_file, "r+") as file:
        EDITS[problem](file)
    problems = validate_run(full_file)
    assert any(problem in found for found in problems), problems


def test_a_group_that_is_no_group_is_refused(full_file):
    with h5py.File(full_file, "r+") as file:
        del file["cosines"]
        file["cosines"] = np.ones(3)
    with pytest.raises(StoreError, match="damaged"):
        read_run(full_file)


def test_what_the_file_cannot_hold_is_refused(runs, tmp_path):
    full, path = runs.full_run(), tmp_path / "run.h5"
    lacking = {name: array for name, array in full.cosines.items() if name != "valid"}
    with pytest.raises(ValueError, match=r"cosines lack \['valid'\]"):
        write_run(replace(full, cosines=lacking), path)
    with pytest.raises(ValueError, match="has no place for"):
        write_run(replace(full, cosines=full.cosines | {"sine": np.ones(3)}), path)
    with pytest.raises(ValueError, match=r"H_e under \['adam'\]"):
        write_run(replace(full, hidden={"adam": ()}), path)
    with pytest.raises(StoreError, match="cannot be stored"):
        write_run(replace(full, hidden={"raw": (runs.hidden_layer("a\0b"),)}), path)
    assert not path.exists()


def test_a_mask_takes_little_room(runs, tmp_path):
    size = 20_000
    write_run(replace(runs.full_run(), cosines=runs.cosines(10, size)), tmp_path / "run.h5")
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["cosines/valid"].id.get_storage_size() < 10 * size / 50
