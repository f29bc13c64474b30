"""A network on loan, and what all its blocks share: products, the whole matrix, halves, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from hessdiag.blocks import WHOLE, Block
from hessdiag.checks import SelfChecks
from hessdiag.curvature.engines import Engine, make_engine
from hessdiag.curvature.objective import Objective
from hessdiag.distributed import Alone, Group
from hessdiag.errors import OutOfTime
from hessdiag.failures import batch_work
from hessdiag.memory import shared_memory
from hessdiag.names import named_parameters
from hessdiag.options import Options, exact_limit
from hessdiag.progress import Event, Report
from hessdiag.relief import Relief, basis_share
from hessdiag.solve import Budget, fitted
from hessdiag.solve.budget import DENSITY_STEPS
from hessdiag_probes.basis import AS_IT_IS, Storage
from hessdiag_probes.types import Matvec, Vector

REPORT_EVERY = 0.1  # seconds


def allowed(options: Options, size: int, like: Tensor, group: Group | None = None) -> Budget:
    """What a block above the exact limit may cost, of numbers like ``like``, on its device."""
    free = options.memory_budget
    if free is None:
        free = shared_memory(like.device, group or Alone()) // 2
    host: int | None = None
    if like.device.type != "cpu":
        host = shared_memory(torch.device("cpu"), group or Alone()) // 2
    wanted = Budget(
        steps=options.steps,
        probes=options.probes,
        density=DENSITY_STEPS if options.density else 0,
        tolerance=options.tolerance,
        power=options.eigensolver == "power",
    )
    return fitted(
        wanted,
        size,
        number=like.element_size(),
        free=free,
        host=host,
        share=None if group is None else basis_share(group, size),
        ranks=1 if group is None else group.size,
    )


@dataclass(frozen=True)
class Row:
    """A row in the order of work.

    Attributes:
        name: Of the block and, but for raw, its variant: fixes the random vectors.
        step: Its place, from 1, and the number of rows.
    """

    name: str
    step: tuple[int, int]


class Network:
    """A network on loan, the checkpoint's own or a changed one, and what all its blocks share.

    Attributes:
        changed: It is not the checkpoint's own.
        matrix: Of the whole network, where it was assembled: its layers are cut from it.
        given: The objective, whatever its batches were cut into in ``objective``.
        relief: What the present block does without for want of memory.
        errors: What its entries may be wrong by, where it was assembled by differences.
        sure: It is a matrix of products, so each layer's part is right in that layer's own scale.
        slices: Of each parameter in ``matrix``.
        halves: The objective on each half of the data, with ``max_examples``.
        loss: Over the dataset.
        narrow: It casts to a narrower type somewhere.
        deadline: When to end with what is certified by then, of ``time.monotonic()``; or None.
        batch_rows: Rows of each of the task's batches, where they were joined into one.
        cache: What the makers of coordinates keep from one block to the next.
    """

    def __init__(
        self, objective: Objective, options: Options, report: Report, *, changed: bool = False
    ) -> None:
        self.objective = self.given = objective
        self.relief = Relief()
        self.options = options
        self.report = report
        self.changed = changed
        self.named: dict[str, nn.Parameter] = dict(named_parameters(objective.model))
        self.matrix: Tensor | None = None
        self.errors: Tensor | None = None
        self.sure = False
        self.slices: dict[str, tuple[int, int]] = {}
        self.halves: list[Objective] = []
        self.loss = 0.0
        self.narrow = False
        self.deadline: float | None = None
        self.batch_rows: tuple[int, ...] = ()
        self.cache: dict[str, object] = {}
        self._budgets: dict[str, Budget] = {}

    def select(self, names: Sequence[str]) -> list[nn.Parameter]:
        """The parameters of these names."""
        return [self.named[name] for name in names]

    def prepare(self, loss: float, checks: SelfChecks, parts: list[Objective]) -> None:
        """Take over what was found before the blocks."""
        self.loss = loss
        self.narrow = bool(checks.hidden_casts)
        self.halves = parts

    @property
    def differences(self) -> bool:
        """Whether products are differences of gradients."""
        return self.options.engine == "difference"

    def is_exact(self, block: Block) -> bool:
        """Whether the block is assembled and solved."""
        device = next(iter(self.named.values())).device
        assembled = block.size <= exact_limit(self.options, device.type)
        return assembled and not self.relief.matrix_free

    def budget(self, block: Block) -> Budget:
        """What a block above the exact limit may cost; decided once, for memory comes and goes."""
        if block.name not in self._budgets:
            like = self.named[block.parameters[0]]
            group = self.objective.group
            self._budgets[block.name] = allowed(self.options, block.size, like, group)
        return self._relieved(self._budgets[block.name])

    def _relieved(self, budget: Budget) -> Budget:
        """``budget`` without what the block does without since memory ran out."""
        if self.relief.basis == "power":
            return replace(budget, power=True, storage=AS_IT_IS)
        if self.relief.basis == "float32" and not budget.power:
            return replace(budget, storage=Storage(device="cpu", dtype=torch.float32))
        return budget

    def free_memory(self) -> int:
        """Bytes that one batch's graph, or all that are kept, may take; the same on all ranks."""
        if self.options.memory_budget is not None:
            return self.options.memory_budget
        device = next(iter(self.named.values())).device
        return shared_memory(device, self.objective.group) // 2

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(iter(self.named.values())).dtype

    def constrained(self, blocks: Sequence[Block]) -> dict[str, list[str]]:
        """What memory does not allow, by block: it changes numbers."""
        large = [b for b in blocks if b.skipped is None and not self.is_exact(b)]
        return {b.name: list(self.budget(b).reasons) for b in large if self.budget(b).reasons}

    def late(self, _: object = None) -> bool:
        """Whether the time is up, on rank 0's clock."""
        return self.objective.group.late(self.deadline)

    def told(self, error: Exception, where: str) -> Exception:
        """A failure that is about to be swallowed, as all ranks know it; see :class:`Group`."""
        return self.objective.group.told(error, where)

    def timed(self, product: Matvec) -> Matvec:
        """``product`` until the deadline: half a matrix certifies nothing."""

        def timed(vector: Vector) -> Vector:
            if self.late():
                raise OutOfTime(
                    f"not assembled within --max-seconds {self.options.max_seconds:g}; allow "
                    "more, or lower --exact-limit for bounds from fewer products"
                )
            return product(vector)

        return timed

    def engine(
        self,
        objective: Objective,
        parameters: list[nn.Parameter],
        *,
        products: int = 0,
        columns: bool = False,
    ) -> Engine:
        """How products of these parameters are computed, of which about ``products`` are to come.

        Other engines are tried where enough of them are; ``columns`` are asked for several at once.
        """
        asked = self.options.engine
        recompute = self.relief.recompute and asked != "difference"
        with batch_work():
            return make_engine(
                objective,
                parameters,
                curvature=self.options.curvature,
                engine="recompute" if recompute else asked,
                memory_budget=self.options.memory_budget,
                products=products,
                columns=columns,
            )

    def take_matrix(
        self, block: Block, matrix: Tensor, errors: Tensor | None = None, *, sure: bool = False
    ) -> None:
        """Cut the layers from ``matrix``, which was assembled for ``block``, the whole network.

        It is one of products where it is known for ``sure``, and wherever an engine was named.
        """
        self.matrix, self.errors = matrix, errors
        self.sure = sure or self.options.engine != "auto"
        ends = accumulate(self.named[name].numel() for name in block.parameters)
        self.slices = {
            name: (end - self.named[name].numel(), end)
            for name, end in zip(block.parameters, ends, strict=True)
        }

    def cut(self, block: Block) -> Tensor | None:
        """The block's part of the whole network's matrix, where that was assembled."""
        if self.matrix is None or block.name == WHOLE:
            return None
        return self._part(self.matrix, block)

    def cut_errors(self, block: Block) -> Tensor | None:
        """The same of its errors, and all of them for the whole network."""
        if self.errors is None or block.name == WHOLE:
            return self.errors
        return self._part(self.errors, block)

    def _part(self, matrix: Tensor, block: Block) -> Tensor:
        device = matrix.device
        index = torch.cat([torch.arange(*self.slices[n], device=device) for n in block.parameters])
        return matrix[index][:, index]

    def watched(self, product: Matvec, name: str, step: tuple[int, int], total: int) -> Matvec:
        """``product``, telling how many of the ``total`` are done.

        Args:
            product: To watch; with several vectors by rows it counts as many.
            name: Of the row.
            step: Of the row in the order of work, from 1, and the number of rows.
            total: Products, about.
        """
        done = 0
        reported = 0.0

        def counted(vector: Vector) -> Vector:
            nonlocal done, reported
            result = product(vector)
            done += len(vector) if vector.ndim > 1 else 1
            now = time.perf_counter()
            if now - reported >= REPORT_EVERY or done >= total:
                reported = now
                self.report(Event(name, *step, done, total))
            return result

        return counted
