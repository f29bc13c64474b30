"""What a block that is not assembled may cost, in products and in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from hessdiag_probes.basis import AS_IT_IS, Share, Storage

FORECAST_STEPS = 20
DENSITY_PROBES, DENSITY_STEPS = 10, 60
POWER_VECTORS = 10  # what power iteration and the probes hold
FLOAT64 = 8  # bytes
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
        late: Whether the time is up, where that is not for this process to say; or None.
        storage: How the Krylov basis of the ends is kept, and where those of the rest are.
        reasons: What memory does not allow, in words for the row's notes; it changes numbers.
        told: What else is done for want of memory, which moves numbers by rounding only.
        agree: What a failure that is about to be swallowed is on every process; or None.
        batches_may_shrink: The row is tried again where a batch lacks memory.
    """

    steps: int = 40
    probes: int = 20
    forecast: int = FORECAST_STEPS
    density: int = 0
    tolerance: float = 1e-3
    power: bool = False
    deadline: float | None = None
    late: Callable[[], bool] | None = None
    storage: Storage = AS_IT_IS
    reasons: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    agree: Callable[[Exception, str], Exception] | None = None
    batches_may_shrink: bool = False

    @property
    def elsewhere(self) -> Storage:
        """How all bases but that of the ends are kept: in all their digits."""
        return replace(self.storage, dtype=None)

    def over(self) -> bool:
        """Whether the time is up."""
        if self.late is not None:
            return self.late()
        return self.deadline is not None and time.monotonic() >= self.deadline

    def products(self, size: int) -> int:
        """At most."""
        ends = self.steps if self.power else min(self.steps, size)
        density = DENSITY_PROBES * min(self.density, size)
        return ends + min(self.forecast, size) + self.probes + density


def fitted(
    wanted: Budget,
    size: int,
    *,
    number: int,
    free: int,
    host: int | None = None,
    share: Share | None = None,
    ranks: int = 1,
) -> Budget:
    """``wanted`` as far as memory allows.

    Lanczos holds its basis while a second one, of the forecast or of the density, is built. What
    does not fit as it is goes to the host, then in float32, then a part of it to every rank; then
    power iteration, which keeps none, finds the ends. The second basis is shallower before the
    first one moves, but for the host, which takes both.

    Args:
        wanted: What would be done with memory enough.
        size: Of the block.
        number: Bytes per number.
        free: Bytes that bases may take on the device.
        host: The same in the memory of the host, where the device has its own; or None.
        share: What one of ``ranks`` processes keeps of every vector; None keeps all.
        ranks: Number of processes that share.
    """
    steps = min(wanted.steps, size)
    others = max(min(wanted.forecast, size), min(wanted.density, size))
    needs = _Needs(size, number, steps, others)
    if wanted.power:
        return _shallower(wanted, needs, free - POWER_VECTORS * size * number)
    if needs.bytes(steps + others) <= free:
        return wanted
    if host is not None and needs.bytes(steps + others) <= host:
        told = f"the Krylov basis is kept on the host: {_sized(needs.bytes(steps))} of it do not "
        told += f"fit {_sized(free)} on the device"
        return replace(wanted, storage=Storage(device="cpu"), told=(told,))
    for storage, basis, room, words in _ladder(needs, free, host, share, ranks):
        if basis + needs.bytes(LEAST_STEPS) <= room:
            reasons = (words,) if words else ()
            return _shallower(replace(wanted, storage=storage), needs, room - basis, reasons)
    needed = needs.bytes(steps + LEAST_STEPS)
    reason = f"power iteration: a Krylov basis of {_sized(needed)} does not fit {_sized(free)}"
    return by_power(wanted, size, number=number, free=free, reason=reason)


def by_power(wanted: Budget, size: int, *, number: int, free: int, reason: str) -> Budget:
    """``wanted`` with the ends by power iteration, and what else ``free`` bytes allow."""
    others = max(min(wanted.forecast, size), min(wanted.density, size))
    needs = _Needs(size, number, 0, others)
    left = free - needs.bytes(POWER_VECTORS)
    without = replace(wanted, power=True, storage=AS_IT_IS, reasons=(), told=())
    return _shallower(without, needs, left, (reason,))


@dataclass(frozen=True)
class _Needs:
    """Of one block: its size, bytes per number, and the depths of its two bases."""

    size: int
    number: int
    steps: int
    others: int

    def bytes(self, vectors: int) -> int:
        """Of so many vectors as they are."""
        return vectors * self.size * self.number


def _ladder(
    needs: _Needs, free: int, host: int | None, share: Share | None, ranks: int
) -> Iterator[tuple[Storage, int, int, str]]:
    """Storages with their bytes, the bytes that there are for both bases, and what is told."""
    whole = needs.bytes(needs.steps)
    yield AS_IT_IS, whole, free, ""
    if needs.number == FLOAT64:
        half = f"a Krylov basis of {_sized(whole)} does not fit {_sized(free)}"
        words = f"memory: {half}; it is kept in float32, and the rounding is in the bounds"
        yield Storage(dtype=torch.float32), whole // 2, free, words
        if host is not None:
            yield Storage(device="cpu", dtype=torch.float32), whole // 2, host, words
    if share is not None and ranks > 1:
        words = f"memory: every process keeps a part of a Krylov basis of {_sized(whole)}"
        yield Storage(share=share), -(-whole // ranks), free, words


def _shallower(wanted: Budget, needs: _Needs, left: int, reasons: tuple[str, ...] = ()) -> Budget:
    """``wanted`` with the second basis no deeper than ``left`` bytes allow."""
    depths = {}
    told = list(reasons)
    room = max(left, 0) // max(needs.bytes(1), 1)
    for name in ("forecast", "density"):
        depth = min(getattr(wanted, name), needs.size)
        depths[name] = min(depth, room)
        if depths[name] < depth:
            shallow = depths[name] < LEAST_STEPS
            depths[name] = 0 if shallow else depths[name]
            what = "left out" if shallow else f"from {depths[name]} steps only"
            told.append(f"memory: the {name} is {what}; a larger --memory-budget allows more")
        else:
            depths[name] = getattr(wanted, name)
    return replace(
        wanted,
        forecast=depths["forecast"],
        density=depths["density"],
        reasons=tuple(told),
    )


def _sized(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
