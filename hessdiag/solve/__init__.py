"""One block, by its matrix or its product, to the fields of its row."""

from hessdiag.solve.exact import solve_exact
from hessdiag.solve.krylov import solve_lanczos
from hessdiag.solve.problem import Noise, Problem, Solved, measure_noise, skipped_fields

__all__ = [
    "Noise",
    "Problem",
    "Solved",
    "measure_noise",
    "skipped_fields",
    "solve_exact",
    "solve_lanczos",
]
