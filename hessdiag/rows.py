"""The rows of a run, (block, variant): computed one by one, and kept as soon as they are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from hessdiag.backoff import begin_with, patiently, relieve
from hessdiag.block_hessian import STRUCTURE
from hessdiag.blocks import WHOLE, Block
from hessdiag.checkpoint.optimizer import OptimizerState
from hessdiag.failures import FAILURES, why
from hessdiag.finished import FinishedRows
from hessdiag.halves import half_ratio
from hessdiag.network import Network, Row
from hessdiag.opened import Opened
from hessdiag.quantity import Quantity
from hessdiag.relief import Relief
from hessdiag.run import BlockResult, Value, VariantResult, row_label
from hessdiag.scenes import scene_of
from hessdiag.solve import Solved, skipped_fields
from hessdiag.solve.problem import CUT_SHORT
from hessdiag.store.journal import Journal
from hessdiag.store.parts import Finished
from hessdiag.symmetries import find_symmetries
from hessdiag.variants.coordinates import identity
from hessdiag.variants.decay import trained_decoupled
from hessdiag.variants.grammar import RAW, Variant
from hessdiag.variants.registry import MAKERS
from hessdiag.variants.scene import Built, Iterates, NotApplicable, check_finite

CONGRUENCE = "congruence"
Computation = Callable[[], tuple[tuple[Solved, int], Built | None]]
"""The row and the products it took, with the coordinates that were made for it."""


@dataclass(frozen=True)
class Stage:
    """One network and its variants.

    Attributes:
        network: On loan, changed where it is to be.
        blocks: Its own, in the order of the table.
        variants: Of this network, bare first.
        same_function: It computes the function of the original.
        notes: What every row of it must say.
    """

    network: Network
    blocks: Sequence[Block]
    variants: Sequence[Variant]
    same_function: bool = True
    notes: tuple[str, ...] = ()


@dataclass
class Rows:
    """The rows of one run in the making.

    Attributes:
        finished: Rows that are taken as they are.
        journal: Keeps every row that is new; or None.
        optimizer: State of the checkpoint, or None.
        iterates: Of the trajectory.
        count: Number of rows, for the progress.
        max_seconds: That the rows are analysed under.
        done: By (block, variant).
        engines: By row, what computed its products; filled on the way.
        engine_timings: By row, seconds per product of the engines that were tried for it.
        timings: By row, seconds; filled on the way.
        symmetry_products: By row, what its symmetries took apart from its ``products``.
        limited: Changes of the network that memory did not allow.
        failed: Rows that apply and have no numbers: they raised, or were not begun in time.
    """

    finished: FinishedRows
    journal: Journal | None
    optimizer: OptimizerState | None = None
    iterates: Iterates = ()
    count: int = 0
    max_seconds: float | None = None
    done: dict[tuple[str, str], VariantResult] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)
    engine_timings: dict[str, dict[str, float]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    symmetry_products: dict[str, int] = field(default_factory=dict)
    limited: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def results(self, blocks: Sequence[Block], variants: Sequence[str]) -> tuple[BlockResult, ...]:
        """The table, from all stages."""
        return tuple(
            BlockResult(
                block.name,
                block.parameters,
                {v: self.done[block.name, v] for v in variants if (block.name, v) in self.done},
            )
            for block in blocks
        )

    def compute(self, stage: Stage) -> None:
        """All rows of a network; ``whole`` goes first, for its matrix serves all its layers.

        Raises:
            OutOfResources: The journal's disk is full.
            StoreError: The journal cannot be written, or the matrix in it is damaged.
        """
        for block in sorted(stage.blocks, key=lambda block: block.name != WHOLE):
            if block.skipped is not None:
                for variant in stage.variants:
                    self._put(block, variant, self._empty(stage, block, block.skipped))
                continue
            if block.name == WHOLE:
                self._take_matrix_back(stage, block)
            try:
                self._block(stage, block)
            finally:
                relieve(stage.network, Relief())
        stage.network.matrix = stage.network.errors = None

    def skip(
        self,
        blocks: Sequence[Block],
        variants: Sequence[Variant],
        reason: str,
        *,
        dtype: str,
        same_function: bool,
        failed: bool = False,
    ) -> None:
        """Rows of a network that cannot be made, and why.

        Args:
            blocks: Of the original.
            variants: Of that network.
            reason: Why not.
            dtype: Of the products.
            same_function: Whether the network would compute the original's.
            failed: It ought to have been possible.
        """
        for block in blocks:
            for variant in variants:
                fields = skipped_fields() | _fixed(block, dtype, same_function=same_function)
                told = {"skipped": block.skipped or " ".join(reason.split())}
                self._put(block, variant, VariantResult(fields | told))
                if failed and block.skipped is None:
                    self.failed.append(row_label(block.name, variant.key))

    def _block(self, stage: Stage, block: Block) -> None:
        """The rows of one block, its network's own first, which the others are compared with."""
        bare = Variant(stage.variants[0].network)
        views = [variant for variant in stage.variants if variant.coordinates != RAW]
        left = [variant for variant in views if not self._known(block, variant)]
        listed = bare in stage.variants
        if listed and self._known(block, bare) and not left:
            return
        begin_with(stage.network, block, self.done.get((block.name, bare.key)))
        row = Row(row_label(block.name, bare.key), self._step())
        opened = Opened(stage.network, block, row)
        if listed and (block.name, bare.key) not in self.done:
            self._row(stage, opened, bare, lambda: (opened.solve(), None))
            if block.name == WHOLE and not stage.network.changed:
                self._keep_matrix(stage)
            self._keep(block, bare)
        elif not listed and left:
            self._row(stage, opened, bare, lambda: (opened.solve(), None))
        own = self.done.get((block.name, bare.key))
        for variant in left:
            if own is None or own["skipped"] is not None:
                reason = "not computed" if own is None else str(own["skipped"])
                self._put(block, variant, self._failed(stage, block, variant, reason))
            else:
                self._row(stage, opened, variant, self._viewed(opened, variant, own))
                self._keep(block, variant)
        if not listed:
            self.done.pop((block.name, bare.key), None)

    def _viewed(self, opened: Opened, variant: Variant, own: VariantResult) -> Computation:
        """How the row of other coordinates is computed."""
        decoupled = trained_decoupled(self.optimizer)

        def compute() -> tuple[tuple[Solved, int], Built]:
            spent = 0
            if own["kappa"].status == "zero" or bool(opened.dead.all()):
                built = Built(identity(opened.position))
            else:
                scene = scene_of(opened, own, self.optimizer, self.iterates, decoupled=decoupled)
                built = MAKERS[variant.coordinates](scene)
                spent = scene.product.count
                check_finite(built, opened.position)
            own_decay = decoupled if built.decoupled is None else built.decoupled
            built = replace(built, decoupled=own_decay)
            row = Row(row_label(opened.block.name, variant.key), self._step())
            solved, products = opened.solve_in(built, own, row, decoupled=own_decay)
            return (solved, products + spent), built

        return compute

    def _row(self, stage: Stage, opened: Opened, variant: Variant, compute: Computation) -> None:
        """One new row, whatever happens."""
        block, network = opened.block, stage.network
        label = row_label(block.name, variant.key)
        if network.late():
            limit = network.options.max_seconds
            reason = f"not begun within --max-seconds {limit:g}"
            self._put(block, variant, self._failed(stage, block, variant, reason))
            return
        started = time.perf_counter()
        try:
            (solved, products), built = patiently(opened, label, compute)
            solved = self._compared(opened, solved, built)
            if built is None:
                solved = self._with_symmetries(opened, solved)
            solved.values["diagonal_gap"] = opened.diagonal_gap(solved, built)
        except NotApplicable as reason:
            empty = self._empty(stage, block, " ".join(str(reason).split()))
            if variant.coordinates == "optimizer" and self.optimizer is not None:
                known = {"optimizer_class": self.optimizer.class_name}
                empty = VariantResult({**empty.values, **known})
            self._put(block, variant, empty)
        except FAILURES as error:
            failed = self._failed(stage, block, variant, why(network.told(error, label)))
            self._put(block, variant, failed)
        else:
            seconds = time.perf_counter() - started
            cost: dict[str, Value] = {"products": products, "seconds": seconds}
            fixed = self._fixed(stage, block)
            values = fixed | _of(built) | solved.values | cost
            told = [str(note) for note in solved.values["notes"]]  # type: ignore[union-attr]
            told += network.relief.notes
            values["notes"] = [*told, *stage.notes, *self._own_rank(stage, block, values)]
            self._put(block, variant, VariantResult(values, solved.spectrum, solved.rows))
        self.timings[label] = time.perf_counter() - started
        # Of an assembled block the engine of its own row made the matrix of all others.
        viewed = variant.coordinates != RAW and opened.exact
        self.engines[label] = CONGRUENCE if viewed else opened.hessian.engine_name
        if opened.hessian.tried and not viewed:
            self.engine_timings[label] = opened.hessian.tried

    def _own_rank(self, stage: Stage, block: Block, values: Mapping[str, Value]) -> list[str]:
        """What a reader of ``kappa_quantile`` must know of a changed network (maths 1.3)."""
        original = self.done.get((block.name, RAW))
        if not stage.network.changed or original is None or original["skipped"] is not None:
            return []
        own, raw = values["n_positive"], original["n_positive"]
        if not isinstance(own, Quantity) or own.value is None or raw.value in (None, own.value):
            return []
        return [
            f"κ at a quantile counts this network's own {own.value:g} positive eigenvalues; "
            f"raw has {raw.value:g}"
        ]

    def _known(self, block: Block, variant: Variant) -> bool:
        """Whether the row was finished before; it is taken over then."""
        known = self.finished.get((block.name, variant.key))
        if known is None:
            return False
        label = row_label(block.name, variant.key)
        self._put(block, variant, known.result)
        self.timings[label] = known.seconds
        if known.engine is not None:
            self.engines[label] = known.engine
        return True

    def _keep(self, block: Block, variant: Variant) -> None:
        result = self.done[block.name, variant.key]
        label = row_label(block.name, variant.key)
        if self.journal is None or label in self.failed:
            return
        self.journal.add(
            Finished(
                BlockResult(block.name, block.parameters, {variant.key: result}),
                variant.key,
                self.engines.get(label),
                self.timings[label],
                self.max_seconds,
            )
        )

    def _take_matrix_back(self, stage: Stage, whole: Block) -> None:
        """What was assembled before an interruption, where its own row is finished."""
        network, bare = stage.network, Variant(stage.variants[0].network)
        finished = (whole.name, bare.key) in self.finished
        if self.journal is None or not finished or not self._left(stage):
            return
        if network.changed or network.differences:
            if network.is_exact(whole):
                # Not kept; assembled again, so that its layers cost no products of their own.
                opened = Opened(network, whole, Row(row_label(whole.name, bare.key), self._step()))
                try:
                    matrix, errors = opened.matrix, opened.hessian.errors
                    network.take_matrix(whole, matrix, errors, sure=network.sure)
                except FAILURES as error:  # its layers are assembled one by one
                    network.told(error, "the matrix of the whole network")
            return
        kept = self.journal.load_matrix(whole.size)
        if kept is not None:
            device = network.named[whole.parameters[0]].device
            sure = STRUCTURE not in (self.finished[whole.name, bare.key].engine or STRUCTURE)
            network.take_matrix(whole, torch.from_numpy(kept).to(device), sure=sure)

    def _keep_matrix(self, stage: Stage) -> None:
        """Keep the assembled matrix while rows are left.

        It is kept before the row of ``whole`` is: a layer that is assembled again differs by
        rounding. One of differences has errors of its own, with which it is assembled again.
        """
        network = stage.network
        matrix = None if network.differences else network.matrix
        if self.journal is not None and matrix is not None and self._left(stage):
            self.journal.keep_matrix(matrix.cpu().numpy())

    def _left(self, stage: Stage) -> bool:
        """Whether rows besides that of ``whole`` itself are not finished."""
        return any(
            (block.name, variant.key) not in self.finished
            for block in stage.blocks
            for variant in stage.variants
            if block.skipped is None
            and (block.name, variant.key) != (WHOLE, Variant(variant.network).key)
        )

    def _compared(self, opened: Opened, solved: Solved, built: Built | None) -> Solved:
        """``solved`` with the ratio of the halves of the data, which costs no row its numbers."""
        notes = [str(note) for note in solved.values["notes"]]  # type: ignore[union-attr]
        if CUT_SHORT in notes:
            ratio = Quantity.unresolved() if opened.network.halves else Quantity.absent()
        else:
            try:
                ratio = half_ratio(opened, solved, built)
            except FAILURES as error:
                ratio = Quantity.unresolved()
                told = opened.network.told(error, f"half_ratio of {opened.row.name}")
                notes.append(f"its half_ratio failed: {' '.join(str(told).split())}")
        notes += [] if built is None else [*built.notes]
        values = solved.values | {"half_ratio": ratio, "notes": notes}
        return Solved(values, solved.spectrum, solved.rows)

    def _with_symmetries(self, opened: Opened, solved: Solved) -> Solved:
        """``solved`` with the symmetries of the loss in this block; they cost it no numbers."""
        scene = scene_of(opened, VariantResult(solved.values, solved.spectrum, solved.rows))
        notes = list(solved.values["notes"])  # type: ignore[arg-type]
        found: list[str] = []
        try:
            symmetries = find_symmetries(scene, opened.loss_gradient, late=opened.network.late)
            found = symmetries.found
            self.symmetry_products[opened.row.name] = symmetries.products
        except Exception as error:  # they are told beside the numbers, and may cost none
            told = opened.network.told(error, f"symmetries of {opened.row.name}")
            notes.append(f"symmetries were not looked for: {' '.join(str(told).split())}")
        values = solved.values | {"symmetries": found, "notes": notes}
        return Solved(values, solved.spectrum, solved.rows)

    def _failed(self, stage: Stage, block: Block, variant: Variant, reason: str) -> VariantResult:
        self.failed.append(row_label(block.name, variant.key))
        return self._empty(stage, block, reason)

    def _empty(self, stage: Stage, block: Block, reason: str) -> VariantResult:
        """A row without numbers."""
        return VariantResult(skipped_fields() | self._fixed(stage, block) | {"skipped": reason})

    def _fixed(self, stage: Stage, block: Block) -> dict[str, Value]:
        return _fixed(block, stage.network.options.dtype, same_function=stage.same_function)

    def _put(self, block: Block, variant: Variant, result: VariantResult) -> None:
        self.done[block.name, variant.key] = result

    def _step(self) -> tuple[int, int]:
        """The place of the next row in the order of work, and the number of rows."""
        place = len(self.done) + 1
        return place, max(self.count, place)


def _fixed(block: Block, dtype: str, *, same_function: bool) -> dict[str, Value]:
    """The fields that no computation changes."""
    return {
        "size": block.size,
        "skipped": None,
        "same_function": same_function,
        "dtype": dtype,
        "products": 0,
        "seconds": 0.0,
        "half_ratio": Quantity.absent(),
        "diagonal_gap": Quantity.absent(),
        "symmetries": [],
        **_of(None),
    }


def _of(built: Built | None) -> dict[str, Value]:
    """The fields that tell what the coordinates were made from."""
    return {
        "source": None if built is None else built.source,
        "optimizer_class": None if built is None else built.optimizer_class,
        "zero_state": 0 if built is None else built.zero_state,
        "off_diagonality": None if built is None else built.off_diagonality,
    }
