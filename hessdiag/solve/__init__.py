"""One block, by its matrix or its product, to the fields of its row."""

from hessdiag.solve.budget import Budget, fitted
from hessdiag.solve.exact import solve_exact
from hessdiag.solve.matrix_free import solve_matrix_free
from hessdiag.solve.problem import Noise, Problem, Solved, measure_noise, skipped_fields

__all__ = [
    "Budget",
    "Noise",
    "Problem",
    "Solved",
    "fitted",
    "measure_noise",
    "skipped_fields",
    "solve_exact",
    "solve_matrix_free",
]
