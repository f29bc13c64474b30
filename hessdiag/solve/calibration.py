"""How long dense and long vectors take on this machine, from small ones of the same kind."""

from __future__ import annotations

import math
import time

import torch

from hessdiag.solve.exact import solve_exact
from hessdiag.solve.problem import Noise, Problem
from hessdiag_probes.random import generator

SIZES = (100, 600)
EXPONENT = 2.75  # a dense solve gains speed with its size up to a few thousand
DENSE_COPIES = 6.5
"""Matrices of its size that a dense solve holds at its peak besides the one that it is given."""
LONG = 1 << 20
PASSES = 8


class DenseTimes:
    """Seconds of :func:`solve_exact` by size, from two sizes that are timed on first use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known: dict[int, float] = {}
        self.per_number: float | None = None
        self.per_flop: float | None = None

    def seconds(self, size: int) -> float:
        """Of one dense solve, its noise apart."""
        low, high = (self._timed(known) for known in SIZES)
        if size <= SIZES[0]:
            return low
        if size >= SIZES[1]:
            return high * float((size / SIZES[1]) ** EXPONENT)
        slope = math.log(high / low) / math.log(SIZES[1] / SIZES[0])
        return low * float((size / SIZES[0]) ** slope)

    def pass_seconds(self, size: int) -> float:
        """Of reading one vector of this size as the orthogonalisation does."""
        if self.per_number is None:
            basis = torch.zeros(PASSES, LONG, dtype=torch.float64, device=self.device)
            vector = torch.zeros(LONG, dtype=torch.float64, device=self.device)
            basis @ vector
            started = self._now()
            basis @ vector
            self.per_number = (self._now() - started) / (PASSES * LONG)
        return self.per_number * size

    def multiply_seconds(self, flops: float) -> float:
        """Of so many additions and multiplications in products of large matrices."""
        if self.per_flop is None:
            size = SIZES[1]
            matrix = torch.zeros(size, size, dtype=torch.float64, device=self.device)
            matrix @ matrix
            started = self._now()
            matrix @ matrix
            self.per_flop = (self._now() - started) / (2 * size**3)
        return self.per_flop * flops

    def _timed(self, size: int) -> float:
        if size not in self.known:
            matrix = torch.randn(
                size, size, generator=generator(0, "calibration"), dtype=torch.float64
            ).to(self.device)
            problem = _problem(size, self.device)
            if not self.known:
                solve_exact(matrix + matrix.T, problem)  # warms up
            started = self._now()
            solve_exact(matrix + matrix.T, problem)
            self.known[size] = self._now() - started
        return self.known[size]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _problem(size: int, device: torch.device) -> Problem:
    """One without noise, of a random gradient."""
    ones = torch.ones(size, dtype=torch.float64, device=device)
    return Problem(
        name="calibration",
        gradient=ones,
        position=ones,
        loss=1.0,
        attainable=1.0,
        noise=Noise(torch.zeros_like, 0.0, torch.zeros_like(ones), ones, 0.0),
        eps=torch.finfo(torch.float64).eps,
        shift=0.0,
        damping=None,
        seed=0,
    )
