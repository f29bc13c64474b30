"""Diagonal scalings ``D A D`` of a symmetric operator: unit diagonal, and rows of equal norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag_probes.exact import EPS, eigvalsh, equilibrate
from hessdiag_probes.random import gaussian
from hessdiag_probes.types import CountedMatvec, Matvec

TOLERANCE = 1e-10
SWEEPS = 1000
STALLED = 100  # sweeps that do not lower the residual by one part in a hundred
CERTAIN = 10.0  # an eigenvalue is positive beyond this many times its error, as in `exact`


@dataclass(frozen=True, slots=True)
class RowScaling:
    """``D A D`` with rows of 2-norm 1.

    Attributes:
        scale: The diagonal of ``D``, shape ``(n,)``, float64, positive; 1 for a zero row.
        residual: ``max |norm - 1|`` over the nonzero rows, as the last sweep saw it; of sampled
            rows their error is in it.
        sweeps: Done.
        matvecs: Products spent.
    """

    scale: Tensor
    residual: float
    sweeps: int
    matvecs: int = 0


@dataclass(frozen=True, slots=True)
class UnitSpectrum:
    """The ends of the spectrum of ``J = D A D`` with unit diagonal, ``A`` positive definite.

    Attributes:
        smallest: Certainly positive.
        largest: At most n.
        error: Bounds the error of either, rounding and the errors of the entries included.
    """

    smallest: float
    largest: float
    error: float


def row_scaling(matrix: Tensor, tolerance: float = TOLERANCE, sweeps: int = SWEEPS) -> RowScaling:
    """Scale a symmetric matrix to rows of 2-norm 1.

    Args:
        matrix: Symmetric, shape ``(n, n)``.
        tolerance: Ends once ``residual`` is no more than this.
        sweeps: At most this many; fewer where the residual no longer falls.

    Returns:
        The scale of the smallest residual. A residual well above ``tolerance`` says that no such
        scaling was found, as none exists for a saddle with a rectangular coupling.

    Raises:
        ValueError: The matrix is not square.
        Breakdown: The matrix is not finite.

    Cost:
        ``n²`` flops per sweep; two further matrices.

    Source:
        Ruiz (2001), in the 2-norm; as a product with the squared entries.
    """
    start = equilibrate(matrix)
    squares = start.matrix.square_()
    x = torch.ones_like(start.scale)
    best, best_x, stalled, done = float("inf"), x, 0, 0
    while True:
        square = x * (squares @ x)
        norms = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
        residual = float((norms - 1).abs().amax())
        stalled = 0 if residual < 0.99 * best else stalled + 1
        if residual < best:
            best, best_x = residual, x
        if best <= tolerance or stalled >= STALLED or done >= sweeps:
            return RowScaling(start.scale * best_x.sqrt(), best, done)
        x = x / norms
        done += 1


def sampled_row_scaling(
    matvec: Matvec,
    like: Tensor,
    *,
    generator: torch.Generator,
    probes: int = 10,
    sweeps: int = 8,
) -> RowScaling:
    """Scale a symmetric operator to rows of about 2-norm 1, by random products.

    Args:
        matvec: ``v -> A v`` for a real symmetric ``A``.
        like: Shape ``(n,)``; gives the dtype and the device of the probes.
        generator: On the CPU, as :func:`hessdiag_probes.generator` makes it.
        probes: Gaussian vectors per sweep: an entry of their product has its row's norm as its
            standard deviation.
        sweeps: Each halves the decades between the rows.

    Returns:
        The scale; norms are known to about ``1/√(2 probes)`` each.

    Raises:
        Breakdown: A product is not finite.

    Cost:
        ``probes · sweeps`` matvecs and a few vectors.

    Source:
        Ruiz (2001), in the 2-norm.
    """
    product = CountedMatvec(matvec)
    scale = torch.ones_like(like, dtype=torch.float64)
    residual = 0.0
    for _ in range(sweeps):
        squares = torch.zeros_like(scale)
        for _ in range(probes):
            probe = gaussian(len(scale), generator=generator, device=like.device)
            image = product((scale * probe).to(like))
            squares += (scale * image.double()).square()
        mean = squares / probes
        norms = torch.where(mean > 0, mean, torch.ones_like(mean)).sqrt()
        residual = float((norms - 1).abs().amax())
        scale = scale / norms.sqrt()
    return RowScaling(scale, residual, sweeps, product.count)


def unit_diagonal(matrix: Tensor) -> Tensor:
    """``D A D`` with ``D = diag(|a_ii|)^-½``: a diagonal of ±1, and 0 where ``a_ii`` is 0."""
    diagonal = matrix.diagonal().abs()
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
    return matrix * scale[:, None] * scale


def unit_spectrum(matrix: Tensor, entry_error: float = 0.0) -> UnitSpectrum | None:
    """The ends of the spectrum of ``J``, the matrix scaled to unit diagonal.

    Args:
        matrix: Symmetric, shape ``(n, n)``.
        entry_error: A bound of ``|δa_ij| / sqrt(a_ii a_jj)``, the errors of the given entries.

    Returns:
        None unless the matrix is certainly positive definite: a diagonal entry is not positive,
        or the smallest eigenvalue is not ten times larger than all that errors can do to it.

    Raises:
        ValueError: The matrix is not square.
        Breakdown: The matrix is not finite.

    Cost:
        The eigenvalues of a dense matrix.

    Source:
        Demmel and Veselic (1992): the entries are right in proportion to ``sqrt(a_ii a_jj)``, so
        that ``J`` decides whatever the range of the matrix.
    """
    if not bool((matrix.diagonal() > 0).all()):
        return None
    n = len(matrix)
    value = eigvalsh(unit_diagonal(matrix))
    smallest, largest = float(value[0]), float(value[-1])
    error = 4 * max(n, 10) * EPS * largest + n * entry_error
    if not smallest > CERTAIN * error:
        return None
    return UnitSpectrum(smallest, largest, error)
