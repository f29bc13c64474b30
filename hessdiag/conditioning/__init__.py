"""Eigenvalues or Ritz pairs in, condition numbers and forecasts with their certificates out."""

from hessdiag.conditioning.kappa import exact_quantities, rates
from hessdiag.conditioning.spectrum import ExactSpectrum, Inertia, count_inertia, zero_tolerance

__all__ = [
    "ExactSpectrum",
    "Inertia",
    "count_inertia",
    "exact_quantities",
    "rates",
    "zero_tolerance",
]
