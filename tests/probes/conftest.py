"""Matrices whose spectrum is known before any code runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
SPECTRA = {
    "spread": torch.linspace(1, 24, 24, dtype=torch.float64),
    "clustered": torch.cat([c + 1e-5 * torch.arange(8).double() for c in (1.0, 2.0, 10.0)]),
    "repeated": torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).repeat_interleave(8),
    "indefinite": torch.linspace(-3, 5, 24, dtype=torch.float64),
    "singular": torch.cat([torch.zeros(10), torch.linspace(1, 2, 14)]).double(),
    "rank one": torch.cat([torch.zeros(23), torch.tensor([7.0])]).double(),
    "zero": torch.zeros(24, dtype=torch.float64),
    "n = 1": torch.tensor([-3.0], dtype=torch.float64),
    "n = 2": torch.tensor([-1.0, 2.0], dtype=torch.float64),
    "range 1e12": torch.logspace(-12, 0, 24, dtype=torch.float64),
}


def symmetric_matrix(spectrum: Tensor) -> Tensor:
    """A dense symmetric matrix with these eigenvalues, right to ``n eps`` of the largest."""
    n = len(spectrum)
    seeded = torch.Generator().manual_seed(n)
    turn, _ = torch.linalg.qr(torch.randn(n, n, generator=seeded, dtype=torch.float64))
    matrix = (turn * spectrum) @ turn.T
    return (matrix + matrix.T) / 2


@pytest.fixture
def symmetric() -> Callable[[Tensor], Tensor]:
    return symmetric_matrix


@pytest.fixture(params=SPECTRA)
def spectrum(request: pytest.FixtureRequest) -> Tensor:
    """Each of the prescribed spectra, ascending."""
    return SPECTRA[request.param]


@pytest.fixture
def matrix(spectrum: Tensor) -> Tensor:
    return symmetric_matrix(spectrum)


@pytest.fixture
def rounding(spectrum: Tensor) -> float:
    """What float64 may do to an eigenvalue of ``matrix``."""
    return 10 * len(spectrum) * EPS * float(spectrum.abs().max())


@pytest.fixture(scope="session")
def bus() -> Tensor:
    """1138_bus, a public yardstick that is not ours to ship."""
    path = Path(__file__).parents[3] / "shared" / "data" / "1138_bus.mtx"
    if not path.exists():
        pytest.skip("needs ../shared/data/1138_bus.mtx")
    from scipy.io import mmread

    return torch.from_numpy(mmread(path).toarray())
