"""A run file shows nothing but itself."""

import h5py
import numpy as np
import pytest

from hessdiag.errors import StoreError
from hessdiag.store import read_run, validate_run

NUMBER = 31337.5


@pytest.fixture
def secret(tmp_path):
    """Another file of the user's, in HDF5 and in raw bytes."""
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["numbers"] = np.full((3, 1), NUMBER)
    (tmp_path / "raw.bin").write_bytes(np.full(3, NUMBER).tobytes())
    return tmp_path


def external_link(file, folder):
    file["summary/kappa"] = h5py.ExternalLink(str(folder / "secret.h5"), "/numbers")


def relative_link(file, folder):
    file["summary/kappa"] = h5py.ExternalLink("secret.h5", "/numbers")


def virtual_dataset(file, folder):
    layout = h5py.VirtualLayout((3, 1), "f8")
    layout[:] = h5py.VirtualSource(folder / "secret.h5", "numbers", (3, 1))
    file.create_virtual_dataset("summary/kappa", layout)


def raw_storage(file, folder):
    where = [(str(folder / "raw.bin"), 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("summary/kappa", shape=(3, 1), dtype="f8", external=where)


def beside_the_schema(file, folder):
    external_link(file, folder)
    file.move("summary/kappa", "later/addition")


@pytest.mark.parametrize("read", [read_run, validate_run])
@pytest.mark.parametrize(
    "lead", [external_link, relative_link, virtual_dataset, raw_storage, beside_the_schema]
)
def test_a_run_that_leads_to_another_file_is_refused(lead, read, edited, secret):
    def edit(file):
        del file["summary/kappa"]
        lead(file, secret)

    with pytest.raises(StoreError, match=r"not self-contained: .* leads to the file") as caught:
        read(edited(edit))
    assert "secret.h5" in str(caught.value) or "raw.bin" in str(caught.value)


def test_a_cycle_of_groups_is_read(edited, runs):
    path = edited(lambda file: file["summary"].__setitem__("again", file["/"]))
    assert runs.differences(read_run(path), runs.small_run()) == []


@pytest.mark.parametrize("text", ["3", "{}", "[3]", "[null]"])
def test_notes_that_are_no_texts_are_damage(text, edited):
    def edit(file):
        del file["summary/notes"]
        file["summary/notes"] = np.full((3, 1), text, dtype=object)

    with pytest.raises(StoreError, match="notes is not a list of texts"):
        read_run(edited(edit))


def test_warnings_that_are_no_texts_are_damage(edited):
    def edit(file):
        file["provenance/warnings"][()] = "[1, null]"

    with pytest.raises(StoreError, match="warnings holds other than texts"):
        read_run(edited(edit))
