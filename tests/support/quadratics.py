"""Quadratic tasks ``½ pᵀA p`` whose Hessian is known, and what the contract says of its spectrum.

The oracle works in 50 digits from the very floats that the task holds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import mpmath as mp
import torch
from torch import Tensor, nn

from hessdiag import Task, analyze
from hessdiag.quantity import Quantity
from hessdiag.run import QUANTILES, THRESHOLDS, Run, VariantResult
from hessdiag.solve import (
    Budget,
    Noise,
    Problem,
    Solved,
    solve_exact,
    solve_matrix_free,
)

mp.mp.dps = 50

KINDS = (
    *("spread", "clustered", "repeated", "indefinite", "negative definite", "singular"),
    *("rank one", "integer singular", "graded singular", "graded definite", "graded indefinite"),
    *("diagonal", "saddle", "near the tolerance"),
)


class Quadratic(nn.Module):
    """Holds ``p`` as its parameter and ``A`` as a buffer."""

    def __init__(self, matrix: Tensor, position: Tensor) -> None:
        super().__init__()
        self.p = nn.Parameter(position.clone())
        self.register_buffer("matrix", matrix.clone())

    def forward(self) -> Tensor:
        return 0.5 * self.p @ (self.matrix @ self.p)


def quadratic_task(matrix: Tensor, position: Tensor | None = None, *, scale: float = 1.0) -> Task:
    """``scale · ½ pᵀA p`` as a task of one batch."""
    at = default_position(len(matrix)) if position is None else position
    data = [torch.zeros(1, 1, dtype=torch.float64)]
    return Task(Quadratic(matrix, at), data, lambda model, _batch: scale * model())


def analyse(
    matrix: Tensor, position: Tensor | None = None, *, scale: float = 1.0, **options: object
) -> VariantResult:
    """The row of the quadratic's only block."""
    run: Run = analyze(quadratic_task(matrix, position, scale=scale), blocks="whole", **options)
    result = run["whole"].variants["raw"]
    assert result["skipped"] is None, result["skipped"]
    return result


def default_position(n: int) -> Tensor:
    seeded = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=seeded, dtype=torch.float64)


def noiseless(
    matrix: Tensor,
    position: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    block: float = 0.0,
    weight_decay: float = 0.0,
    semidefinite: bool = False,
    **changes: Any,
) -> Problem:
    """A block whose products err by nothing, or by ``rows``; ``seen`` as it is measured."""
    n = len(matrix)
    at = default_position(n) if position is None else position
    seen = torch.stack([matrix @ torch.linspace(0.5, 1.5, n).double() ** k for k in (0, 1)])
    nothing = torch.zeros(n, dtype=torch.float64)
    noise = Noise(
        torch.zeros_like, block, nothing if rows is None else rows, seen.abs().amax(0), 0.0
    )
    problem = Problem(
        name="whole",
        gradient=matrix @ at + weight_decay * at,
        position=at,
        loss=0.5 * float(at @ matrix @ at),
        attainable=0.5 * float(at @ matrix @ at + weight_decay * at @ at),
        noise=noise,
        eps=torch.finfo(torch.float64).eps,
        shift=weight_decay,
        damping=None,
        seed=0,
        floor=weight_decay if semidefinite else None,
    )
    return replace(problem, **changes)


def solve(matrix: Tensor, position: Tensor | None = None, **changes: Any) -> Solved:
    """The exact row of a matrix whose products are free of noise."""
    return solve_exact(matrix, noiseless(matrix, position, **changes))


def solve_by_products(
    matrix: Tensor, budget: Budget | None = None, **changes: Any
) -> tuple[Solved, int]:
    """The row of a matrix of which only noiseless products are known, and their number."""
    return solve_matrix_free(lambda v: matrix @ v, noiseless(matrix, **changes), budget or Budget())


def turned(spectrum: Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with these eigenvalues, to rounding."""
    seeded = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    turn, _ = torch.linalg.qr(torch.randn(n, n, generator=seeded, dtype=torch.float64))
    matrix = (turn * spectrum.double()) @ turn.T
    return (matrix + matrix.T) / 2


def graded(spectrum: Tensor, decades: float, seed: int = 0) -> Tensor:
    """``D J D`` with ``J`` of this spectrum and ``D`` over so many decades."""
    scale = torch.logspace(-decades, 0, len(spectrum), dtype=torch.float64)
    matrix = scale[:, None] * turned(spectrum, seed) * scale
    return (matrix + matrix.T) / 2


def random_matrix(kind: str, seed: int) -> tuple[Tensor, int | None]:
    """A matrix of this kind, n ≤ 6, and how many of its eigenvalues are zero to rounding.

    None: its zero eigenvalues are exactly zero in the given floats.
    """
    rng = random.Random(f"{kind} {seed}")
    seeded = torch.Generator().manual_seed(rng.randrange(2**31))
    n = rng.choice([1, 2, 3, 4, 5, 6])
    normal = torch.randn(n, generator=seeded, dtype=torch.float64)
    match kind:
        case "spread":
            spectrum = torch.logspace(-rng.uniform(0, 8), 0, n, dtype=torch.float64)
            return turned(spectrum, seed) * 10.0 ** rng.uniform(-40, 40), 0
        case "clustered":
            return turned(1 + 1e-7 * torch.arange(n).double(), seed), 0
        case "repeated":
            return turned(torch.tensor([1.0, 5.0]).repeat(n)[:n], seed), 0
        case "indefinite":
            return turned(normal, seed), 0
        case "negative definite":
            return -turned(torch.logspace(-rng.uniform(0, 6), 0, n, dtype=torch.float64), seed), 0
        case "singular":
            zeros = rng.randrange(n)
            normal[:zeros] = 0
            return turned(normal, seed), zeros
        case "rank one":
            return torch.outer(normal, normal) * rng.choice([1, -1]), n - 1
        case "integer singular" | "graded singular":
            rank = rng.randrange(1, n + 1)
            factor = torch.randint(-3, 4, (n, rank), generator=seeded).double()
            factor[0, 0] = 1.0
            signs = 2.0 * torch.randint(0, 2, (rank,), generator=seeded).double() - 1
            matrix = (factor * signs) @ factor.T
            if kind == "graded singular":
                exponent = torch.randint(-20, 1, (n,), generator=seeded)
                scale = torch.ldexp(torch.ones(n, dtype=torch.float64), exponent)
                matrix = scale[:, None] * matrix * scale
            return (matrix if bool(matrix.any()) else torch.eye(n).double()), None
        case "graded definite":
            inner = torch.logspace(-rng.uniform(0, 2), 0, n, dtype=torch.float64)
            return graded(inner, rng.uniform(1, 10), seed), 0
        case "graded indefinite":
            return graded(normal, rng.uniform(1, 6), seed), 0
        case "diagonal":
            powers = -20 * torch.rand(n, generator=seeded, dtype=torch.float64)
            return torch.diag(10.0**powers), 0
        case "saddle":
            half = max(n // 2, 1)
            matrix = torch.zeros(n, n, dtype=torch.float64)
            matrix[0, 0] = 1.0
            coupling = torch.randint(-3, 4, (half, n - half), generator=seeded).double()
            matrix[:half, half:] = coupling
            matrix[half:, :half] = coupling.T
            return matrix, None
        case _:
            signs = 2.0 * torch.randint(0, 2, (n,), generator=seeded).double() - 1
            sizes = 0.5 + torch.rand(n, generator=seeded, dtype=torch.float64)
            sizes[: n // 2] = 10.0 ** -rng.uniform(9, 14.2)
            return turned(signs * sizes, seed), 0


def eigenvalues(matrix: Tensor, zeros: int | None = 0) -> list[mp.mpf]:
    """Ascending, in 50 digits; the ``zeros`` smallest, or all that are exactly zero, set to 0."""
    found = sorted(mp.eigsy(mp.matrix(matrix.tolist()), eigvals_only=True))
    norm = max(abs(x) for x in found)
    if zeros is None:
        return [mp.mpf(0) if abs(x) < norm * mp.mpf(10) ** -35 else x for x in found]
    smallest = set(sorted(range(len(found)), key=lambda i: abs(found[i]))[:zeros])
    return [mp.mpf(0) if i in smallest else x for i, x in enumerate(found)]


def expected(spectrum: list[mp.mpf]) -> dict[tuple[str, ...], mp.mpf]:
    """What the contract's fields are worth for these eigenvalues; what does not exist is left out.

    Keys are (field,) or (field, key of its axis).
    """
    n, top, norm = len(spectrum), spectrum[-1], max(abs(x) for x in spectrum)
    positive = [x for x in spectrum if x > 0]
    negative = [x for x in spectrum if x < 0]
    nonzero = [abs(x) for x in spectrum if x != 0]
    mass, square = sum(abs(x) for x in spectrum), sum(x * x for x in spectrum)
    found: dict[tuple[str, ...], mp.mpf] = {
        ("lambda_max",): top,
        ("lambda_min",): spectrum[0],
        ("kappa_abs",): max(nonzero) / min(nonzero),
        ("n_positive",): mp.mpf(len(positive)),
        ("n_negative",): mp.mpf(len(negative)),
        ("n_zero",): mp.mpf(n - len(nonzero)),
        ("trace",): mp.fsum(spectrum),
        ("frobenius",): mp.sqrt(square),
        ("stable_rank",): square / norm**2,
        ("negative_count",): mp.mpf(len(negative)) / n,
        ("negative_mass",): -mp.fsum(negative) / mass,
        ("negative_depth",): max(-spectrum[0], mp.mpf(0)) / norm,
    }
    if positive:
        kappa = top / positive[0]
        found[("lambda_min_positive",)] = positive[0]
        found[("kappa",)] = kappa
        found[("gd_rate",)] = (kappa - 1) / (kappa + 1)
        decade = mp.log(10) / (2 * mp.atanh(1 / kappa)) if kappa > 1 else mp.mpf(0)
        found[("gd_iterations_per_decade",)] = decade
        for q in QUANTILES:
            k = math.ceil(Fraction(q) * len(positive))
            found["kappa_quantile", q] = top / positive[-k]
    for name in THRESHOLDS:
        beyond = [x for x in spectrum if x > mp.mpf(name) * norm]
        found["profile_n_positive", name] = mp.mpf(len(beyond))
        found["profile_n_negative", name] = mp.mpf(sum(x < -mp.mpf(name) * norm for x in spectrum))
        if beyond:
            found["profile_kappa", name] = top / beyond[0]
    return found


def pick(values: object, key: tuple[str, ...]) -> Quantity:
    """The Quantity of a key of :func:`expected`."""
    found = values[key[0]]  # type: ignore[index]
    quantity: Quantity = found if len(key) == 1 else found[key[1]]
    return quantity


def contains(quantity: Quantity, truth: mp.mpf) -> bool:
    """Whether the truth, or the float nearest to it, lies in what the status certifies."""
    low, high = quantity.low, quantity.high
    above = low is None or mp.mpf(low) <= truth or low <= float(truth)
    below = high is None or mp.mpf(high) >= truth or high >= float(truth)
    return above and below


def complaints(values: Mapping[str, object]) -> list[str]:
    """Numbers that are no numbers, and values outside their own interval."""
    found = []
    for name, value in values.items():
        group = value if isinstance(value, dict) else {"": value}
        for key, quantity in group.items():
            if not isinstance(quantity, Quantity):
                continue
            parts = [p for p in (quantity.value, quantity.low, quantity.high) if p is not None]
            if not all(math.isfinite(part) for part in parts):
                found.append(f"{name} {key} is not finite: {quantity}")
            low = -math.inf if quantity.low is None else quantity.low
            high = math.inf if quantity.high is None else quantity.high
            if quantity.value is not None and not low <= quantity.value <= high:
                found.append(f"{name} {key} lies outside itself: {quantity}")
    return found


def broken_promises(values: object, spectrum: list[mp.mpf]) -> list[str]:
    """Every Quantity that the true spectrum contradicts, one line each."""
    found = []
    for key, truth in expected(spectrum).items():
        quantity = pick(values, key)
        if quantity.status is None:
            found.append(f"{key} is absent, the truth is {mp.nstr(truth, 17)}")
        elif quantity.status != "unresolved" and not contains(quantity, truth):
            found.append(f"{key} is {mp.nstr(truth, 17)}, outside {quantity}")
    return found
