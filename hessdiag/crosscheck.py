"""Top eigenvalue and trace of a whole network by PyHessian, beside our certified ones."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.agreement import Crosscheck, Entry, deviation_of
from hessdiag.analysis import pick_device
from hessdiag.blocks import WHOLE, Block, find_blocks
from hessdiag.checkpoint import Checkpoint, match_weights, read_checkpoint
from hessdiag.conditioning.bounds import never_exact
from hessdiag.curvature.loan import bare, exact_arithmetic, has_batch_statistics, loan
from hessdiag.curvature.objective import Objective, only
from hessdiag.data import leaves, load_batches, row_count
from hessdiag.errors import MissingExtra
from hessdiag.network import Network, Row
from hessdiag.opened import Opened
from hessdiag.options import Options, make_options
from hessdiag.progress import Event, Report
from hessdiag.quantity import Quantity
from hessdiag.run import Value
from hessdiag.selfcheck import run_selfchecks
from hessdiag.solve import Budget, Problem, solve_matrix_free
from hessdiag.task import Task, as_loss, units
from hessdiag_probes.power import power
from hessdiag_probes.random import generator, sphere
from hessdiag_probes.types import CountedMatvec, Matvec

STEPS = 100
"""Products that power iteration and Lanczos may take, as many as PyHessian's ``maxIter``."""
QUANTITIES = ("lambda_max", "trace")
ALIKE = 1e-12  # shares of batches that differ by less are the same


def crosscheck(
    task: Task,
    checkpoint: str | Path | Checkpoint | None = None,
    *,
    trust: bool = False,
    report: Report | None = None,
    **options: Any,
) -> Crosscheck:
    """Top eigenvalue and trace of the whole network: PyHessian's, and ours with certificates.

    Args:
        task: Model, data and loss.
        checkpoint: Whose weights are loaded; None takes the model's own.
        trust: Allow a checkpoint that is a pickled module, which runs code when it is loaded.
        report: Called with an :class:`Event` before each method.
        **options: Those of ``analyze`` that concern one block; ``steps`` is 100 by default, as
            PyHessian's ``maxIter`` is.
    Returns:
        The entries. A method that raised is one that says so. The model is bit for bit what it was.
    Raises:
        MissingExtra: PyHessian is not installed.
        HessdiagError: As ``analyze`` would.
    Cost:
        PyHessian's products, at most 200; up to ``steps`` of our power iteration, ``steps`` for
        λ_max and ``steps`` + ``probes`` for the trace; n where the network is assembled.
    """
    peer = _pyhessian()
    chosen = make_options(**({"steps": STEPS} | options))
    if isinstance(checkpoint, (str, Path)):
        checkpoint = read_checkpoint(checkpoint, trust=trust)
    model = bare(task.model)
    block = find_blocks(model, (WHOLE,))[0]
    device = pick_device(chosen.device)
    dtype = torch.float64 if chosen.dtype == "float64" else torch.float32
    with (
        loan([model], mode=task.mode, dtype=dtype, device=device),
        exact_arithmetic([model], dtype),
    ):
        notes = [*task.notices]
        if checkpoint is not None:
            matched = match_weights(checkpoint, model)
            notes += [*checkpoint.notices, *matched.notices]
            model.load_state_dict(matched.weights, strict=False)
        batches = load_batches(
            task.data,
            units(task),
            dtype=dtype,
            device=device,
            batch_size=chosen.batch_size,
            max_examples=chosen.max_examples,
            seed=chosen.seed,
            order_matters=has_batch_statistics(model),
        )
        notes += batches.notices
        objective = Objective(model, as_loss(task), batches)
        bench = _Bench(objective, block, chosen, report or (lambda _event: None))
        certified = bench.ours()
        others = [*bench.pyhessian(peer), bench.power()]
        reference = {entry.quantity: entry.found for entry in certified}
        entries = tuple(
            replace(entry, deviation=deviation_of(entry.found, reference[quantity]))
            for quantity in QUANTITIES
            for entry in (*others, *certified)
            if entry.quantity == quantity
        )
        notes += [*bench.notices, *_weighing(objective, chosen)]
    return Crosscheck(
        task=task.name or type(model).__name__,
        checkpoint=checkpoint.path.name if checkpoint is not None else None,
        size=block.size,
        device=str(device),
        engine=bench.engine,
        options=chosen,
        setup_seconds=bench.setup,
        entries=entries,
        notes=tuple(notes),
    )


class _Bench:
    """The methods on one network on loan."""

    def __init__(
        self, objective: Objective, block: Block, options: Options, report: Report
    ) -> None:
        self.objective, self.options, self.report = objective, options, report
        self.block = block
        network = Network(objective, options, report)
        self.network = network
        self.parameters = network.select(block.parameters)
        self.device = self.parameters[0].device
        self.opened = Opened(network, block, Row(WHOLE, (1, 1)))
        report(Event(message="self-checks"))
        started = self._now()
        checks = run_selfchecks(
            objective, self.parameters, curvature=options.curvature, seed=options.seed
        )
        network.prepare(objective.value(), checks, [])
        # Kept, since assembling the matrix puts another product in its place.
        self.product: Matvec = self.opened.product
        self.problem: Problem = self.opened.problem
        self.setup = self._now() - started
        self.engine = self.opened.hessian.engine_name
        self.notices = list(checks.notices)

    def ours(self) -> list[Entry]:
        """By Lanczos and probes; and by all eigenvalues where the network can be assembled."""
        wanted = replace(self.network.budget(self.block), forecast=0, density=0)
        found = [
            self._matrix_free("lambda_max", replace(wanted, probes=0)),
            self._matrix_free("trace", wanted),
        ]
        if self.opened.exact:
            self.report(Event(message="hessdiag: all eigenvalues"))
            started = self._now()
            solved, products = self.opened.solve()
            seconds = self._now() - started
            self._look_below(solved.values)
            for quantity in QUANTITIES:
                value = _quantity(solved.values, quantity)
                found.append(Entry(quantity, "hessdiag, all eigenvalues", value, products, seconds))
        return found

    def _matrix_free(self, quantity: str, budget: Budget) -> Entry:
        how = "power iteration, both ends" if budget.power else "Lanczos"
        method = f"hessdiag, {how}" + (" and probes" if quantity == "trace" else "")
        self.report(Event(message=method))
        started = self._now()
        solved, products = solve_matrix_free(self.product, self.problem, budget)
        seconds = self._now() - started
        values = never_exact(solved.values) if self.network.narrow else solved.values
        if quantity == "lambda_max" and not self.opened.exact:
            self._look_below(values)
        return Entry(quantity, method, _quantity(values, quantity), products, seconds)

    def _look_below(self, values: dict[str, Value]) -> None:
        top, bottom = _quantity(values, "lambda_max"), _quantity(values, "lambda_min")
        if top.high is not None and bottom.high is not None and -bottom.high > top.high:
            self.notices.append(
                f"the eigenvalue of largest size is λ_min = {bottom.value:.4g}: power iteration "
                "finds that one and not λ_max, PyHessian's too"
            )

    def power(self) -> Entry:
        """By plain power iteration, which is what PyHessian does, ended by its residual."""
        options = self.options
        self.report(Event(message="hessdiag, power iteration"))
        product = CountedMatvec(self.product)
        like = self.problem.gradient
        start = sphere(
            like.numel(),
            generator=generator(options.seed, WHOLE, "crosscheck"),
            dtype=like.dtype,
            device=like.device,
        )
        started = self._now()
        found = power(product, start, options.steps, options.tolerance)
        seconds = self._now() - started
        # A Rayleigh quotient lies below λ_max whether or not the iteration has converged.
        slack = 10 * self.problem.noise.block
        value = Quantity(found.value, found.value - slack, None, "lower-bound", 1.0)
        return Entry("lambda_max", "hessdiag, power iteration", value, product.count, seconds)

    def pyhessian(self, peer: Callable[..., Any]) -> list[Entry]:
        """By PyHessian, at its defaults."""
        found = []
        for quantity, call in (("lambda_max", "eigenvalues"), ("trace", "trace")):
            method = f"PyHessian, {call}()"
            if self.options.curvature != "hessian":
                why = "it has no Gauss–Newton products"
                found.append(Entry(quantity, method, Quantity.absent(), 0, 0.0, failure=why))
                continue
            self.report(Event(message=method))
            found.append(self._peer(quantity, method, call, peer))
        return found

    def _peer(self, quantity: str, method: str, call: str, peer: Callable[..., Any]) -> Entry:
        value, failure, products = Quantity.absent(), None, 0
        started = self._now()
        with borrowed(self.objective, self.parameters, self.options.seed) as (model, data):
            try:
                subject = peer(model, _passed_on, dataloader=data, cuda=self.device.type == "cuda")
                count = CountedProducts(subject.dataloader_hv_product)
                subject.dataloader_hv_product = count
                answer = getattr(subject, call)()
                numbers = answer[0][0] if call == "eigenvalues" else sum(answer) / len(answer)
                value, products = Quantity.estimate(float(numbers)), count.count
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
        return Entry(quantity, method, value, products, self._now() - started, failure=failure)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class CountedProducts:
    """PyHessian's product over its loader, counted."""

    def __init__(self, product: Callable[[Any], Any]) -> None:
        self.product = product
        self.count = 0

    def __call__(self, vector: Any) -> Any:
        """As the product itself."""
        self.count += 1
        return self.product(vector)


class _Shim(nn.Module):
    """A model whose output is the task's loss of the batch that its input numbers.

    PyHessian wants ``criterion(model(input), target)`` of pairs of tensors and weighs a batch by
    the rows of its input; so any loss of any batch will do, weighed by the batch's rows.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.lent = objective.model
        self.objective = objective

    def forward(self, numbers: Tensor) -> Tensor:
        """The loss of one batch."""
        return self.objective.evaluate(self.objective.batches.items[int(numbers[0])])

    def train(self, mode: bool = True) -> _Shim:
        """Leave the model in the mode that its task has: PyHessian forces ``eval()``."""
        return self


@contextmanager
def borrowed(
    objective: Objective, parameters: list[nn.Parameter], seed: int
) -> Iterator[tuple[nn.Module, list[tuple[Tensor, Tensor]]]]:
    """A model and a list of batches for PyHessian; nothing of what it leaves behind stays.

    Args:
        objective: On loan, so that its ``.grad`` and the global random states are restored.
        parameters: To be differentiated by.
        seed: Of the global generator, from which PyHessian draws.
    """
    items = objective.batches.items
    data = [
        (torch.full((max(row_count(batch), 1),), index), torch.zeros(1))
        for index, batch in enumerate(items)
    ]
    device = parameters[0].device
    place = torch.cuda.device(device) if device.type == "cuda" else torch.device("cpu")
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings(), only(parameters), place:
            warnings.simplefilter("ignore")  # backward(create_graph=True) warns of a cycle
            yield _Shim(objective), data
    finally:
        for tensor in (*parameters, *(leaf for batch in items for leaf in leaves(batch))):
            tensor.grad = None


def _passed_on(loss: Tensor, _target: Tensor) -> Tensor:
    return loss


def _pyhessian() -> Callable[..., Any]:
    try:
        from pyhessian import hessian
    except ImportError as error:
        raise MissingExtra(
            f"crosscheck compares with PyHessian, which cannot be imported ({error}); "
            "install it: pip install pyhessian"
        ) from error
    return hessian  # type: ignore[no-any-return]


def _quantity(values: dict[str, Value], name: str) -> Quantity:
    found = values[name]
    return found if isinstance(found, Quantity) else Quantity.absent()


def _weighing(objective: Objective, options: Options) -> list[str]:
    """Where PyHessian's mean over batches is not the task's."""
    rows = [row_count(batch) for batch in objective.batches.items]
    wrong = max(
        abs(count / sum(rows) - share)
        for count, share in zip(rows, objective.batches.shares, strict=True)
    )
    if wrong <= ALIKE or options.curvature != "hessian":
        return []
    return [
        "PyHessian weighs batches by rows and this task by what its losses are means of (counted "
        f"targets): shares differ by up to {wrong:.2g}, so PyHessian's matrix is another one"
    ]
