"""A tape as one CUDA graph: where operations are small, starting each takes longer than doing it.

Only tapes are captured: the backward passes of a kept graph run on the stream of its forward pass,
which is the default one and cannot be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hessdiag.curvature.engines.linearized import AGREEMENT, Linearized, Played, Route
from hessdiag.curvature.objective import flatten
from hessdiag_probes.types import norm

WARM = 3
"""Products before a capture, so that libraries have set themselves up."""

Work = Callable[[], Sequence[Tensor]]


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Do it again, on the numbers that stand in its tensors now, into the same tensors."""
        ...


class CannotCapture(Exception):
    """A tape does something that a CUDA graph cannot, or its graph gives other products."""


@dataclass(frozen=True)
class Captured:
    """A batch's product from a CUDA graph of its tape.

    Attributes:
        graph: Of the operations.
        inputs: Tensors that it reads the vector from.
        outputs: Tensors that it writes the product into.
        route: By which the tape was recorded.
    """

    graph: Graph
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    route: Route

    def __call__(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        """``C_B v``, in tensors that the next call overwrites."""
        for buffer, piece in zip(self.inputs, pieces, strict=True):
            buffer.copy_(piece)
        self.graph.replay()
        return self.outputs


def on_stream(work: Work, device: torch.device) -> tuple[Graph, Sequence[Tensor]]:
    """Capture ``work``, on a stream of its own, after a few runs there.

    Raises:
        Exception: CUDA refuses an operation, or has no memory for the graph.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = work()
    return graph, outputs


def captured(
    played: Played,
    pieces: Sequence[Tensor],
    *,
    capture: Callable[[Work, torch.device], tuple[Graph, Sequence[Tensor]]] = on_stream,
) -> Captured:
    """The graph of a tape, compared with the tape on a vector that it was not captured with.

    Args:
        played: The tape, on a CUDA device.
        pieces: Any vector in the parameters' shapes that is not zero.
        capture: Makes the graph of some work.
    Raises:
        CannotCapture: It cannot be captured, or it disagrees; the tape still works.
    Cost:
        Six products, and memory for all that the tape computes on its way.
    """
    # The graph reads these addresses for ever; twice the vector stands in them when it is made.
    inputs = [2 * piece for piece in pieces]
    try:
        graph, outputs = capture(lambda: played(inputs), pieces[0].device)
        made = Captured(graph, inputs, outputs, played.route)
        wanted, found = flatten(played(pieces)), flatten(made(pieces))
        again = flatten(made(pieces))
    except Exception as error:  # CUDA raises what it likes
        raise CannotCapture(str(error)) from error
    apart = max(norm(found - wanted), norm(again - wanted))
    if not apart <= AGREEMENT[wanted.dtype] * norm(wanted):
        raise CannotCapture("the graph's product is not the tape's")
    return made


def capture_all(engine: Linearized, pieces: Sequence[Tensor]) -> None:
    """Put graphs in the place of the tapes of all batches, but where one cannot be captured."""
    products = []
    for product, share in engine.products:
        try:
            made = captured(product, pieces) if isinstance(product, Played) else product
        except CannotCapture:
            made = product
        products.append((made, share))
    engine.products = products
    engine.graphs = sum(isinstance(product, Captured) for product, _ in products)
