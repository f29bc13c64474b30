"""One block, by its matrix or its product, to the fields of its row."""

from hessdiag.solve.exact import solve_exact
from hessdiag.solve.matrix_free import FORECAST_STEPS, Budget, solve_matrix_free
from hessdiag.solve.problem import Noise, Problem, Solved, measure_noise, skipped_fields

__all__ = [
    "FORECAST_STEPS",
    "Budget",
    "Noise",
    "Problem",
    "Solved",
    "measure_noise",
    "skipped_fields",
    "solve_exact",
    "solve_matrix_free",
]
