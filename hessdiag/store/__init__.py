"""Run files: one HDF5 file per analysis, described as data in :mod:`hessdiag.store.schema`."""

from hessdiag.store.journal import is_unfinished, open_run
from hessdiag.store.read import is_run, read_run
from hessdiag.store.validate import validate_run
from hessdiag.store.write import check_target, write_run

__all__ = [
    "check_target",
    "is_run",
    "is_unfinished",
    "open_run",
    "read_run",
    "validate_run",
    "write_run",
]
