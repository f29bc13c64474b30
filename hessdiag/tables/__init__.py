"""Tables of runs: results in, text out."""

from hessdiag.tables.diff import diff_table
from hessdiag.tables.steps import steps_table
from hessdiag.tables.summary import summary_table, worst_block

__all__ = ["diff_table", "steps_table", "summary_table", "worst_block"]
