"""The blocks' rows: computed one after the other, and kept as soon as they are there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hessdiag.blocks import WHOLE, Block
from hessdiag.errors import HessdiagError, OutOfTime, is_out_of_memory
from hessdiag.network import Network
from hessdiag.options import Options
from hessdiag.quantity import Quantity
from hessdiag.run import BlockResult, Run, Value, VariantResult
from hessdiag.solve import Solved, skipped_fields
from hessdiag.solve.problem import CUT_SHORT
from hessdiag.store.journal import Journal
from hessdiag.store.parts import Finished

# What a block may die of without taking the others along.
FAILURES = (HessdiagError, ArithmeticError, ValueError, RuntimeError, MemoryError)
VARIANT = "raw"

FinishedRows = Mapping[tuple[str, str], Finished]
"""By (block, variant)."""


def finished_rows(run: Run) -> dict[tuple[str, str], Finished]:
    """The rows of a stored run that hold numbers: neither failed nor without anything to do."""
    record = run.provenance.environment
    limit = run.provenance.config.get("max_seconds")
    return {
        (block.name, variant): Finished(
            BlockResult(block.name, block.parameters, {variant: result}),
            variant,
            record.get("engine", {}).get(block.name),
            record.get("seconds", {}).get(block.name, 0.0),
            limit,
        )
        for block in run.blocks
        for variant, result in block.variants.items()
        if result["skipped"] is None
    }


def still_good(done: Finished, options: Options) -> bool:
    """Whether a command with ``options`` may take a row as it is.

    One that ``--max-seconds`` cut short is done again by a command that allows more.
    """
    if CUT_SHORT not in done.result["notes"]:
        return True
    if options.max_seconds is None or done.max_seconds is None:
        return False
    return options.max_seconds <= done.max_seconds


def is_complete(run: Run, options: Options) -> bool:
    """Whether a stored run of the same fingerprint leaves nothing to do."""
    return not run.provenance.environment.get("failed") and all(
        still_good(done, options) for done in finished_rows(run).values()
    )


@dataclass
class Rows:
    """The rows of one run in the making.

    Attributes:
        network: Prepared; its ``deadline`` ends the work.
        finished: Rows that are taken as they are.
        journal: Keeps every row that is new; or None.
        engines: By block, what computed its products; filled on the way.
        timings: By block, seconds; filled on the way.
        failed: Blocks that apply and have no numbers: they raised, or were not begun in time.
    """

    network: Network
    finished: FinishedRows
    journal: Journal | None
    engines: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def compute(self, blocks: Sequence[Block]) -> tuple[BlockResult, ...]:
        """All rows; the whole network goes first, for its matrix serves all its layers.

        Args:
            blocks: In the order of the table.
        Raises:
            OutOfResources: The journal's disk is full.
            StoreError: The journal cannot be written, or the matrix in it is damaged.
        """
        order = sorted(range(len(blocks)), key=lambda i: (blocks[i].name != WHOLE, i))
        done: dict[int, VariantResult] = {}
        for position, index in enumerate(order):
            block = blocks[index]
            known = self.finished.get((block.name, VARIANT))
            if block.skipped is not None:
                done[index] = self._empty(block, block.skipped)
            elif known is not None:
                done[index] = self._known(block, known)
            else:
                done[index] = self._new(block, position + 1, len(blocks))
            if block.name == WHOLE:
                self._share_matrix(blocks, block, new=known is None)
            if self.journal is not None and known is None and done[index]["skipped"] is None:
                self.journal.add(self._finished(block, done[index]))
        self.network.matrix = None
        return tuple(
            BlockResult(block.name, block.parameters, {VARIANT: done[index]})
            for index, block in enumerate(blocks)
        )

    def _known(self, block: Block, known: Finished) -> VariantResult:
        self.timings[block.name] = known.seconds
        if known.engine is not None:
            self.engines[block.name] = known.engine
        return known.result

    def _share_matrix(self, blocks: Sequence[Block], whole: Block, *, new: bool) -> None:
        """Keep the assembled matrix while layers are left, or take it back.

        It is kept before the row of ``whole`` is: a layer that is assembled again differs by
        rounding.
        """
        left = any(
            block.skipped is None and (block.name, VARIANT) not in self.finished
            for block in blocks
            if block.name != WHOLE
        )
        if self.journal is None or not left:
            return
        if not new:
            matrix = self.journal.load_matrix(whole.size)
            if matrix is not None:
                device = self.network.named[whole.parameters[0]].device
                self.network.take_matrix(whole, torch.from_numpy(matrix).to(device))
        elif self.network.matrix is not None and whole.name not in self.failed:
            self.journal.keep_matrix(self.network.matrix.cpu().numpy())

    def _new(self, block: Block, index: int, count: int) -> VariantResult:
        deadline = self.network.deadline
        if deadline is not None and time.monotonic() >= deadline:
            limit = self.network.options.max_seconds
            return self._failed(block, f"not begun within --max-seconds {limit:g}")
        started = time.perf_counter()
        try:
            solved, products = self.network.solve(block, index, count, self.engines)
            solved = self._compared(block, solved)
        except OutOfTime as error:
            return self._failed(block, str(error))
        except FAILURES as error:
            reason = " ".join(f"failed: {type(error).__name__}: {error}".split())
            if is_out_of_memory(error):
                reason = "failed: out of memory; lower --exact-limit or --memory-budget"
            return self._failed(block, reason)
        finally:
            self.timings[block.name] = time.perf_counter() - started
        cost: dict[str, Value] = {"products": products, "seconds": self.timings[block.name]}
        return VariantResult(
            self._fixed(block) | solved.values | cost, solved.spectrum, solved.rows
        )

    def _compared(self, block: Block, solved: Solved) -> Solved:
        """``solved`` with the ratio of the halves of the data, which costs no row its numbers."""
        notes = [str(note) for note in solved.values["notes"]]  # type: ignore[union-attr]
        if CUT_SHORT in notes:
            ratio = Quantity.unresolved() if self.network.halves else Quantity.absent()
        else:
            try:
                ratio = self.network.half_ratio(block, solved)
            except FAILURES as error:
                ratio = Quantity.unresolved()
                notes.append(f"its half_ratio failed: {' '.join(str(error).split())}")
        values = solved.values | {"half_ratio": ratio, "notes": notes}
        return Solved(values, solved.spectrum, solved.rows)

    def _finished(self, block: Block, result: VariantResult) -> Finished:
        return Finished(
            BlockResult(block.name, block.parameters, {VARIANT: result}),
            VARIANT,
            self.engines.get(block.name),
            self.timings[block.name],
            self.network.options.max_seconds,
        )

    def _failed(self, block: Block, reason: str) -> VariantResult:
        self.failed.append(block.name)
        return self._empty(block, reason)

    def _empty(self, block: Block, reason: str) -> VariantResult:
        """A row without numbers."""
        return VariantResult(skipped_fields() | self._fixed(block) | {"skipped": reason})

    def _fixed(self, block: Block) -> dict[str, Value]:
        """The fields that no computation changes."""
        return {
            "size": block.size,
            "skipped": None,
            "same_function": True,
            "dtype": self.network.options.dtype,
            "products": 0,
            "seconds": 0.0,
            "half_ratio": Quantity.absent(),
            "diagonal_gap": Quantity.absent(),
            "source": None,
            "optimizer_class": None,
            "zero_state": 0,
            "symmetries": [],
            "off_diagonality": None,
        }
