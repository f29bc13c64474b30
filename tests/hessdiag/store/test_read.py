import random
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hessdiag.errors import StoreError, UnknownSchema
from hessdiag.quantity import Quantity
from hessdiag.store import is_run, read_run, write_run
from hessdiag.store.seal import LENGTH, MARK


@pytest.mark.parametrize("name", ["rich_run", "small_run", "full_run"])
def test_a_run_comes_back_as_it_was(name, runs, tmp_path):
    run = getattr(runs, name)()
    write_run(run, tmp_path / "run.h5")
    assert runs.differences(run, read_run(tmp_path / "run.h5")) == []


def test_differences_are_seen(runs):
    assert runs.differences(runs.rich_run(), runs.rich_run()) == []
    assert runs.differences(runs.rich_run(), runs.small_run()) != []


def test_differences_of_hidden_layers_and_cosines_are_seen(runs):
    full = runs.full_run()
    assert runs.differences(full, replace(full, hidden={})) == ["hidden"]
    assert runs.differences(full, replace(full, cosines={})) == ["cosines"]
    other = replace(full, cosines=runs.cosines(row_norm=np.ones(4)))
    assert runs.differences(full, other) == ["cosines"]


def test_masks_come_back_as_truth_values_and_a_missing_truth_as_nan(runs, tmp_path):
    odd = runs.hidden_layer(centring_holds=None, dead=[0, 1, 0])
    run = replace(runs.full_run(("raw",)), hidden={"raw": (odd,)})
    write_run(run, tmp_path / "run.h5")
    back = read_run(tmp_path / "run.h5")
    hidden = back.hidden["raw"][0].hidden
    assert hidden["dead"].dtype == back.cosines["valid"].dtype == np.bool_
    assert hidden["dead"].tolist() == [False, True, False]
    assert np.isnan(hidden["centring_holds"])


def test_layers_come_back_in_the_order_of_their_indices(runs, tmp_path):
    layers = tuple(runs.hidden_layer(f"layer {index}", index) for index in (2, 10, 11))
    write_run(replace(runs.full_run(("raw",)), hidden={"raw": layers}), tmp_path / "run.h5")
    assert [found.index for found in read_run(tmp_path / "run.h5").hidden["raw"]] == [2, 10, 11]


def test_a_run_of_an_earlier_release_has_no_hidden_layers_and_no_cosines():
    run = read_run(Path(__file__).parents[2] / "data" / "run-1.0.0.h5")
    assert (run.hidden, run.cosines) == ({}, {})


def test_every_status_comes_back_bit_for_bit(runs, tmp_path):
    written = runs.run(
        tuple(
            runs.BlockResult(name, (), {"raw": runs.VariantResult(runs.values(kappa=quantity))})
            for name, quantity in runs.EVERY_STATUS.items()
        )
    )
    write_run(written, tmp_path / "run.h5")
    back = read_run(tmp_path / "run.h5")
    assert {b.name: b.variants["raw"]["kappa"] for b in back.blocks} == runs.EVERY_STATUS


def test_a_run_without_blocks_comes_back(runs, tmp_path):
    write_run(runs.run(()), tmp_path / "run.h5")
    assert runs.differences(runs.run(()), read_run(tmp_path / "run.h5")) == []


def test_blocks_of_one_name_prefix_and_many_blocks_keep_their_arrays(runs, tmp_path):
    blocks = tuple(
        runs.BlockResult(
            str(n), (), {"raw": runs.VariantResult(runs.values(n), **runs.exact_arrays(n))}
        )
        for n in range(2, 24)
    )
    write_run(runs.run(blocks), tmp_path / "run.h5")
    assert runs.differences(runs.run(blocks), read_run(tmp_path / "run.h5")) == []


@pytest.mark.parametrize("version", ["2.0.0", "0.9.0", "10.0.0"])
def test_another_major_version_is_refused_by_name(version, edited):
    path = edited(lambda file: file.attrs.modify("encoding-version", version))
    with pytest.raises(
        UnknownSchema, match=rf"schema version {version}, .* reads 1\.0\.0; install"
    ):
        read_run(path)
    assert is_run(path)


def test_a_later_minor_version_is_read_and_its_additions_left_out(edited, runs):
    def later(file):
        file.attrs["encoding-version"] = "1.7.3"
        file["summary/kappa_new"] = np.ones((3, 1))
        file["rows/raw/0/novel"] = np.ones(4)
        file["neurons/raw/0/bound"] = 1.0

    assert runs.differences(runs.small_run(), read_run(edited(later))) == []


def test_an_edit_through_hdf5_is_read(edited):
    def edit(file):
        file["summary/kappa"][0, 0] = 3.0
        file["summary/kappa_status"][0, 0] = "unresolved"

    changed = read_run(edited(edit))["0"].variants["raw"]["kappa"]
    assert changed == Quantity(3.0, 4.0 - 1e-12, 4.0 + 1e-12, "unresolved", 1.0)


@pytest.mark.parametrize(
    "edit",
    [
        lambda file: file.pop("summary"),
        lambda file: file.pop("provenance"),
        lambda file: file["summary"].pop("kappa_low"),
        lambda file: file["provenance"].pop("config"),
        lambda file: file["provenance/warnings"].__setitem__((), "{}"),
        lambda file: file["provenance/config"].__setitem__((), "not json"),
        lambda file: file["summary/kappa_status"].__setitem__((0, 0), "exakt"),
        lambda file: file["summary/notes"].__setitem__((0, 0), "not json"),
        lambda file: file.attrs.pop("encoding-version"),
        lambda file: (file["summary"].pop("kappa"), file["summary"].__setitem__("kappa", 1.0)),
        lambda file: (
            file["summary"].pop("kappa_status"),
            file["summary"].__setitem__("kappa_status", np.ones((3, 1))),
        ),
        lambda file: file["summary/quantile"].__setitem__(0, 0.25),
    ],
)
def test_a_run_with_a_broken_part_is_one_store_error(edit, edited):
    with pytest.raises(StoreError, match="damaged"):
        read_run(edited(edit))


def test_foreign_hdf5_is_named_as_such(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"] = "anndata"
    with pytest.raises(StoreError, match="encoding-type 'anndata'"):
        read_run(path)
    assert not is_run(path)


@pytest.mark.parametrize("content", [b"", b"some text\n", b"\x89HDF\r\n\x1a\n", b"PK\x03\x04" * 99])
def test_foreign_bytes_are_one_store_error(content, tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(content)
    with pytest.raises(
        StoreError, match=r"not a run file \(it has no|not a hessdiag run, or it is"
    ):
        read_run(path)
    assert not is_run(path)


def test_a_missing_file_and_a_folder_say_so(tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        read_run(tmp_path / "no.h5")
    with pytest.raises(StoreError, match="is not a file"):
        read_run(tmp_path)
    assert not is_run(tmp_path)
    assert not is_run(tmp_path / "no.h5")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_run_is_refused(share, small_bytes, tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(small_bytes[: int(len(small_bytes) * share)])
    with pytest.raises(StoreError, match="damaged"):
        read_run(path)


def flipped(content, position, path):
    damaged = bytearray(content)
    damaged[position] ^= 1
    path.write_bytes(damaged)
    return path


def test_a_flipped_bit_anywhere_is_refused(small_bytes, tmp_path):
    end = len(small_bytes) - LENGTH
    for position in random.Random(0).sample(range(end), 40):
        with pytest.raises(StoreError, match="does not match its checksum"):
            read_run(flipped(small_bytes, position, tmp_path / "x.h5"))
    assert not is_run(tmp_path / "x.h5")


def test_a_flipped_bit_in_the_seal_loses_no_run(small_bytes, runs, tmp_path):
    path = flipped(small_bytes, len(small_bytes) - LENGTH, tmp_path / "x.h5")
    assert runs.differences(runs.small_run(), read_run(path)) == []
    with pytest.raises(StoreError, match="does not match its checksum"):
        read_run(flipped(small_bytes, -1, tmp_path / "x.h5"))


def test_an_edit_drops_the_seal(edited, small_bytes):
    assert small_bytes[-LENGTH:].startswith(MARK)
    path = edited(lambda file: file.attrs.modify("hessdiag_version", "0.2.0"))
    assert MARK not in path.read_bytes()
    assert read_run(path).hessdiag_version == "0.2.0"


def test_a_flipped_bit_in_a_number_is_refused_after_an_edit_too(edited, tmp_path):
    content = edited(lambda file: file.attrs.modify("hessdiag_version", "0.2.0")).read_bytes()
    eigenvalues = np.linspace(-1.0, 4.0, 10).tobytes()
    start = content.index(eigenvalues)
    for offset in range(0, len(eigenvalues), 8):
        with pytest.raises(StoreError, match="damaged"):
            read_run(flipped(content, start + offset, tmp_path / "x.h5"))


def test_a_run_on_a_read_only_medium_is_read(small_file):
    small_file.chmod(0o400)
    assert len(read_run(small_file).blocks) == 3


def test_the_run_of_schema_1_0_0_is_still_read(tmp_path):
    """Written once by release 0.1.0 and read for ever."""
    stored = Path(__file__).parents[2] / "data" / "run-1.0.0.h5"
    run = read_run(stored)
    assert run.variants == ("raw",)
    assert run.blocks[-1].name == "whole"
    assert run["whole"].variants["raw"]["lambda_max"].status == "exact"
    shutil.copy(stored, tmp_path / "copy.h5")
    write_run(run, tmp_path / "copy.h5", force=True)
    assert read_run(tmp_path / "copy.h5").to_dict() == run.to_dict()


@pytest.mark.parametrize("name", ["x" * 4000, "null\0inside"])
def test_a_name_that_no_file_can_have_is_a_store_error(name, tmp_path):
    with pytest.raises(StoreError, match=r"is no path of a file|does not exist"):
        read_run(tmp_path / name)
    assert not is_run(tmp_path / name)
