import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray

from hessdiag.errors import OutOfResources, StoreError
from hessdiag.run import VariantResult
from hessdiag.store import atomic, check_target, is_run, read_run, write_run
from hessdiag.store.schema import SUMMARY, datasets


def test_the_root_says_what_it_is(small_file):
    with h5py.File(small_file) as file:
        assert dict(file.attrs) == {
            "encoding-type": "hessdiag-run",
            "encoding-version": "1.0.0",
            "created_at": "2026-11-21T12:00:00+00:00",
            "hessdiag_version": "0.1.0",
        }


def test_the_metadata_carries_checksums(small_bytes):
    signature, superblock_version = small_bytes[:8], small_bytes[8]
    assert signature == b"\x89HDF\r\n\x1a\n"
    assert superblock_version == 3  # format 1.10


def test_every_dataset_has_units_a_long_name_and_a_scale_on_every_dimension(small_file):
    seen = []

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            seen.append(name)
            assert item.attrs["units"], name
            assert item.attrs["long_name"], name
            for position in range(item.ndim):
                assert item.is_scale or len(item.dims[position]) == 1, name

    with h5py.File(small_file) as file:
        file.visititems(visit)
    assert {f"summary/{d.name}" for f in SUMMARY for d in datasets(f)} < set(seen)


def test_dimensions_and_types_are_those_of_the_contract(small_file):
    with h5py.File(small_file) as file:
        summary = file["summary"]
        assert summary["kappa"].shape == (3, 1)
        assert summary["kappa_quantile_low"].shape == (3, 1, 2)
        assert summary["profile_n_positive_status"].shape == (3, 1, 12)
        assert summary["forecast_null"].shape == (3, 1, 4)
        assert summary["ambiguous"].dtype == np.int8
        assert summary["size"].dtype == np.int64
        assert summary["off_diagonality_before"].dtype == np.float64
        assert summary["horizon"][:].tolist() == [1, 10, 100, 1000]
        assert summary["threshold"][:].tolist() == [10.0**-k for k in range(1, 13)]
        assert file["spectra/raw/2"].attrs["block"] == "whole"
        assert file["rows/raw/1/norm"].shape == (6,)


def test_xarray_opens_the_summary_with_no_help(small_file):
    with xarray.open_dataset(small_file, engine="h5netcdf", group="summary") as summary:
        assert set(summary.coords) == {"block", "variant", "quantile", "threshold", "horizon"}
        assert summary["block"].values.tolist() == ["0", "2", "whole"]
        assert summary["kappa"].sel(block="2", variant="raw").item() == 4.0
        assert summary["kappa_status"].sel(block="2", variant="raw").item() == "exact"
        assert summary["kappa_quantile"].sel(quantile=0.5, block="0").item() == 2.0
        assert summary["forecast_total"].sel(horizon=100, block="0").item() == 0.01
        assert np.isnan(summary["kappa_damped"]).all()
        assert summary["seconds"].dtype == np.float64


@pytest.mark.parametrize("group", ["spectra/raw/0", "rows/raw/0", "provenance"])
def test_xarray_opens_the_other_groups(group, small_file):
    with xarray.open_dataset(small_file, engine="h5netcdf", group=group) as found:
        assert len(found) > 0


def test_xarray_opens_the_file_as_a_tree(runs, tmp_path):
    path = tmp_path / "rich.h5"
    write_run(runs.rich_run(), path)
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        assert "eigenvalue" in tree["spectra/raw/0"]


def test_missing_pairs_are_stored_as_nulls(runs, tmp_path):
    path = tmp_path / "rich.h5"
    write_run(runs.rich_run(), path)
    with h5py.File(path) as file:
        missing = {d.name: file["summary"][d.name][0, 1] for f in SUMMARY for d in datasets(f)}
    assert missing["size"] == -1
    assert missing["skipped"] == missing["kappa_status"] == b""
    assert missing["same_function"] == -1
    assert np.isnan(missing["kappa"])


def test_an_existing_run_needs_force_and_is_then_replaced(runs, small_file):
    before = small_file.read_bytes()
    with pytest.raises(StoreError, match="exists; replace it with --force"):
        write_run(runs.rich_run(), small_file)
    assert small_file.read_bytes() == before
    write_run(runs.rich_run(), small_file, force=True)
    assert len(read_run(small_file).blocks) == 8
    assert [item.name for item in small_file.parent.iterdir()] == ["run.h5"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("content", [b"", b"my thesis", b"\x89HDF\r\n\x1a\n damaged"])
def test_a_file_that_is_no_run_is_never_replaced(content, force, runs, tmp_path):
    path = tmp_path / "thesis.h5"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="not a hessdiag run"):
        write_run(runs.small_run(), path, force=force)
    assert path.read_bytes() == content


def test_foreign_hdf5_is_never_replaced(runs, tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(StoreError, match="not a hessdiag run"):
        write_run(runs.small_run(), path, force=True)


@pytest.mark.parametrize("target", ["run.h5", "nowhere.h5"])
def test_a_symbolic_link_is_refused_and_its_target_untouched(target, runs, small_file, tmp_path):
    before = small_file.read_bytes()
    link = tmp_path / "link.h5"
    link.symlink_to(target)
    with pytest.raises(StoreError, match="symbolic link"):
        write_run(runs.rich_run(), link, force=True)
    assert link.is_symlink()
    assert small_file.read_bytes() == before
    assert not (tmp_path / "nowhere.h5").exists()


def test_a_folder_or_a_device_is_refused(runs, tmp_path):
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(StoreError, match="not a hessdiag run"):
            write_run(runs.small_run(), path, force=True)


def test_a_missing_folder_is_named(runs, tmp_path):
    with pytest.raises(StoreError, match=r"folder of .* does not exist; create it"):
        write_run(runs.small_run(), tmp_path / "no" / "run.h5")


def test_the_target_can_be_checked_before_the_work(small_file, tmp_path):
    check_target(tmp_path / "new.h5", force=False)
    check_target(small_file, force=True)
    with pytest.raises(StoreError, match="--force"):
        check_target(small_file, force=False)


@pytest.mark.parametrize(
    ("code", "kind", "match"),
    [
        (errno.ENOSPC, OutOfResources, "free some space"),
        (errno.EDQUOT, OutOfResources, "free some space"),
        (errno.EACCES, StoreError, "choose another place"),
        (errno.EROFS, StoreError, "choose another place"),
        (errno.EIO, StoreError, "choose another place"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_nothing_behind(
    call, code, kind, match, runs, small_file, monkeypatch
):
    before = small_file.read_bytes()

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os if call == "fsync" else Path, call, refuse)
    with pytest.raises(kind, match=match):
        write_run(runs.rich_run(), small_file, force=True)
    monkeypatch.undo()
    assert small_file.read_bytes() == before
    assert [item.name for item in small_file.parent.iterdir()] == ["run.h5"]


def test_what_does_not_read_back_never_takes_the_place_of_a_run(runs, small_file, monkeypatch):
    before, fsync = small_file.read_bytes(), os.fsync

    def spoiled(descriptor):
        os.pwrite(descriptor, b"XXXX", 2000)
        fsync(descriptor)

    with monkeypatch.context() as disk:
        disk.setattr(atomic.os, "fsync", spoiled)
        with pytest.raises(StoreError, match=r"run\.h5 does not read back .*check the disk"):
            write_run(runs.rich_run(), small_file, force=True)
    assert small_file.read_bytes() == before
    assert [item.name for item in small_file.parent.iterdir()] == ["run.h5"]


def test_an_interrupt_leaves_nothing_behind(runs, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_run(runs.small_run(), tmp_path / "run.h5")
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
from hessdiag.errors import OutOfResources
from hessdiag.store import write_run
import sample_runs
run = sample_runs.rich_run()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_run(run, Path(sys.argv[1]))
except OutOfResources as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file-size limits are POSIX")
def test_a_real_limit_on_the_file_size_is_out_of_resources_and_no_crash(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "run.h5"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "no room for run.h5" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["null\0character", "lone \ud800 surrogate"])
def test_a_name_that_hdf5_cannot_hold_is_refused_by_name(name, runs, tmp_path):
    block = replace(runs.small_run().blocks[0], name=name)
    with pytest.raises(StoreError, match="cannot be stored"):
        write_run(runs.run((block,)), tmp_path / "run.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", ["a/b", "", "."])
def test_a_variant_that_is_no_group_name_is_refused(variant, runs, tmp_path):
    with pytest.raises(StoreError, match="cannot be stored"):
        write_run(runs.run((), (variant,)), tmp_path / "run.h5")


def test_an_array_of_no_known_name_or_shape_is_refused(runs, tmp_path):
    block = runs.small_run().blocks[0]
    for spectrum in ({"eigenvalues": np.ones(4)}, {"eigenvalue": np.ones((2, 2))}):
        strange = replace(block, variants={"raw": VariantResult(runs.values(), spectrum=spectrum)})
        with pytest.raises(ValueError, match=r"eigenvalues|zip"):
            write_run(runs.run((strange,)), tmp_path / "run.h5")


def test_a_text_is_accepted_as_path(runs, tmp_path):
    write_run(runs.small_run(), str(tmp_path / "run.h5"))
    assert is_run(str(tmp_path / "run.h5"))
