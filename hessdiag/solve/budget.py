"""What a block that is not assembled may cost, in products and in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

FORECAST_STEPS = 20
DENSITY_PROBES, DENSITY_STEPS = 10, 60
POWER_VECTORS = 10  # what power iteration and the probes hold
LEAST_STEPS = 5  # a shallower Krylov space says nothing


@dataclass(frozen=True)
class Budget:
    """How much a block that is not assembled may cost; defaults as in the contract.

    Attributes:
        steps: Most products for the ends of the spectrum.
        probes: Random probes; 0 for none.
        forecast: Depth of the Krylov space of the gradient; 0 for no forecast.
        density: Depth of those of the density's ten probes; 0 for no density.
        tolerance: Wanted width of the ends' intervals, relative to ‖H‖.
        power: Find the ends by power iteration, which keeps no Krylov basis.
        deadline: Of ``time.monotonic()``; None for no limit.
        reasons: What memory does not allow, in words for the row's notes.
    """

    steps: int = 40
    probes: int = 20
    forecast: int = FORECAST_STEPS
    density: int = 0
    tolerance: float = 1e-3
    power: bool = False
    deadline: float | None = None
    reasons: tuple[str, ...] = ()

    def over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def products(self, size: int) -> int:
        """At most."""
        ends = self.steps if self.power else min(self.steps, size)
        density = DENSITY_PROBES * min(self.density, size)
        return ends + min(self.forecast, size) + self.probes + density


def fitted(wanted: Budget, size: int, *, number: int, free: int) -> Budget:
    """``wanted`` as far as ``free`` bytes allow.

    Lanczos holds its basis while a second one, of the forecast or of the density, is built.

    Args:
        wanted: What would be done with memory enough.
        size: Of the block.
        number: Bytes per number.
        free: Bytes that bases may take.
    """
    vectors = free // max(size * number, 1)
    steps = min(wanted.steps, size)
    others = max(min(wanted.forecast, size), min(wanted.density, size))
    if not wanted.power and vectors >= steps + others:
        return wanted
    basis, held = (0, POWER_VECTORS) if wanted.power else (steps, steps)
    reasons = []
    if not wanted.power and vectors < steps + LEAST_STEPS:
        needed = (steps + LEAST_STEPS) * size * number
        reasons.append(
            f"power iteration: a Krylov basis of {_sized(needed)} does not fit {_sized(free)}"
        )
        basis, held = 0, POWER_VECTORS
    depths = {}
    for name in ("forecast", "density"):
        depth = min(getattr(wanted, name), size)
        depths[name] = min(depth, max(vectors - held, 0))
        if depths[name] < depth:
            shallow = depths[name] < LEAST_STEPS
            depths[name] = 0 if shallow else depths[name]
            what = "left out" if shallow else f"from {depths[name]} steps only"
            reasons.append(f"memory: the {name} is {what}; a larger --memory-budget allows more")
    return replace(
        wanted,
        power=basis == 0,
        forecast=depths["forecast"],
        density=depths["density"],
        reasons=tuple(reasons),
    )


def _sized(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
