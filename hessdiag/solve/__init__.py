"""One block, by its matrix or its product, to the fields of its row."""

from hessdiag.solve.budget import Budget, fitted
from hessdiag.solve.exact import entry_error, positive_floor, solve_exact, without_noise
from hessdiag.solve.matrix_free import dead_rows, solve_matrix_free
from hessdiag.solve.problem import Noise, Problem, Solved, measure_noise, skipped_fields

__all__ = [
    "Budget",
    "Noise",
    "Problem",
    "Solved",
    "dead_rows",
    "entry_error",
    "fitted",
    "measure_noise",
    "positive_floor",
    "skipped_fields",
    "solve_exact",
    "solve_matrix_free",
    "without_noise",
]
