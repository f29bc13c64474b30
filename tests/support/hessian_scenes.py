"""Scenes of blocks whose Hessian is a given matrix, for makers that look at nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hessdiag.blocks import Block
from hessdiag.curvature.objective import Objective
from hessdiag.options import make_options
from hessdiag.variants.scene import Scene
from hessdiag_probes.types import CountedMatvec


def scene(
    matrix: Tensor,
    *,
    exact: bool = True,
    sizes: Mapping[str, int] | None = None,
    rows: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Scene:
    """A block of these parameters, in this order, with this Hessian."""
    n = len(matrix)
    sizes = {"layer.weight": n} if sizes is None else sizes
    named = {name: nn.Parameter(torch.zeros(size, dtype=dtype)) for name, size in sizes.items()}
    return Scene(
        block=Block("whole", tuple(named), n),
        named=named,
        objective=cast("Objective", None),
        options=make_options(**options),
        optimizer=None,
        changed=False,
        product=CountedMatvec(lambda v: (matrix @ v.to(matrix)).to(v)),
        matrix=matrix.clone() if exact else None,
        rows={name: np.asarray(value, dtype=float) for name, value in (rows or {}).items()},
        dead=~(matrix != 0).any(dim=1),
        iterates=(),
        cache={},
    )


def scaled(matrix: Tensor, d: Tensor) -> Tensor:
    """``D A D``, exactly where ``d`` holds powers of two."""
    return d[:, None] * matrix * d


def equal_squares(low: float = 1.0) -> Tensor:
    """Positive definite, 4 × 4, and no diagonal leaves a smaller κ than its own, 100 / low.

    The eigenvectors at both ends have entries of equal squares, which proves it (maths 5.3); the
    two in the middle do not, so that the diagonal is not constant and Jacobi is not best.
    """
    half = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1]]).double() / 2
    middle = torch.tensor([[1, 0, -1, 0], [0, 1, 0, -1]]).double() / 2**0.5
    vector = torch.cat([half, middle]).T
    return (
        vector
        @ torch.diag(torch.tensor([100, low, 50 * low, 2 * low], dtype=torch.float64))
        @ vector.T
    )


def two_cyclic(sigma: Tensor, seed: int = 0) -> Tensor:
    """Unit diagonal, two blocks coupled by a matrix of these singular values: eigenvalues 1 ± σ.

    No diagonal leaves less than (1 + σ_max) / (1 - σ_max), as Forsythe and Straus (1955) proved.
    """
    n = len(sigma)
    seeded = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=seeded, dtype=torch.float64))[0]
        for _ in range(2)
    )
    coupling = (left * sigma) @ right.T
    eye = torch.eye(n, dtype=torch.float64)
    return torch.cat([torch.cat([eye, coupling], 1), torch.cat([coupling.T, eye], 1)])
