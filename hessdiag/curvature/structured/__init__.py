"""Matrices of blocks by the structure of their layers (maths 4.1), not column by column."""

from hessdiag.curvature.structured.assembly import structured_matrix
from hessdiag.curvature.structured.graph import NotStructured
from hessdiag.curvature.structured.sites import Plan, Site, make_plan

__all__ = ["NotStructured", "Plan", "Site", "make_plan", "structured_matrix"]
