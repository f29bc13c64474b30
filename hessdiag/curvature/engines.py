"""How a product over the dataset is computed: graphs kept in memory, or built again each time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hessdiag.curvature.ggn import ggn_product
from hessdiag.curvature.hessian import BatchProduct, hessian_product
from hessdiag.curvature.objective import Objective, flatten, only, unflatten, zeros
from hessdiag.data import leaves
from hessdiag.errors import HessdiagError, SelfCheckFailed, is_out_of_memory
from hessdiag.options import Curvature, EngineName
from hessdiag_probes.types import Vector

BuildProduct = Callable[[Objective, Any, Sequence[nn.Parameter]], BatchProduct | None]
BUILD: dict[Curvature, BuildProduct] = {"hessian": hessian_product, "ggn": ggn_product}


class Engine(Protocol):
    """``v -> C v`` over the dataset for one block; linear, and free of side effects."""

    @property
    def name(self) -> str:
        """As ``--engine`` names it."""
        ...

    def __call__(self, vector: Vector, /) -> Vector:
        """The product, flattened in the order of the block's parameters."""
        ...


@dataclass(frozen=True)
class Recompute:
    """Builds every batch's graph again for every product: one batch in memory at a time."""

    objective: Objective
    parameters: Sequence[nn.Parameter]
    build: BuildProduct
    name: str = "recompute"

    def __call__(self, vector: Vector, /) -> Vector:
        """``C v`` over the dataset."""
        total = zeros(self.parameters)
        pieces = unflatten(vector, self.parameters)
        with only(self.parameters):
            for batch, share in self.objective:
                product = _guarded(self.build, self.objective, batch, self.parameters)
                if product is not None:
                    total += share * flatten(_run(product, pieces))
        return total


class Kept:
    """Keeps every batch's graph: a product is backward passes only, about two gradients."""

    name = "kept"

    def __init__(
        self, objective: Objective, parameters: Sequence[nn.Parameter], build: BuildProduct
    ) -> None:
        self.parameters = parameters
        self.products: list[tuple[BatchProduct, float]] = []
        with only(parameters):
            for batch, share in objective:
                product = _guarded(build, objective, batch, parameters)
                if product is not None:
                    self.products.append((product, share))

    def __call__(self, vector: Vector, /) -> Vector:
        """``C v`` over the dataset."""
        total = zeros(self.parameters)
        pieces = unflatten(vector, self.parameters)
        with only(self.parameters):
            for product, share in self.products:
                total += share * flatten(_run(product, pieces))
        return total


def _guarded(
    build: BuildProduct, objective: Objective, batch: Any, parameters: Sequence[nn.Parameter]
) -> BatchProduct | None:
    try:
        return build(objective, batch, parameters)
    except HessdiagError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SelfCheckFailed(_no_second_derivative(error)) from error


def _run(product: BatchProduct, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    try:
        return product(pieces)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SelfCheckFailed(_no_second_derivative(error)) from error


def _no_second_derivative(error: Exception) -> str:
    return (
        f"the loss cannot be differentiated twice: {error}\n"
        "Replace the operation that has no double backward by plain torch operations (an eager "
        "version of a fused kernel; non-reentrant activation checkpointing)."
    )


def make_engine(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    *,
    curvature: Curvature,
    engine: EngineName = "auto",
    memory_budget: int | None = None,
) -> Engine:
    """The engine asked for; ``auto`` keeps the graphs when they fit the memory budget.

    Cost:
        ``auto`` measures the graph of the largest batch: one forward and backward.
    """
    build = BUILD[curvature]
    if engine == "auto":
        device = parameters[0].device
        budget = free_memory(device) // 2 if memory_budget is None else memory_budget
        needed = graph_bytes(objective, parameters, build)
        engine = "kept" if needed <= budget else "recompute"
    if engine == "kept":
        return Kept(objective, parameters, build)
    return Recompute(objective, parameters, build)


def graph_bytes(
    objective: Objective, parameters: Sequence[nn.Parameter], build: BuildProduct
) -> int:
    """Bytes that the kept graphs of the whole dataset would hold beyond data and parameters.

    Measured on the batch with the most values and scaled by the number of values.
    """
    sizes = [sum(t.numel() for t in leaves(batch)) for batch, _ in objective]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    batch = objective.batches.items[largest]
    with only(parameters), _saved_bytes() as storages:
        product = _guarded(build, objective, batch, parameters)
    model = objective.model
    there = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers(), *leaves(batch))
        if tensor.layout == torch.strided
    }
    held = sum(size for pointer, size in storages.items() if pointer not in there)
    del product
    return int(held * sum(sizes) / max(sizes[largest], 1))


@contextmanager
def _saved_bytes() -> Iterator[dict[int, int]]:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation's own output would keep its graph alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def free_memory(device: torch.device) -> int:
    """Bytes free for new tensors on the device (CPU: what the system calls available)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        free = available * 1024
    except (OSError, ValueError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free, _container_limit())


def _container_limit() -> int:
    """Bytes left in this control group, which the system's own figure does not know."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or the limit is the word "max"
        return sys.maxsize
    return max(limit - used, 0)
