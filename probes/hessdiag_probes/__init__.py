"""Matrix-free estimators: pure functions of a matvec.

They know no network, no file and no terminal.
"""

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
from hessdiag_probes.random import gaussian, generator, rademacher, sphere
from hessdiag_probes.types import CountedMatvec, Matvec, Vector

__all__ = [
    "Assembled",
    "Breakdown",
    "CountedMatvec",
    "Ends",
    "Equilibrated",
    "Estimate",
    "Estimates",
    "Matvec",
    "Moments",
    "PositiveSpectrum",
    "Power",
    "Ritz",
    "Spectrum",
    "Tridiagonal",
    "Vector",
    "assemble",
    "eigh",
    "eigvalsh",
    "equilibrate",
    "gaussian",
    "generator",
    "hutchinson",
    "lanczos",
    "positive_spectrum",
    "power",
    "power_ends",
    "rademacher",
    "sphere",
]
