"""Products whose linear part is recorded once and played again: no graph, no autograd engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from hessdiag.curvature.engines.base import BUILD, BuildProduct, guarded, run_product
from hessdiag.curvature.engines.kept import Kept
from hessdiag.curvature.engines.tape import Tape, record
from hessdiag.curvature.hessian import BatchProduct
from hessdiag.curvature.objective import Objective, flatten, unflatten
from hessdiag.errors import HessdiagError, SelfCheckFailed, is_out_of_memory
from hessdiag_probes.random import gaussian, generator
from hessdiag_probes.types import Vector, norm

Route = Literal["forward", "reverse"]
"""Forward over reverse: the derivative of the gradient along the vector; it does the least
arithmetic. Reverse over reverse: the double backward of :mod:`hessdiag.curvature.hessian`, for
all that forward mode does not know (GroupNorm, Gauss–Newton)."""
AGREEMENT = {torch.float64: 1e-10, torch.float32: 1e-4}
"""How near to the double backward a played product must be, relative."""
ROUNDING = 1e3
"""Or how near in units of its own rounding, which is all there is of a Hessian that is zero."""
WEIGHT = 2
"""Bytes of a tape in units of those of the graph, at most; 1.0 to 1.8 on six networks."""
SPARE: dict[Route, int] = {"reverse": 2, "forward": 4}
"""Graphs that are in memory at most while one is recorded."""


class CannotLinearize(Exception):
    """No tape of a batch's product gives what its double backward gives."""


@dataclass(frozen=True)
class Reference:
    """A batch's product by double backward, and what it gives for one random vector.

    Attributes:
        product: On the graph of the batch.
        pieces: The vector.
        wanted: The product with it, (n,).
    """

    product: BatchProduct
    pieces: Sequence[Tensor]
    wanted: Vector

    @classmethod
    def of(cls, product: BatchProduct, parameters: Sequence[nn.Parameter]) -> Reference:
        """By one product."""
        pieces = drawn(parameters, "compared")
        return cls(product, pieces, flatten(run_product(product, pieces)))


@dataclass(frozen=True)
class Played:
    """A batch's product from its tape.

    Attributes:
        tape: Of the product.
        route: By which it was recorded.
    """

    tape: Tape
    route: Route

    def __call__(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        """``C_B v``."""
        return self.tape(pieces)


class Linearized(Kept):
    """Keeps, in place of each batch's graph, the operations that depend on the vector.

    They are recorded while a product is computed (:mod:`.tape`), those that only the parameters
    enter are done once and for all, and a product plays the rest. Each batch's tape is compared
    with the double backward on another random vector before it is used.

    Attributes:
        routes: Tried in this order, for each batch.
        graphs: Batches whose tapes became CUDA graphs.
    """

    name = "linearized"
    graphs = 0
    weight = WEIGHT
    spare = SPARE["forward"]

    def __init__(
        self,
        objective: Objective,
        parameters: Sequence[nn.Parameter],
        build: BuildProduct,
        *,
        budget: int | None = None,
    ) -> None:
        """Record the batches that fit the budget.

        Raises:
            SelfCheckFailed: A batch cannot be recorded; the message says what to use.
        """
        self.routes = routes(build)
        super().__init__(objective, parameters, build, budget=budget)

    @property
    def record(self) -> str:
        """The name, and of how many batches something is kept, by CUDA graphs or not."""
        return f"{super().record}, {self.graphs} as CUDA graphs" if self.graphs else super().record

    def make(self, batch: Any) -> BatchProduct | None:
        """The batch's tape; None where its product is zero."""
        product = guarded(self.build, self.objective, batch, self.parameters)
        if product is None:
            return None
        reasons = []
        reference = Reference.of(product, self.parameters)
        for route in self.routes:
            try:
                return linearized(self.objective, batch, self.parameters, reference, route)
            except CannotLinearize as reason:
                reasons.append(f"{route}: {reason}")
        raise SelfCheckFailed(
            "the products of this model cannot be recorded by --engine linearized "
            f"({'; '.join(reasons)}); use --engine kept, or auto"
        )

    @classmethod
    def of(cls, kept: Kept, first: Played) -> Linearized:
        """In place of the graphs of ``kept``, which are let go one by one.

        Args:
            kept: It must not be used any more, unless this raises.
            first: Of its first batch; the others are recorded by the same route.
        Raises:
            CannotLinearize: One of the others cannot be recorded.
        """
        engine = cls.__new__(cls)
        engine.__dict__.update(kept.__dict__)
        engine.routes = (first.route,)
        engine.products = [(first, kept.products[0][1])]
        others = list(zip(kept.batches, kept.products, strict=True))[1:]
        for index, (batch, (product, share)) in enumerate(others, start=1):
            reference = Reference.of(product, kept.parameters)
            played = linearized(kept.objective, batch, kept.parameters, reference, first.route)
            engine.products.append((played, share))
            kept.products[index] = (played, share)
        return engine


def routes(build: BuildProduct) -> tuple[Route, ...]:
    """By which a product may be recorded, the cheapest to play first."""
    return ("forward", "reverse") if build is BUILD["hessian"] else ("reverse",)


def linearized(
    objective: Objective,
    batch: Any,
    parameters: Sequence[nn.Parameter],
    reference: Reference,
    route: Route,
) -> Played:
    """The tape of a batch's product, compared with the double backward.

    Args:
        objective: Whose loss is differentiated.
        batch: On the device, in the dtype.
        parameters: Of the block, requiring gradients.
        reference: Of the batch.
        route: How it is recorded.
    Raises:
        CannotLinearize: It cannot be recorded, or it disagrees; the message says by how much.
    Cost:
        One product and recording one, by ``forward`` a gradient more; the first forward tape of a
        process compiles torch's formulas for about a second.
    """
    # A storage of its own tells each from the others.
    along = [piece.clone() for piece in drawn(parameters, "recorded")]
    try:
        if route == "forward":
            tape = record(lambda: _derivative(objective, batch, parameters, along), along)
        else:
            tape = record(lambda: reference.product(along), along)
        played = Played(tape, route)
        _compare(played, reference)
    except CannotLinearize:
        raise
    except Exception as error:  # forward mode and foreign code raise what they like
        if is_out_of_memory(error):
            raise
        if isinstance(error, HessdiagError) and error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        line = str(error).strip().splitlines() or [type(error).__name__]
        raise CannotLinearize(line[-1]) from error
    return played


def drawn(parameters: Sequence[nn.Parameter], purpose: str) -> list[Tensor]:
    """A random vector of the block, in pieces."""
    like = parameters[0]
    vector = gaussian(
        sum(p.numel() for p in parameters),
        generator=generator(0, "linearized", purpose),
        dtype=like.dtype,
        device=like.device,
    )
    return unflatten(vector, parameters)


def _derivative(
    objective: Objective,
    batch: Any,
    parameters: Sequence[nn.Parameter],
    along: Sequence[Tensor],
) -> list[Tensor]:
    """Of the batch's gradient along a vector, by forward mode.

    The parameters themselves get the tangents, by a copy onto themselves, so that tied ones,
    parametrizations and whatever holds them see these, too.
    """
    with forward_ad.dual_level():
        for parameter, tangent in zip(parameters, along, strict=True):
            # Not one number changes: graphs that were kept before stay right.
            with torch.no_grad(), _unsafe_preserve_version_counter(parameter):
                parameter.copy_(forward_ad.make_dual(parameter.detach(), tangent))
        loss = objective.evaluate(batch)
        gradient = torch.autograd.grad(
            loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        tangents = [forward_ad.unpack_dual(part).tangent for part in gradient]
    return [
        torch.zeros_like(parameter) if tangent is None else tangent
        for parameter, tangent in zip(parameters, tangents, strict=True)
    ]


def _compare(played: Played, reference: Reference) -> None:
    """Raise where the tape and the double backward disagree on a vector of their own."""
    pieces, wanted = reference.pieces, reference.wanted
    found = flatten(played(pieces))
    error, size = norm(found - wanted), norm(wanted)
    if error <= AGREEMENT[wanted.dtype] * size:
        return
    if wanted.dtype == torch.float64:
        narrow = played.tape(pieces, narrow=torch.float32)
        noise = norm(flatten(narrow).double() - found) * 2.0**-29
        if error <= ROUNDING * noise:
            return
    raise CannotLinearize(f"it disagrees with the double backward by {error / size:.1e} relative")
