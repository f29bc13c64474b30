"""Products from gradients alone, for models that cannot be differentiated twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hessdiag.curvature.objective import Objective, flatten, moved
from hessdiag_probes.random import generator, rademacher
from hessdiag_probes.types import Vector

FIRST = 1e-4
"""Of |p|: the first step that is tried."""
RETRIES = 4
"""Steps that are tried for a product whose step is much too long or too short."""
GAIN = 3.0
"""By how much another step must promise to be better before it is tried."""
FARTHEST = 100.0
"""By which factor a step is changed at most."""
LONGEST = 0.1
"""Of |p|: no step is longer, for the loss there is another one."""
ORDER = 16.0
"""Margin of the fourth-order formula's error over the square of the second-order one's."""
UNEVEN = 2.0
"""Margin of what is left of the even part: a kink at p itself is off by as much as that shows."""
SPREAD = 3.0
"""Standard deviations that rounding is counted with."""
POINTS = 7
"""Gradients in a row from whose differences their rounding is read."""
DRAWS = 3
"""Coordinates that the step along a coordinate is measured on."""


@dataclass(frozen=True)
class Differed:
    """A product, and what it may be wrong by.

    Attributes:
        value: About ``H v``, (n,).
        error: Entry by entry, with random-like signs, (n,): truncation and rounding.
        truncation: 2-norm of the former's part of ``error``.
        rounding: Of the latter's.
        step: h.
    """

    value: Vector
    error: Vector
    truncation: float
    rounding: float
    step: float

    @property
    def size(self) -> float:
        """What another step is compared by."""
        return self.truncation + self.rounding


class Difference:
    """``v -> H v`` by central differences of the gradient along ``v``, of fourth order.

    With u = v/|v|, D(h) = (g(p + hu) - g(p - hu)) / 2h and the value is (4 D(h) - D(2h)) / 3,
    times |v|. Three things tell its error, product by product: the two second-order differences
    disagree by the h² term, whose relative square bounds the h⁴ term of a smooth loss; the even
    part g(p + hu) + g(p - hu) - 2 g(p) grows by four from h to 2h but for an h⁴ term and for
    kinks, also for one that lies on p itself; and rounding of the gradient is divided by h.

    The step is measured once for directions of many coordinates and once for single ones; a
    product takes what lies between these, and tries others where its error would profit. It is a
    function of the vector alone, so that products do not depend on their order.

    Attributes:
        objective: Whose gradient is differenced.
        parameters: Of the block.
        noise: Rounding of the gradient, (n,), 2 or 3 standard deviations.
        last: The latest product.

    Cost:
        Four gradients per product, up to four times that where the step does not fit; some 50 in
        the beginning.
    Source:
        Richardson (1911) for the formula; Moré and Wild (2011) for the rounding of a black box.
    """

    name = "difference"

    def __init__(
        self, objective: Objective, parameters: Sequence[nn.Parameter], *, seed: int = 0
    ) -> None:
        self.objective = objective
        self.parameters = list(parameters)
        self.position = flatten([p.data for p in parameters])
        self.length = float(self.position.double().norm()) or 1.0
        self.last: Differed | None = None
        self.slope = objective.gradient(self.parameters)
        self._seed = seed
        self.noise = self._noise()
        self.steps = self._first_steps()

    def __call__(self, vector: Vector, /) -> Vector:
        """``H v``."""
        return self.differ(vector).value

    def error(self, vector: Vector, /) -> Vector:
        """What the product with ``vector`` may be wrong by, entry by entry, (n,)."""
        return self.differ(vector).error

    def differ(self, vector: Vector) -> Differed:
        """The product and its error."""
        found = self._adapted(vector, self._step(vector))
        self.last = found
        return found

    def _adapted(self, vector: Vector, step: float) -> Differed:
        size = float(vector.double().norm())
        if size == 0 or not math.isfinite(size):
            nothing = torch.zeros_like(vector) if size == 0 else torch.full_like(vector, math.nan)
            return Differed(nothing, nothing, 0.0, 0.0, step)
        unit = (vector.double() / size).to(vector)
        best = self._at(unit, size, step)
        for _ in range(RETRIES):
            other = self._better(best)
            if other is None:
                break
            found = self._at(unit, size, other)
            if not found.size < best.size:
                break
            best = found
        return best

    def _better(self, found: Differed) -> float | None:
        """Another step that promises a smaller error; truncation is cubic and rounding inverse."""
        if found.truncation == 0 and found.rounding == 0:
            return None
        if math.isnan(found.size):
            return found.step / FARTHEST
        ratio = (found.rounding / (3 * found.truncation)) ** 0.25 if found.truncation else FARTHEST
        ratio = min(max(ratio, 1 / FARTHEST), FARTHEST, LONGEST * self.length / found.step)
        promised = found.truncation * ratio**3 + found.rounding / ratio
        return found.step * ratio if promised < found.size / GAIN else None

    def _at(self, unit: Vector, size: float, step: float) -> Differed:
        """The product of one step."""
        near, twice = (self._pair(unit, factor * step) for factor in (1.0, 2.0))
        first = (near[0] - near[1]) / (2 * step)
        second = (twice[0] - twice[1]) / (4 * step)
        bend = (first - second) / 3
        value = first + bend
        even = near[0] + near[1] - 2 * self.slope
        uneven_rest = (twice[0] + twice[1] - 2 * self.slope - 4 * even) / (4 * step)
        whole, apart = float(value.double().norm()), float(bend.double().norm())
        # Of a smooth loss the uneven rest is of third order, of a kink as large as the bend.
        uneven = float(uneven_rest.double().norm())
        share = ORDER * apart / whole if whole > 0 else 1.0
        share = min(max(share, uneven / apart if apart > 0 else 0.0), 1.0)
        cut = share * bend.abs() + UNEVEN * uneven_rest.abs()
        rounding = self.noise / step
        sign = torch.where(bend < 0, -1.0, 1.0).to(bend)
        return Differed(
            value * size,
            sign * (cut + rounding) * size,
            float(cut.double().norm()) * size,
            float(rounding.double().norm()) * size,
            step,
        )

    def _pair(self, unit: Vector, step: float) -> tuple[Vector, Vector]:
        return self._gradient(step * unit), self._gradient(-step * unit)

    def _gradient(self, step: Vector) -> Vector:
        with moved(self.parameters, step):
            return self.objective.gradient(self.parameters)

    def _noise(self) -> Vector:
        """What rounding does to the gradient, from its high differences, (n,).

        A unit in its last place at least, for a curvature below that shows nowhere.
        """
        unit = self._sign("rounding")
        eps = torch.finfo(unit.dtype).eps
        worst = eps / SPREAD * self.slope.abs()
        for spacing in (eps**0.45, eps**0.3):
            # On one side of p, for p itself may lie on a kink.
            row = [
                self._gradient(index * spacing * self.length * unit)
                for index in range(1, POINTS + 1)
            ]
            table = torch.stack(row)
            for order in range(1, POINTS):
                table = table.diff(dim=0)
                if order >= POINTS - 3:
                    usual = math.factorial(order) ** 2 / math.factorial(2 * order)
                    worst = torch.maximum(worst, (usual * table.square().mean(dim=0)).sqrt())
        return SPREAD * worst

    def _first_steps(self) -> tuple[float, float]:
        """The steps along a direction of many coordinates, and along one coordinate."""
        sign = self._sign("step")
        many = self._adapted(sign, FIRST * self.length)
        places = {int(many.value.abs().argmax())}
        made = generator(self._seed, "difference", "coordinates")
        places |= {int(i) for i in torch.randint(len(sign), (DRAWS - 1,), generator=made)}
        tried = []
        for place in sorted(places):
            single = torch.zeros_like(sign)
            single[place] = 1.0
            tried.append(math.log(self._adapted(single, many.step).step))
        return many.step, math.exp(sum(tried) / len(tried))

    def _step(self, vector: Vector) -> float:
        """Between both, by how much of the vector is in one coordinate."""
        many, single = self.steps
        size = float(vector.double().norm())
        if len(vector) == 1 or size == 0:
            return single
        peak = float(vector.abs().max()) / size
        share = 1 + math.log(max(peak, 1e-300)) / (0.5 * math.log(len(vector)))
        return many * math.exp(min(max(share, 0.0), 1.0) * math.log(single / many))

    def _sign(self, purpose: str) -> Vector:
        like = self.position
        made = generator(self._seed, "difference", purpose)
        sign = rademacher(len(like), generator=made, dtype=like.dtype, device=like.device)
        return sign / math.sqrt(len(like))
