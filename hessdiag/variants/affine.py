"""Normalised inputs of one layer as a change of its parameters: ``P = U D`` of every neuron."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """``w = z_w / s`` and ``b = z_b - mu·w`` in every neuron: its inputs become ``(h - mu) / s``.

    With the bias first, as in the theory, ``P = U D``, ``U = [[1, -muᵀ], [0, I]]`` and
    ``D = diag(1, 1/s)``, so that ``Pᵀ (1; h) = (1; (h - mu) / s)``. Here a vector holds the
    layer's weight in row-major order, then its bias, as torch does.

    Attributes:
        mean: mu, (sets, features). The outputs fall into ``sets`` equal, consecutive parts that
            share theirs: 1 for a whole Linear layer, the groups of a convolution, or one per
            neuron.
        scale: s, positive, (sets, features).
        outputs: Number of neurons, a multiple of ``sets``.
    Source:
        Equation 25 of Ye's paper (BNP); Lange, Helfrich, Ye, JMLR 23(72).
    """

    mean: Tensor
    scale: Tensor
    outputs: int

    @property
    def size(self) -> int:
        """The number of parameters, outputs · (features + 1)."""
        return self.outputs * (self.mean.shape[1] + 1)

    @property
    def diagonal(self) -> bool:
        """Whether every mean is zero."""
        return not bool(self.mean.any())

    def apply(self, z: Tensor, /) -> Tensor:
        """``P z``."""
        weight, bias = self._split(z)
        weight = weight / self.scale.to(z)[:, None]
        return _joined(weight, bias - self._along_mean(weight), z)

    def transposed(self, vector: Tensor, /) -> Tensor:
        """``Pᵀ v``."""
        weight, bias = self._split(vector)
        mean, scale = self.mean.to(vector)[:, None], self.scale.to(vector)[:, None]
        return _joined((weight - bias[..., None] * mean) / scale, bias, vector)

    def inverse(self, p: Tensor, /) -> Tensor:
        """``P⁻¹ p``."""
        weight, bias = self._split(p)
        return _joined(weight * self.scale.to(p)[:, None], bias + self._along_mean(weight), p)

    def least(self) -> float | None:
        """At least half of the smallest eigenvalue of PᵀP.

        The blocks of ``P⁻¹ = [[1, muᵀ], [0, diag(s)]]`` have norms 1, |mu|, 0 and max s, and the
        2-norm of a matrix is at most that of the matrix of its blocks' norms.
        """
        drift = self.mean.double().square().sum(dim=1)
        stretch = self.scale.double().amax(dim=1).square()
        total = 1 + drift + stretch
        largest = (total + (total.square() - 4 * stretch).clamp_min(0).sqrt()) / 2
        rounding = 4 * (self.mean.shape[1] + 8) * torch.finfo(torch.float64).eps
        return float(1 / largest.max()) * (1 - rounding)

    def magnitude(self) -> Affine:
        """|P|, for ``b = z_b - mu·z_w / s`` has nothing but that sign."""
        return Affine(-self.mean.abs(), self.scale.abs(), self.outputs)

    def _split(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (…, sets, neurons, features) and biases (…, sets, neurons)."""
        sets, features = self.mean.shape
        lead = vector.shape[:-1]
        weight, bias = vector.split([self.outputs * features, self.outputs], dim=-1)
        return weight.reshape(*lead, sets, -1, features), bias.reshape(*lead, sets, -1)

    def _along_mean(self, weight: Tensor) -> Tensor:
        return torch.einsum("...snf,sf->...sn", weight, self.mean.to(weight))


def _joined(weight: Tensor, bias: Tensor, like: Tensor) -> Tensor:
    lead = like.shape[:-1]
    return torch.cat([weight.reshape(*lead, -1), bias.reshape(*lead, -1)], dim=-1)
