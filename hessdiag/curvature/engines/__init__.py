"""How a product over the dataset is computed: graphs kept in memory, or built again each time."""

from hessdiag.curvature.engines.base import BUILD, BuildProduct, Engine, Summed
from hessdiag.curvature.engines.choice import make_engine
from hessdiag.curvature.engines.difference import Difference
from hessdiag.curvature.engines.kept import Kept, graph_bytes
from hessdiag.curvature.engines.linearized import Linearized
from hessdiag.curvature.engines.recompute import Recompute

__all__ = [
    "BUILD",
    "BuildProduct",
    "Difference",
    "Engine",
    "Kept",
    "Linearized",
    "Recompute",
    "Summed",
    "graph_bytes",
    "make_engine",
]
