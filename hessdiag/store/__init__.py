"""Run files: one HDF5 file per analysis, described as data in :mod:`hessdiag.store.schema`."""

from hessdiag.store.read import is_run, read_run
from hessdiag.store.validate import validate_run
from hessdiag.store.write import check_target, write_run

__all__ = ["check_target", "is_run", "read_run", "validate_run", "write_run"]
