"""How often the certificates of blocks above the exact limit hold, over many draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

import quadratics
from hessdiag.quantity import Quantity
from hessdiag.run import HORIZONS
from hessdiag.solve import Budget

SIZE = 150


def _spectra() -> dict[str, Tensor]:
    def line(low: float, high: float, count: int) -> Tensor:
        return torch.linspace(low, high, count, dtype=torch.float64)

    third = SIZE // 3
    return {
        "spread": line(1, SIZE, SIZE),
        "clustered": torch.cat([c + 1e-3 * line(0, 1, third) for c in (1.0, 2.0, 10.0)]),
        "outlier": torch.cat([10 ** line(-3, 0, SIZE - 3), line(50, 100, 3)]),
        "repeated outlier": torch.cat([10 ** line(-3, 0, SIZE - 3), torch.full((3,), 50.0)]),
        "indefinite": line(-30, 70, SIZE),
        "low rank": torch.cat([torch.zeros(SIZE - 10), line(-2, 5, 10)]).double(),
        "singular": torch.cat([torch.zeros(third), 10 ** line(-4, 1, SIZE - third)]).double(),
    }


SPECTRA = _spectra()


@dataclass(frozen=True)
class Record:
    """How often an interval was claimed, and missed; for rows, both are means over the rows."""

    kind: str
    confidence: float
    claims: int
    misses: float
    spread: float

    @property
    def excess(self) -> float:
        """Misses beyond what the confidence allows, in standard errors."""
        allowed = (1 - self.confidence) * self.claims
        error = max(self.spread * self.claims**0.5, (allowed * self.confidence) ** 0.5)
        return (self.misses - allowed) / max(error, 1e-9)


@cache
def _truth(name: str) -> tuple[Tensor, dict[str, float], dict[str, np.ndarray]]:
    """The matrix, its scalars and its rows, from the eigenvalues that it was made of."""
    spectrum = SPECTRA[name]
    matrix = quadratics.turned(spectrum)
    norm, square = float(spectrum.abs().max()), float(spectrum.square().sum())
    scalars = {
        "lambda_max": float(spectrum.max()),
        "lambda_min": float(spectrum.min()),
        "trace": float(spectrum.sum()),
        "frobenius": square**0.5,
        "stable_rank": square / norm**2,
        "negative_depth": max(-float(spectrum.min()), 0.0) / norm,
        "kappa": norm / float(spectrum[spectrum > 1e-12].min()),
        "kappa_abs": norm / float(spectrum.abs()[spectrum.abs() > 1e-12].min()),
        "kappa_damped": (norm + 0.1) / (float(spectrum.abs().min()) + 0.1),
    }
    rows = {"norm": matrix.norm(dim=1).numpy(), "diagonal": matrix.diagonal().numpy()}
    return matrix, scalars, rows


def measure(name: str, draws: int, *, power: bool = False) -> list[Record]:
    """Solve the matrix of this spectrum ``draws`` times from products, and count what misses."""
    matrix, scalars, rows = _truth(name)
    misses: defaultdict[str, list[float]] = defaultdict(list)
    sure: dict[str, float] = {}
    for seed in range(draws):
        solved, _ = quadratics.solve_by_products(
            matrix, Budget(power=power), seed=seed, damping=0.1, loss=0.0
        )
        for field, truth in scalars.items():
            quantity = solved.values[field]
            if isinstance(quantity, Quantity) and quantity.value is not None:
                sure[field] = quantity.confidence or 0.0
                misses[field].append(_missed(quantity, truth))
        for horizon, wrong, confidence in _forecast(matrix, solved.values):
            sure[f"forecast_total {horizon}"] = confidence
            misses[f"forecast_total {horizon}"].append(wrong)
        for field, right in rows.items():
            low, high = (solved.rows[f"{field}_{end}"] for end in ("low", "high"))
            sure[f"row {field}"] = 0.95
            misses[f"row {field}"].append(float(((right < low) | (right > high)).mean()))
    return [
        Record(field, sure[field], len(found), sum(found), float(np.std(found)))
        for field, found in misses.items()
    ]


def _missed(quantity: Quantity, truth: float) -> float:
    slack = 1e-11 * abs(truth) + 1e-13  # of the oracle
    low = quantity.low is None or quantity.low <= truth + slack
    high = quantity.high is None or quantity.high >= truth - slack
    return 0.0 if low and high else 1.0


def _forecast(matrix: Tensor, values: dict[str, object]) -> Iterator[tuple[str, float, float]]:
    """Against gradient descent itself, with the step that the row's own ends give."""
    gradient = matrix @ quadratics.default_position(len(matrix))
    ends = values["lambda_max"], values["lambda_min"]
    step = 1 / max(ends[0].high, -ends[1].low)  # type: ignore[attr-defined]
    value, vector = _eigh(matrix)
    share = (vector.T @ gradient).square()
    for horizon in HORIZONS:
        quantity = values["forecast_total"][horizon]  # type: ignore[index]
        if quantity.value is None:
            continue
        decay = 1 - (1 - step * value) ** (2 * int(horizon))
        safe = torch.where(value.abs() < 1e-12, torch.ones_like(value), value)
        flat = torch.full_like(value, step * int(horizon))
        gain = torch.where(value.abs() < 1e-12, flat, decay / (2 * safe))
        yield horizon, _missed(quantity, float((share * gain).sum())), quantity.confidence


_decompositions: dict[int, tuple[Tensor, Tensor]] = {}


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if id(matrix) not in _decompositions:
        _decompositions[id(matrix)] = tuple(torch.linalg.eigh(matrix))  # type: ignore[assignment]
    return _decompositions[id(matrix)]
