"""Preconditioners made from the Hessian itself (maths 3.2, 3.3 and 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessdiag.conditioning.spectrum import zero_tolerance
from hessdiag.names import layer_of
from hessdiag.variants.coordinates import Coordinates, Dense, Diagonal, Joined
from hessdiag.variants.scene import Built, NotApplicable, Scene
from hessdiag_probes.exact import EPS, eigh, eigvalsh
from hessdiag_probes.optimal_diagonal import optimal_diagonal
from hessdiag_probes.random import generator
from hessdiag_probes.scaling import (
    TOLERANCE,
    RowScaling,
    row_scaling,
    sampled_row_scaling,
    unit_diagonal,
    unit_spectrum,
)
from hessdiag_probes.tails import student

SOURCE = "hessian"
DIAGONAL_FLOOR = 100.0  # times ε: below it a diagonal entry is rounding of its row (maths 3.3)
CONFIDENCE = 0.95  # of the intervals of the estimated diagonal
STANDARD_ERRORS = 3.0  # by which an estimated diagonal entry must exceed zero (maths 1.6)
OPTIMAL_LIMIT = 500
CHECK_LIMIT = 2048  # rows, of the singular values that only a note takes
PROBES, SWEEPS = 10, 8
SLAB = 1024


def jacobi(scene: Scene) -> Built:
    """``M = 1/|h_ii|``, by the row's norm where the diagonal entry cannot be told from zero.

    Of an assembled block an entry counts where ``sqrt|h_ii h_jj| > 100 ε |h_ij|`` for all j, which
    no scaling of the parameters changes; nor does it change ``PᵀHP`` there. Of an estimated
    diagonal it counts beyond three standard errors.

    Raises:
        NotApplicable: Neither matrix nor probes are there.
    Source:
        maths 3.3.
    """
    if scene.matrix is not None:
        norms = scene.matrix.norm(dim=1)
        diagonal = scene.matrix.diagonal().abs()
        trusted = _above_rounding(scene.matrix, DIAGONAL_FLOOR * _eps(scene))
        doubt = "diagonal is zero to rounding"
    else:
        norms = _row(scene, "norm")
        diagonal = _row(scene, "diagonal").abs()
        width = (_row(scene, "diagonal_high") - _row(scene, "diagonal_low")) / 2
        error = width / student(max(scene.options.probes, 2), CONFIDENCE)
        trusted = diagonal > STANDARD_ERRORS * error
        doubt = "estimated diagonal is within three standard errors of zero"
    live = _live(scene, norms)
    size = torch.where(trusted, diagonal, norms)
    missing = int((live & ~trusted).sum())
    notes = () if missing == 0 else (f"{missing} of {_count(live)} take their norm: their {doubt}",)
    return _diagonal(scene, size.rsqrt(), live, notes)


def rownorm(scene: Scene) -> Built:
    """``M = 1/‖h_i‖``; of an assembled block with van der Sluis's bounds in the notes.

    Raises:
        NotApplicable: Neither matrix nor probes are there.
    Source:
        maths 5.1 and 5.2: the bound is on singular values of MH, scaled from one side only.
    """
    if scene.matrix is None:
        norms = _row(scene, "norm")
        live = _live(scene, norms)
        return _diagonal(scene, norms.rsqrt(), live, ("from estimated row norms",))
    norms = scene.matrix.norm(dim=1)
    live = _live(scene, norms)
    notes = _van_der_sluis(scene.matrix[live][:, live]) if bool(live.any()) else ()
    return _diagonal(scene, norms.rsqrt(), live, notes)


def ruiz(scene: Scene) -> Built:
    """P such that all rows of ``PᵀHP`` have 2-norm 1, or about that above the exact limit.

    Cost:
        Without a matrix, 80 products.
    Source:
        maths 5.4; Ruiz (2001).
    """
    if scene.matrix is not None:
        found = row_scaling(scene.matrix)
        norms = scene.matrix.norm(dim=1)
        notes = _unequal(found) if found.residual > TOLERANCE else ()
        return _diagonal(scene, found.scale, _live(scene, norms), notes)
    found = sampled_row_scaling(
        scene.product,
        torch.zeros_like(scene.dead, dtype=_dtype(scene)),
        generator=generator(scene.options.seed, scene.block.name, "ruiz"),
        probes=PROBES,
        sweeps=SWEEPS,
    )
    note = (
        f"estimated from {found.matvecs} products; in the last sweep the norms of the rows lay "
        f"within {found.residual:.2g} of 1, errors of the estimate included"
    )
    return _diagonal(scene, found.scale, _live(scene, found.scale), (note,))


def block_inverse(scene: Scene) -> Built:
    """``M = |H_bb|⁻¹`` of each layer b in the block: the limit of any layerwise method.

    Eigenvalues of ``H_bb`` within its τ of zero keep the scale ``‖H_bb‖^-½``, so that P is
    invertible and what is null stays null; the others become ±1.

    Raises:
        NotApplicable: The block is not assembled.
    Source:
        maths 3.2.
    """
    if scene.matrix is None:
        raise NotApplicable(
            f"takes the assembled matrix, and {scene.block.size} parameters are above the exact "
            "limit; raise --exact-limit, or take smaller blocks"
        )
    matrix = scene.matrix
    live = _live(scene, matrix.norm(dim=1))
    layers: dict[str, list[Tensor]] = {}
    for name, places in scene.places().items():
        layers.setdefault(layer_of(name), []).append(places.to(matrix.device))
    parts: list[tuple[Tensor, Coordinates]] = []
    kept = 0
    for pieces in layers.values():
        places = torch.cat(pieces)
        for chosen, is_live in ((places[live[places]], True), (places[~live[places]], False)):
            if len(chosen) == 0:
                continue
            if not is_live:
                parts.append((chosen, Diagonal(matrix.new_ones(len(chosen)))))
                continue
            part, null = _inverse_root(matrix[chosen][:, chosen], _eps(scene))
            parts.append((chosen, part))
            kept += null
    notes = []
    if len(layers) > 1:
        notes.append(f"block-diagonal over {len(layers)} layers: couplings between them remain")
    if kept:
        notes.append(
            f"{kept} {'eigenvalue' if kept == 1 else 'eigenvalues'} within tolerance of zero kept "
            "a common scale"
        )
    return Built(Joined(parts), source=SOURCE, notes=tuple(notes))


def optimal(scene: Scene) -> Built:
    """The diagonal P of least κ, to a gap that a dual bound certifies.

    Raises:
        NotApplicable: The block is too large, or its nonzero rows are not positive definite.
    Cost:
        Up to some 300 dense eigenproblems, n at most 500.
    Source:
        maths 5.3.
    """
    matrix = scene.matrix
    if matrix is None:
        raise NotApplicable(
            f"{scene.block.size} parameters are above the exact limit; raise --exact-limit (to at "
            f"most {OPTIMAL_LIMIT} nonzero rows), or take ruiz, the heuristic"
        )
    live = _live(scene, matrix.norm(dim=1))
    if not bool(live.any()):
        raise NotApplicable("the block's matrix is zero: no diagonal changes it")
    active = matrix[live][:, live]
    n = len(active)
    if n > OPTIMAL_LIMIT:
        raise NotApplicable(
            f"takes at most {OPTIMAL_LIMIT} nonzero rows, and there are {n}; ruiz is the "
            "heuristic for larger blocks"
        )
    entry_error = 4 * _eps(scene) if scene.entry_error is None else scene.entry_error()
    if math.isinf(entry_error):  # a diagonal entry is not positive
        raise NotApplicable(_why_not_definite(active, 4 * _eps(scene)))
    found = optimal_diagonal(active, [row_scaling(active).scale], entry_error=entry_error)
    if found is None:
        raise NotApplicable(_why_not_definite(active, entry_error))
    scale = torch.ones_like(matrix.diagonal())
    scale[live] = found.scale.to(scale)
    note = (
        f"kappa at most {found.kappa:.6g}, and no diagonal has less than {found.bound:.6g} "
        f"(gap {found.gap:.4g})"
    )
    built = _diagonal(scene, scale, live, (note,))
    return Built(built.coordinates, source=SOURCE, notes=built.notes, diagonal_bound=found.bound)


def _eps(scene: Scene) -> float:
    return torch.finfo(_dtype(scene)).eps


def _dtype(scene: Scene) -> torch.dtype:
    return scene.parameters[0].dtype


def _count(live: Tensor) -> str:
    count = int(live.sum())
    return "1 row" if count == 1 else f"{count} rows"


def _row(scene: Scene, name: str) -> Tensor:
    """One of the estimated arrays of the block's rows, on its device."""
    if name not in scene.rows:
        raise NotApplicable(
            "takes the row norms, which --probes 0 leaves out above the exact limit; allow 2 or "
            "more probes"
        )
    return torch.as_tensor(scene.rows[name], dtype=torch.float64, device=scene.dead.device)


def _live(scene: Scene, norms: Tensor) -> Tensor:
    """The rows to scale; a dead row is one only by coupled weight decay."""
    live = norms > 0
    if scene.options.weight_decay == 0:
        live &= ~scene.dead.to(live.device)
    return live


def _diagonal(scene: Scene, scale: Tensor, live: Tensor, notes: tuple[str, ...]) -> Built:
    scale = torch.where(live.to(scale.device), scale, torch.ones_like(scale))
    dtype = torch.float64 if scene.matrix is not None else _dtype(scene)
    return Built(Diagonal(scale.to(dtype)), source=SOURCE, notes=notes)


def _above_rounding(matrix: Tensor, floor: float) -> Tensor:
    """Which rows have ``sqrt|h_ii h_jj| > floor |h_ij|`` for every nonzero ``h_ij``, (n,)."""
    root = matrix.diagonal().abs().sqrt()
    found = torch.ones_like(root, dtype=torch.bool)
    for i in range(0, len(root), SLAB):
        rows = matrix[i : i + SLAB].abs()
        small = root[i : i + SLAB, None] * root <= floor * rows
        found[i : i + SLAB] = ~(small & (rows > 0)).any(dim=1)
    return found


def _unequal(found: RowScaling) -> tuple[str, ...]:
    return (
        f"norms of the rows of PᵀHP lie within {found.residual:.2g} of 1 after {found.sweeps} "
        "sweeps, which fell no further: there may be no scaling that makes them equal",
    )


def _van_der_sluis(active: Tensor) -> tuple[str, ...]:
    """What scaling the rows to equal norms is known to reach (maths 5.1), and what it reached."""
    n = len(active)
    if n > CHECK_LIMIT:
        return (f"van der Sluis: not checked above {CHECK_LIMIT} rows",)
    before = eigvalsh(active).abs()
    after = torch.linalg.svdvals(active / active.norm(dim=1, keepdim=True))
    found = [
        value[value > zero_tolerance(float(value.max()), n, EPS, 0.0)] for value in (before, after)
    ]
    if len(found[0]) != len(found[1]):
        notes = [
            f"van der Sluis: not checked, for {len(found[0])} singular values of H and "
            f"{len(found[1])} of MH are above rounding"
        ]
    else:
        raw, scaled = (float(value.max() / value.min()) for value in found)
        relation = "<=" if scaled <= math.sqrt(n) * raw * (1 + 1e-6) else "exceeds (rounding)"
        notes = [
            f"van der Sluis: kappa_2(MH) = {scaled:.3g} {relation} sqrt({n}) kappa_2(H) = "
            f"{math.sqrt(n) * raw:.3g}; one-sided: it bounds singular values of MH, not kappa"
        ]
    ends = unit_spectrum(active)
    if ends is not None:
        notes.append(
            f"van der Sluis, two-sided: kappa with unit diagonal is "
            f"{ends.largest / ends.smallest:.3g}, at most {n} times that of the best diagonal"
        )
    return tuple(notes)


def _inverse_root(matrix: Tensor, eps: float) -> tuple[Dense, int]:
    """``P`` with ``PPᵀ = |A|⁻¹`` of a matrix without zero rows, and how many eigenvalues are null.

    A positive definite matrix of any range goes by way of its unit diagonal, for ``eigh`` has no
    digit of its small eigenvalues; another root of the same M.
    """
    if unit_spectrum(matrix, 4 * eps) is not None:
        root = matrix.diagonal().sqrt()
        found = eigh(unit_diagonal(matrix))
        value, vector = found.value.to(matrix).sqrt(), found.vector.to(matrix)
        return Dense(vector / value / root[:, None], (vector * value).T * root), 0
    found = eigh(matrix)
    size, vector = found.value.to(matrix).abs(), found.vector.to(matrix)
    norm = size.max()
    null = size <= zero_tolerance(float(norm), len(size), eps, 0.0)
    scale = torch.where(null, norm, size).rsqrt()
    return Dense((vector * scale) @ vector.T, (vector / scale) @ vector.T), int(null.sum())


def _why_not_definite(active: Tensor, entry_error: float) -> str:
    value = eigvalsh(unit_diagonal(active))
    n = len(value)
    error = zero_tolerance(float(value.abs().max()), n, EPS, 0.0) + n * entry_error
    if float(value[0]) < -error or not bool((active.diagonal() > 0).all()):
        return "indefinite: there is no theory of the best diagonal; ruiz is the heuristic"
    return (
        "not certainly positive definite, so that no diagonal is known to be best; ruiz is the "
        "heuristic"
    )
