"""A block's assembled matrix to the fields of its row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hessdiag.conditioning.diagonal import diagonal_floor
from hessdiag.conditioning.forecast import gd_forecast
from hessdiag.conditioning.kappa import exact_quantities, rates
from hessdiag.conditioning.spectrum import (
    NOISE_FACTOR,
    ROUNDING_SHARE,
    ExactSpectrum,
    Inertia,
    count_inertia,
    zero_tolerance,
)
from hessdiag.quantity import Quantity
from hessdiag.solve.problem import (
    ROW_FACTOR,
    SMALL_STEP,
    Array,
    Noise,
    Problem,
    Solved,
    common_fields,
    drowned_fields,
    zero_fields,
)
from hessdiag_probes.exact import eigh, eigvalsh, equilibrate, positive_spectrum
from hessdiag_probes.random import generator, sphere
from hessdiag_probes.types import Vector

HUGE_RANGE = 1e4  # λ_min below this many τ: solve a positive definite block relatively
STORED_VECTORS = 2  # at either end


def solve_exact(matrix: Tensor, problem: Problem) -> Solved:
    """All eigenvalues of an assembled block, and every field that follows from them.

    Args:
        matrix: Symmetric, (n, n), without the problem's shift.
        problem: The block, in the coordinates of the matrix.
    Cost:
        Two or three dense eigenproblems, O(n³); two more products for the equilibrated noise.
    Source:
        maths 1.1–1.5; huge range by 1.6 (iv).
    """
    cleaned = without_noise(matrix, problem.noise)
    matrix, inactive, doubt, lost = cleaned.matrix, cleaned.dead, cleaned.doubt, cleaned.lost
    if problem.doubt is not None:
        doubt = torch.hypot(doubt, problem.doubt.to(doubt))
    matrix.diagonal().add_(problem.shift)
    norms = matrix.norm(dim=1)
    values = common_fields(problem, int(inactive.sum()), "exact")
    if not bool((norms > 0).any()):
        if bool((doubt > 0).any()):
            return Solved(values | drowned_fields(problem), {}, _rows(matrix, problem, doubt, lost))
        nothing = {"eigenvalue": np.zeros(len(norms))}
        fields = zero_fields(problem, len(norms))
        return Solved(values | fields, nothing, _rows(matrix, problem, doubt, lost))
    live = norms > 0
    active = matrix[live][:, live]
    spectrum, vector, seen = _decompose(active, live, problem)
    full, order = _with_zeros(
        _doubted(spectrum, doubt, congruent=problem.inertia is not None),
        matrix,
        float(doubt.norm()),
    )
    gradient = problem.gradient.to(vector)
    coefficient = torch.cat([vector.T @ gradient[live], gradient[~live]])[order]
    values |= exact_quantities(full, eps=problem.eps, damping=problem.damping)
    values |= gd_forecast(
        full.value,
        coefficient.cpu().numpy(),
        error=full.error,
        tolerance=full.tolerance,
        resolved=full.resolved,
        gradient_error=problem.noise.gradient,
        loss=problem.attainable,
    )
    kappa = values["kappa"]
    if isinstance(kappa, Quantity):
        values |= rates(kappa)
    values["gd_rate_applies"] = _rate_applies(full, problem)
    values["notes"] = [*_notes(full), *_disagreement(seen, problem.inertia)]
    arrays = {"eigenvalue": full.value} | _extremes(full, vector, live)
    return Solved(values, arrays, _rows(matrix, problem, doubt, lost))


@dataclass(frozen=True)
class Cleaned:
    """A block's matrix without the rows that are rounding noise.

    Attributes:
        matrix: Those rows and columns zeroed, (n, n).
        dead: Which, (n,).
        doubt: Norms of the zeroed rows that may be real, as those of some hundred times their own
            noise, (n,); 0 for all others.
        lost: Norms of what the other rows had in the zeroed columns, (n,).
    """

    matrix: Tensor
    dead: Tensor
    doubt: Vector
    lost: Vector


def without_noise(matrix: Tensor, noise: Noise) -> Cleaned:
    """The matrix with its noise rows and columns zeroed, which they are (maths 0.6)."""
    norms = matrix.norm(dim=1)
    dead = norms <= ROW_FACTOR * noise.rows.to(norms)
    if float(norms.norm()) <= ROW_FACTOR * noise.block * math.sqrt(len(norms)):
        dead = torch.ones_like(dead)
    clean = matrix.clone()
    clean[dead] = 0.0
    lost = clean[:, dead].norm(dim=1)
    clean[:, dead] = 0.0
    return Cleaned(clean, dead, noise.doubtful(norms, dead), lost)


def positive_floor(matrix: Tensor, problem: Problem) -> float | None:
    """What no diagonal brings κ of a cleaned positive definite matrix below, or None.

    Args:
        matrix: H, symmetric, (n, n), weight decay included.
        problem: The block, raw.
    Cost:
        The eigenvalues of a dense matrix and one measurement of noise.
    """
    error = entry_error(matrix, problem)
    return None if error is None else diagonal_floor(matrix, entry_error=error)


def entry_error(matrix: Tensor, problem: Problem) -> float | None:
    """A bound of ``|δh_ij| / sqrt(h_ii h_jj)`` on the live rows, by one measurement of noise.

    None unless all of them have a positive diagonal.
    """
    live = (matrix != 0).any(dim=1)
    diagonal = matrix.diagonal()[live]
    if not bool(live.any()) or not bool((diagonal > 0).all()):
        return None
    entry = _scaled_noise(problem, live, diagonal.rsqrt(), "relative")
    spread = _relative_rounding(problem, live, diagonal.rsqrt())
    return 4 * problem.eps + 10 * entry / math.sqrt(int(live.sum())) + spread


def _doubted(spectrum: ExactSpectrum, doubt: Vector, *, congruent: bool = False) -> ExactSpectrum:
    """The spectrum with what the doubtful rows may add, by Weyl's theorem."""
    count = int((doubt > 0).sum())
    if count == 0:
        return spectrum
    reach = math.sqrt(2) * float(doubt.norm())
    inertia, most = spectrum.inertia, len(doubt)
    if not congruent:  # else the signs are those of raw, whose own doubts they hold
        inertia = replace(
            inertia,
            positive_high=min(inertia.positive_high + count, most),
            negative_high=min(inertia.negative_high + count, most),
            ambiguous=True,
        )
    return replace(
        spectrum,
        error=spectrum.error + reach,
        inertia=inertia,
        noise=max(spectrum.noise, reach),
    )


def _decompose(
    active: Tensor, live: Tensor, problem: Problem
) -> tuple[ExactSpectrum, Tensor, Inertia]:
    """The spectrum of the live rows, its eigenvectors, and the inertia that they show."""
    size = active.shape[0]
    balanced = equilibrate(active)
    noise = _scaled_noise(problem, live, balanced.scale, "equilibrated")
    if problem.noise.coarse and problem.rounding is not None:
        errors = problem.rounding[live][:, live].to(balanced.scale)
        spread = float((balanced.scale[:, None] * errors * balanced.scale).norm())
        noise = max(noise, spread / (ROUNDING_SHARE * NOISE_FACTOR))
    signs = eigvalsh(balanced.matrix)
    norm = float(signs.abs().max())
    # Narrower products have no entry right enough for a huge range to mean anything (maths 0.3).
    narrow = problem.narrow
    own = count_inertia(
        signs.cpu().numpy(), zero_tolerance(norm, size, problem.eps, noise), narrow=narrow
    )
    inertia = own if problem.inertia is None else problem.inertia
    found = eigh(active)
    value, vector = found.value, found.vector
    # Eigenvalues are right to a share of τ, which must hold the congruence's errors, too.
    spread = 0.0 if problem.rounding is None else float(problem.rounding.norm())
    block = max(problem.noise.block, spread / (ROUNDING_SHARE * NOISE_FACTOR))
    tolerance = zero_tolerance(float(value.abs().max()), size, problem.eps, block)
    error = torch.full_like(value, ROUNDING_SHARE * tolerance)
    definite = inertia.positive == size and not inertia.ambiguous
    if definite and not narrow and float(value[0]) < HUGE_RANGE * tolerance:
        scale = active.diagonal().clamp_min(torch.finfo(active.dtype).tiny).rsqrt()
        entry = _scaled_noise(problem, live, scale, "relative")
        certified = positive_spectrum(
            active,
            entry_error=4 * problem.eps
            + 10 * entry / math.sqrt(size)
            + _relative_rounding(problem, live, scale),
        )
        if certified is not None:
            # Both solve the same matrix: each eigenvalue from where it is better known.
            relative = certified.relative_error * certified.value.to(active)
            value = torch.where(relative < error, certified.value.to(active), value)
            value = value.cummax(dim=0).values
            error, tolerance = torch.minimum(relative, error), 0.0
            vector = certified.vector.to(active)
    return (
        ExactSpectrum(
            value=value.cpu().numpy(),
            error=error.cpu().numpy(),
            tolerance=tolerance,
            inertia=inertia,
            diagonal=active.diagonal().cpu().numpy(),
            frobenius=float(active.norm()),
            noise=max(problem.noise.block, spread),
        ),
        vector,
        own,
    )


def _scaled_noise(problem: Problem, live: Tensor, scale: Vector, purpose: str) -> float:
    """ν of D A D on the live rows: the error of its product with a unit vector."""
    like = problem.gradient
    unit = sphere(
        scale.numel(),
        generator=generator(problem.seed, problem.name, "noise", purpose),
        dtype=like.dtype,
        device=like.device,
    )
    probe = torch.zeros_like(like)
    mask = live.to(like.device)
    probe[mask] = scale.to(like) * unit
    return float((scale.to(like) * problem.noise.error(probe)[mask]).norm())


def _relative_rounding(problem: Problem, live: Tensor, scale: Vector) -> float:
    """The largest error of an entry by the change of coordinates, of unit-diagonal A."""
    if problem.rounding is None:
        return 0.0
    errors = problem.rounding[live][:, live].to(scale)
    return float((scale[:, None] * errors * scale).max())


def _with_zeros(
    active: ExactSpectrum, matrix: Tensor, doubt: float
) -> tuple[ExactSpectrum, Tensor]:
    """The spectrum with the zero rows' eigenvalues, ascending, and the order that sorts it."""
    missing = matrix.shape[0] - active.value.size
    value = np.concatenate([active.value, np.zeros(missing)])
    error = np.concatenate([active.error, np.full(missing, math.sqrt(2) * doubt)])
    order = np.argsort(value, kind="stable")
    full = ExactSpectrum(
        value=value[order],
        error=error[order],
        tolerance=active.tolerance,
        inertia=active.inertia,
        diagonal=matrix.diagonal().cpu().numpy(),
        frobenius=active.frobenius,
        noise=active.noise,
    )
    return full, torch.as_tensor(order, device=matrix.device)


def _rate_applies(spectrum: ExactSpectrum, problem: Problem) -> bool:
    """Positive semidefinite as far as is known, and near enough to a stationary point."""
    if spectrum.inertia.negative_high > 0 or spectrum.inertia.positive == 0:
        return False
    step = float(problem.gradient.norm()) / spectrum.norm
    return step <= SMALL_STEP * float(problem.position.norm())


def _notes(spectrum: ExactSpectrum) -> list[str]:
    inertia, notes = spectrum.inertia, []
    if inertia.ambiguous:
        notes.append("eigenvalues lie near the zero tolerance: counts and kappa depend on it")
    seen = int((spectrum.value > spectrum.tolerance).sum())
    if not inertia.ambiguous and seen != inertia.positive:
        notes.append(
            f"float64 resolves {seen} of {inertia.positive} positive eigenvalues without "
            "rescaling; kappa is a lower bound"
        )
    return notes


def _disagreement(seen: Inertia, known: Inertia | None) -> list[str]:
    """What the matrix's own count says against Sylvester's law: a matter of resolution only."""
    if known is None or seen.ambiguous or known.ambiguous:
        return []
    if (seen.positive, seen.negative) == (known.positive, known.negative):
        return []
    return [
        f"these coordinates resolve {seen.positive} positive and {seen.negative} negative "
        f"eigenvalues, raw {known.positive} and {known.negative}: a congruence changes no sign, so "
        "the smallest are not resolved here"
    ]


def _extremes(spectrum: ExactSpectrum, vector: Tensor, live: Tensor) -> dict[str, Array]:
    """The eigenvectors of the largest and of the smallest live eigenvalues, embedded."""
    size = vector.shape[1]
    chosen = sorted(
        {*range(min(STORED_VECTORS, size)), *range(max(size - STORED_VECTORS, 0), size)}
    )
    embedded = vector.new_zeros(len(chosen), live.numel())
    embedded[:, live.to(vector.device)] = vector[:, chosen].T
    # The live eigenvalues are the spectrum without as many zeros as there are dead rows.
    dead = live.numel() - size
    first_zero = int(np.searchsorted(spectrum.value, 0.0)) if dead else 0
    alive = np.delete(spectrum.value, slice(first_zero, first_zero + dead))
    return {"vector": embedded.cpu().numpy(), "vector_value": alive[chosen]}


def _rows(matrix: Tensor, problem: Problem, doubt: Vector, lost: Vector) -> dict[str, Array]:
    """Row norms and diagonal, weight decay included, with their rounding bounds.

    Zeroed columns take nothing from the diagonal of a row that is left.
    """
    norm, diagonal = matrix.norm(dim=1), matrix.diagonal()
    slack = doubt + 10 * problem.noise.rows.to(norm)
    if problem.rounding is not None:
        slack = slack + problem.rounding.to(norm).norm(dim=1)
    slack = slack + 4 * len(norm) ** 0.5 * problem.eps * norm
    return {
        name: tensor.cpu().numpy().copy()
        for name, tensor in {
            "norm": norm,
            "norm_low": (norm - slack).clamp_min(0.0),
            "norm_high": norm + slack + lost,
            "diagonal": diagonal,
            "diagonal_low": diagonal - slack,
            "diagonal_high": diagonal + slack,
        }.items()
    }
