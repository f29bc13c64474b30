"""How many vectors at once kept graphs should be given, by trying a few numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hessdiag.curvature.engines.base import GAIN
from hessdiag.curvature.engines.clock import timed
from hessdiag.curvature.engines.kept import Kept
from hessdiag.curvature.engines.many import Wide, at_once
from hessdiag.curvature.hessian import BatchProduct
from hessdiag.curvature.objective import flatten, only, unflatten
from hessdiag_probes.random import gaussian, generator, rademacher

WIDTHS = (8, 32, 128)
"""Numbers of vectors that are tried, each where the one before was a gain."""
CHUNKS = 8
"""A width is tried where at least so many times as many vectors are to come."""
AGREEMENT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""How near to a product by itself those at once must be, relative."""


def rehearse(kept: Kept, count: int) -> float | None:
    """Let ``kept`` take as many vectors at once as is quickest, if that gives the same products.

    Its ``tried`` tells the seconds per product of this rank's kept batches, extrapolated from the
    first of them; no other rank is talked to.

    Args:
        kept: Graphs of as many batches as fit.
        count: Vectors to come.
    Returns:
        Seconds per product of the first batch; None where nothing was tried or gained.
    Cost:
        Of the first batch about a third of the vectors to come at most, nearly all of them at once;
        of each other batch one product, and 8 at once.
    """
    if not kept.products or not _fits(kept, WIDTHS[0], count):
        return None
    parameters = kept.parameters
    vectors = _drawn(parameters, WIDTHS[-1])
    with only(parameters), warnings.catch_warnings():
        # What torch does in a loop of its own is no gain.
        warnings.filterwarnings("error", message="There is a performance drop")
        width, seconds = _quickest(kept, vectors, count)
        few = vectors[: WIDTHS[0]]
        if not all(_agree(product, few, parameters) for product, _ in kept.products):
            width = 1
    batches = len(kept.products)
    kept.tried = {_name(k): batches * each for k, each in seconds.items()}
    if width == 1:
        return None
    kept.products = [(Wide(product, width), share) for product, share in kept.products]
    return seconds[width]


def _quickest(kept: Kept, vectors: Tensor, count: int) -> tuple[int, dict[int, float]]:
    """The best width for the first batch, and seconds per product by width."""
    product, _ = kept.products[0]
    parameters, device = kept.parameters, kept.parameters[0].device
    one = unflatten(vectors[0], parameters)
    seconds = {1: _least(lambda: product(one), device)}
    best = 1
    for width in WIDTHS:
        if not _fits(kept, width, count):
            break
        some = vectors[:width]
        try:
            taken = _least(lambda some=some: at_once(product, some, parameters), device)  # type: ignore[misc]
        except Exception:  # an operation cannot be vectorised, or memory ran out: one by one works
            break
        seconds[width] = taken / width
        if seconds[width] > GAIN * seconds[best]:
            break
        best = width
    return best, seconds


def _least(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quicker of two runs: the first warms up."""
    return min(timed(work, device)[1] for _ in range(2))


def _fits(kept: Kept, width: int, count: int) -> bool:
    """Whether a width may be tried: there are vectors enough, and room for its graphs."""
    room = kept.room
    return CHUNKS * width <= count and (room is None or width * kept.largest <= room)


def _name(width: int) -> str:
    return "kept" if width == 1 else f"kept, {width} at once"


def _drawn(parameters: Sequence[nn.Parameter], count: int) -> Tensor:
    like, size = parameters[0], sum(p.numel() for p in parameters)
    made = generator(0, "several", "vectors")
    drawn = gaussian(count * size, generator=made, dtype=like.dtype, device=like.device)
    return drawn.view(count, size)


def _agree(product: BatchProduct, vectors: Tensor, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether products at once are those one by one, seen in their sum with random signs."""
    made = generator(0, "several", "signs")
    signs = rademacher(len(vectors), generator=made, dtype=vectors.dtype, device=vectors.device)
    try:
        found = at_once(product, vectors, parameters)
    except Exception:  # foreign code raises what it likes; one by one it may still work
        return False
    wanted = flatten(product(unflatten(signs @ vectors, parameters)))
    error = float((signs @ found - wanted).norm())
    return error <= AGREEMENT[found.dtype] * float(found.norm())
