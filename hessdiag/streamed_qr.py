"""R of a tall matrix that comes row by row."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

SLAB = 4096
"""Rows that wait for the next factorisation, or as many as there are columns."""


@dataclass
class StreamedQR:
    """R of a tall matrix that comes row by row: ``A = Q R``, Q never formed.

    Householder's QR keeps each column to a relative error of its own, whatever the others.
    What waits is held in storage of its own: the rows that were given are free after ``add``.

    Attributes:
        columns: Of the matrix.
    """

    columns: int
    _factor: Tensor | None = None
    _waiting: list[Tensor] = field(default_factory=list)
    _rows: int = 0

    def add(self, rows: Tensor) -> None:
        """More rows, (any, columns), float64."""
        most = max(SLAB, self.columns)
        while len(rows):
            part, rows = rows[: most - self._rows], rows[most - self._rows :]
            # A view would hold all of what it was cut from until the next batch.
            self._waiting.append(part.clone())
            self._rows += len(part)
            if self._rows == most:
                self._fold()

    def result(self) -> Tensor:
        """R, upper trapezoidal, (min(rows, columns), columns)."""
        self._fold()
        if self._factor is None:
            return torch.zeros(0, self.columns, dtype=torch.float64)
        return self._factor

    def _fold(self) -> None:
        if self._waiting:
            held = [] if self._factor is None else [self._factor]
            tall = torch.cat([*held, *self._waiting])
            self._waiting, self._rows = [], 0
            self._factor = torch.linalg.qr(tall, mode="r").R
