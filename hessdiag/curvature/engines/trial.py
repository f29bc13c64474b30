"""Which way of computing a block's products is the fastest, by trying a few."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TypeVar

from hessdiag.curvature.engines.base import GAIN
from hessdiag.curvature.engines.clock import timed
from hessdiag.curvature.engines.cuda import CannotCapture, capture_all, captured
from hessdiag.curvature.engines.kept import Kept
from hessdiag.curvature.engines.linearized import (
    SPARE,
    WEIGHT,
    CannotLinearize,
    Linearized,
    Played,
    Reference,
    Route,
    linearized,
    routes,
)
from hessdiag.curvature.objective import only

T = TypeVar("T")

CAPTURED = ", CUDA graph"
"""What is said of a tape that is one."""

SHARE = 0.1
"""Of the expected time of a block's products: what trying may cost."""
LEAST = 5
"""Products that a trial takes at the least."""
OVERHEAD = (6.0, 0.2)
"""Recording costs six products more at most, where operations are tiny, and some 0.2 s."""
FORWARD = 3.0
"""Recording by forward mode, in units of recording a double backward."""
COMPILING = 1.5
"""Seconds that torch takes to compile its forward-mode formulas, once in a process."""
FORMULAS = "torch._decomp.decompositions_for_jvp"
"""The module that is there when they were."""


def fastest(kept: Kept, products: int, budget: int, usual: float | None = None) -> Kept:
    """What computes the products of a block in the least time, trying included.

    Args:
        kept: Graphs of as many batches as fit.
        products: How many are expected.
        budget: Bytes for what is kept.
        usual: Seconds per product of the first batch's graph where it takes several at once.
    Returns:
        ``kept``, or what took the place of its graphs; ``tried`` tells the seconds per product of
        this rank's kept batches, extrapolated from the first of them.
    Cost:
        At most a tenth of the expected time, as far as that can be known before; it talks to no
        other rank.
    """
    count = len(kept.products)
    trial = _Trial(kept, products, usual)
    if not count or SHARE * products < LEAST:
        return kept
    with only(kept.parameters):
        trial.begin()
        for route in reversed(routes(kept.build)):
            if WEIGHT * kept.held + SPARE[route] * kept.largest <= budget:
                trial.attempt(route)
        if kept.parameters[0].is_cuda and WEIGHT * kept.held + count * kept.largest <= budget:
            trial.capture()
        engine = trial.winner()
    tried = {name: seconds * count for name, seconds in trial.seconds.items()}
    engine.tried = tried | kept.tried
    return engine


class _Trial:
    """Candidates on the first batch, and what was spent on them.

    Attributes:
        seconds: Per product with that batch, by candidate.
        usual: The least of the kept graph's.
        spent: Seconds.
        record: Of recording the double backward; None before.
    """

    def __init__(self, kept: Kept, products: int, usual: float | None) -> None:
        self.kept = kept
        self.usual = math.inf if usual is None else usual
        self.count = len(kept.products)
        self.products = products
        self.seconds: dict[str, float] = {}
        self.played: dict[Route, Played] = {}
        self.spent = 0.0
        self.record: float | None = None

    def recording(self, product: float) -> float:
        """Seconds that recording may take, of a product of ``product`` seconds."""
        return product + min(OVERHEAD[0] * product, OVERHEAD[1])

    def begin(self) -> None:
        """Time the kept graph, whose product is what the others are compared with."""
        product, _ = self.kept.products[0]
        parameters = self.kept.parameters
        _, first = self._timed(lambda: Reference.of(product, parameters))
        self.reference, second = self._timed(lambda: Reference.of(product, parameters))
        self.seconds["kept"] = min(first, second)
        self.usual = min(self.usual, self.seconds["kept"])

    def attempt(self, route: Route) -> None:
        """Record the first batch, if that can pay, and time it."""
        product = self.seconds["kept"]
        if self.record is None:
            each = self.recording(product)
            once = 0.0
        else:
            each = FORWARD * self.record
            once = 0.0 if FORMULAS in sys.modules else COMPILING
        # The other batches are recorded too, each after a product to compare it with.
        needed = self.spent + once + self.count * (each + 2 * product)
        if needed > SHARE * self.products * self.usual * self.count:
            return
        kept = self.kept
        try:
            played, taken = self._timed(
                lambda: linearized(
                    kept.objective, kept.batches[0], kept.parameters, self.reference, route
                )
            )
        except CannotLinearize:
            return
        if route == "reverse":
            self.record = taken
        self.played[route] = played
        _, self.seconds[f"linearized, {route}"] = self._timed(lambda: played(self.reference.pieces))

    def capture(self) -> None:
        """Capture what was recorded, and time that."""
        pieces = self.reference.pieces
        for route, played in self.played.items():
            try:
                made, _ = self._timed(lambda tape=played: captured(tape, pieces))  # type: ignore[misc]
            except CannotCapture:
                continue
            _, taken = self._timed(lambda graph=made: graph(pieces))  # type: ignore[misc]
            self.seconds[f"linearized, {route}{CAPTURED}"] = taken

    def winner(self) -> Kept:
        """The fastest candidate, with all batches."""
        usual = GAIN * self.usual
        names = [f"linearized, {route}{how}" for route in self.played for how in ("", CAPTURED)]
        best = min(names, key=lambda name: self.seconds.get(name, math.inf), default="")
        if not self.seconds.get(best, math.inf) < usual:
            return self.kept
        route: Route = "forward" if "forward" in best else "reverse"
        try:
            engine = Linearized.of(self.kept, self.played.pop(route))
        except CannotLinearize:
            return self.kept
        if best.endswith(CAPTURED):
            capture_all(engine, self.reference.pieces)
        return engine

    def _timed(self, work: Callable[[], T]) -> tuple[T, float]:
        result, taken = timed(work, self.kept.parameters[0].device)
        self.spent += taken
        return result, taken
