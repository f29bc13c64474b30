"""Matrix-free estimators: pure functions of a matvec.

They know no network, no file and no terminal.
"""

from hessdiag_probes.basis import Basis, Share, Storage
from hessdiag_probes.errors import Breakdown
from hessdiag_probes.exact import (
    Assembled,
    Equilibrated,
    PositiveSpectrum,
    Spectrum,
    assemble,
    eigh,
    eigvalsh,
    equilibrate,
    positive_spectrum,
)
from hessdiag_probes.hutchinson import Estimate, Estimates, Moments, hutchinson
from hessdiag_probes.lanczos import Ritz, Tridiagonal, lanczos
from hessdiag_probes.power import Ends, Power, power, power_ends
from hessdiag_probes.quadrature import Density, Mass, Quadrature, stochastic_quadrature
from hessdiag_probes.quantiles import Quantile, Span, next_above, quantile, ranked
from hessdiag_probes.random import gaussian, generator, rademacher, sphere
from hessdiag_probes.rules import Rule, gauss, gauss_radau
from hessdiag_probes.types import CountedMatvec, Matvec, Vector

__all__ = [
    "Assembled",
    "Basis",
    "Breakdown",
    "CountedMatvec",
    "Density",
    "Ends",
    "Equilibrated",
    "Estimate",
    "Estimates",
    "Mass",
    "Matvec",
    "Moments",
    "PositiveSpectrum",
    "Power",
    "Quadrature",
    "Quantile",
    "Ritz",
    "Rule",
    "Share",
    "Span",
    "Spectrum",
    "Storage",
    "Tridiagonal",
    "Vector",
    "assemble",
    "eigh",
    "eigvalsh",
    "equilibrate",
    "gauss",
    "gauss_radau",
    "gaussian",
    "generator",
    "hutchinson",
    "lanczos",
    "next_above",
    "positive_spectrum",
    "power",
    "power_ends",
    "quantile",
    "rademacher",
    "ranked",
    "sphere",
    "stochastic_quadrature",
]
