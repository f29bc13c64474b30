"""A run file holds what it shows: HDF5 could make it show another file of the user's."""

from __future__ import annotations

from pathlib import Path

import h5py

from hessdiag.errors import StoreError


def check_contained(path: Path, file: h5py.File) -> None:
    """Refuse a file that takes its content from elsewhere, before any of that is read.

    Raises:
        StoreError: It has a link, a virtual dataset or raw storage in another file.
    """
    # An exception inside of a visit is lost in HDF5's own; what a visit returns is not.
    found = file.visititems_links(_linked) or file.visititems(_stored)
    if found:
        name, target = found
        raise StoreError(
            f"{path} is not self-contained: /{name} leads to the file {target!r}, and no run of "
            "hessdiag does that; nothing was read from there. Take the run from whom you trust"
        )


def _linked(
    name: str, link: h5py.HardLink | h5py.SoftLink | h5py.ExternalLink
) -> tuple[str, str] | None:
    return (name, str(link.filename)) if isinstance(link, h5py.ExternalLink) else None


def _stored(name: str, item: h5py.Group | h5py.Dataset) -> tuple[str, str] | None:
    if not isinstance(item, h5py.Dataset):
        return None
    if item.is_virtual:
        # A source in the file itself is called "."; no run has that either.
        return name, next((str(source.file_name) for source in item.virtual_sources()), ".")
    return (name, str(item.external[0][0])) if item.external else None
