"""Spectra, what --density says of them from a few probes, and which of its numbers are wrong."""

from __future__ import annotations

import math

import numpy as np
import torch

from hessdiag.conditioning.bounds import RitzSpectrum
from hessdiag.conditioning.density import density_fields
from hessdiag.run import QUANTILES, THRESHOLDS
from hessdiag_probes import generator, stochastic_quadrature

TAU = 1e-11
BLOCKS = {
    "spread": torch.logspace(-2, 0, 120, dtype=torch.float64),
    "far spread": torch.logspace(-9, 0, 120, dtype=torch.float64),
    "clustered": torch.cat([c + 1e-6 * torch.arange(40) for c in (0.1, 0.2, 1.0)]).double(),
    "outlier": torch.cat([torch.linspace(0.001, 0.01, 118), torch.tensor([0.3, 1.0])]).double(),
    "indefinite": torch.cat([torch.linspace(-0.5, -0.1, 40), torch.linspace(0.2, 1, 80)]).double(),
    "low rank": torch.cat([torch.zeros(110), torch.linspace(0.1, 1, 10)]).double(),
    "singular": torch.cat([torch.zeros(40), torch.logspace(-2, 0, 80)]).double(),
    "negative": -torch.linspace(0.1, 1, 120, dtype=torch.float64),
}


def ends(values, *, floor=None, width=1e-4, tolerance=TAU, rounding=1e-13):
    """What a Lanczos run would know of these eigenvalues, with outer ends off by ``width``."""
    low, high = float(values.min()), float(values.max())
    return RitzSpectrum(
        value=np.array([low + width / 3, high - width / 3]),
        bound=np.array([width / 3, width / 3]),
        low=low - width,
        high=high + width,
        failure=1e-3,
        rounding=rounding,
        tolerance=tolerance,
        floor=floor,
    )


def solve(values, *, seed=0, probes=5, steps=20, **known):
    quadrature = stochastic_quadrature(
        lambda v: values * v, len(values), probes, steps, generator=generator(seed, "density")
    )
    return density_fields(quadrature, ends(values, **known))


def truths(values):
    """The fields of the contract for these eigenvalues; keys as in the values, axes as pairs."""
    values = values.sort(descending=True).values
    n, top, norm = len(values), float(values[0]), float(values.abs().max())
    positive, negative = int((values > TAU).sum()), int((values < -TAU).sum())
    found = {
        ("n_positive",): positive,
        ("n_negative",): negative,
        ("n_zero",): n - positive - negative,
        ("negative_count",): negative / n,
    }
    for q in QUANTILES:
        if positive:
            k = math.ceil(round(float(q) * positive, 9))
            found["kappa_quantile", q] = top / float(values[k - 1])
    for t in THRESHOLDS:
        beyond = values[values > float(t) * norm]
        found["profile_n_positive", t] = len(beyond)
        found["profile_n_negative", t] = int((values < -float(t) * norm).sum())
        if len(beyond):
            found["profile_kappa", t] = top / float(beyond[-1])
    return found


def pick(values, key):
    found = values.get(key[0])
    return found[key[1]] if len(key) == 2 and found is not None else found


def wrong(values, known):
    """The keys whose interval does not hold the truth."""
    found = []
    for key, truth in known.items():
        quantity = pick(values, key)
        if quantity is None or quantity.status == "unresolved":
            continue
        reach = 1e-12 * abs(truth)
        if quantity.low is None or not quantity.low - reach <= truth <= quantity.high + reach:
            found.append(key)
    return found


def claimed(values, known):
    """The keys that are a number at all."""
    found = {key: pick(values, key) for key in known}
    return [key for key, q in found.items() if q is not None and q.value is not None]
