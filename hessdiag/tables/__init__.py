"""Tables of a run: results in, text out."""

from hessdiag.tables.summary import summary_table, worst_block

__all__ = ["summary_table", "worst_block"]
