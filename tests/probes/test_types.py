from __future__ import annotations

import pytest
import torch

import hessdiag_probes
from hessdiag_probes import Breakdown, CountedMatvec


def test_the_exported_names_are_these():
    assert hessdiag_probes.__all__ == [
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
    assert all(hasattr(hessdiag_probes, name) for name in hessdiag_probes.__all__)


def test_products_are_counted():
    product = CountedMatvec(lambda v: 2 * v)
    for _ in range(3):
        assert torch.equal(product(torch.ones(2)), torch.full((2,), 2.0))
    assert product.count == 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_product_that_is_not_finite_is_a_breakdown(bad):
    product = CountedMatvec(lambda v: v * bad)
    with pytest.raises(Breakdown, match="product 1 of the operator is not finite"):
        product(torch.ones(2))


def test_a_product_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="one vector of the same length"):
        CountedMatvec(lambda v: v[:, None])(torch.ones(2))
