"""Random probes: one seed is one vector, on every device and in every dtype.

All are drawn on the CPU in float64, then cast and moved.
"""

from __future__ import annotations

import hashlib
import json

import torch

from hessdiag_probes.types import Vector, norm


def generator(seed: int, *labels: str) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``labels`` only.

    Label by what the numbers are for (a block's name, a purpose): then neither the order of the
    work nor what else was drawn changes a result.
    """
    digest = hashlib.sha256(json.dumps([seed, *labels]).encode()).digest()
    result = torch.Generator(device="cpu")
    result.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return result


def gaussian(
    n: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Vector:
    """``n`` independent standard normal numbers, shape ``(n,)``."""
    return torch.randn(n, generator=generator, dtype=torch.float64).to(device, dtype)


def rademacher(
    n: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Vector:
    """``n`` independent signs ±1, shape ``(n,)``."""
    bits = torch.randint(0, 2, (n,), generator=generator)
    return (2 * bits - 1).to(device, dtype)


def sphere(
    n: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Vector:
    """A vector uniform on the unit sphere, shape ``(n,)``: what the Lanczos certificates assume."""
    drawn = gaussian(n, generator=generator)
    return (drawn / norm(drawn)).to(device, dtype)
