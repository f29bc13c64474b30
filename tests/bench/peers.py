"""hessdiag and its peers behind one interface: a product, λ_max, the trace and the density."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from hessdiag.curvature.engines import make_engine
from hessdiag.curvature.objective import Objective, flatten, only, unflatten
from hessdiag_probes import generator, hutchinson, lanczos, sphere, stochastic_quadrature

SURE = 1e-3  # wanted of λ_max, and the probability that our certificate fails
STANDARD_ERROR = 0.02  # wanted of the trace
DEFLATION, LEAST_PROBES, MOST_PROBES = 20, 10, 4000
PRODUCTS = 80  # of a row of analyze above the exact limit, which the engine is chosen for
MOST_STEPS, MOST_ITERATIONS = 200, 400
SETTINGS = tuple(10.0 ** (-k / 2) for k in range(6, 19))  # of tolerances, the loosest first


@dataclass(frozen=True)
class Subject:
    """A network on loan and its batches of (input, target)."""

    model: nn.Module
    objective: Objective
    parameters: list[nn.Parameter]
    batches: Sequence[tuple[Tensor, Tensor]]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)


@dataclass
class Answer:
    """A number, what it cost, and what its method says of its error.

    Attributes:
        value: None where the method has none.
        products: Over all data.
        high: What the method certifies as an upper bound, or None.
        share: Of the wanted work that was done; the rest is extrapolated.
    """

    value: float | None
    products: int
    high: float | None = None
    share: float = 1.0


@dataclass
class Density:
    """Nodes and weights of the measure that stands for the spectrum."""

    node: np.ndarray
    weight: np.ndarray
    products: int


@dataclass
class Peer:
    """A library on a subject.

    Attributes:
        label: Its name and release, and what it computes products with.
        product: ``v -> H v`` over all data, flat.
        settings: Of ``top``: tolerances to try, the loosest first.
    """

    subject: Subject
    label: str = field(init=False, default="")
    settings: tuple[float, ...] = field(init=False, default=SETTINGS)

    def product(self, vector: Tensor) -> Tensor:
        raise NotImplementedError

    def top(self, setting: float) -> Answer:
        """λ_max."""
        raise NotImplementedError

    def trace(self, probes: int) -> Answer:
        """By Rademacher probes, as many as given."""
        raise NotImplementedError

    def density(self, probes: int, steps: int, ends: tuple[float, float]) -> Density:
        """By stochastic Lanczos quadrature."""
        raise NotImplementedError


class Ours(Peer):
    """Certified: its only setting is the wanted width of the interval."""

    settings = (SURE,)

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.engine = make_engine(
            subject.objective, subject.parameters, curvature="hessian", products=PRODUCTS
        )
        self.label = f"hessdiag ({self.engine.name})"
        self.seed = itertools.count()

    def product(self, vector: Tensor) -> Tensor:
        return self.engine(vector)

    def _start(self) -> Tensor:
        return sphere(self.subject.size, generator=generator(next(self.seed), "bench"))

    def top(self, setting: float) -> Answer:
        def certain(ritz: Any) -> bool:
            value = float(ritz.value[-1])
            return ritz.ends(SURE)[1] - value <= setting * value

        run = lanczos(
            self.engine, self._start(), min(MOST_STEPS, self.subject.size), converged=certain
        )
        ritz = run.ritz()
        return Answer(float(ritz.value[-1]), run.matvecs, high=ritz.ends(SURE)[1])

    def trace(self, probes: int) -> Answer:
        """Until its own standard error is small enough, whatever ``probes`` says."""
        run = lanczos(self.engine, self._start(), min(DEFLATION, self.subject.size))
        known = float(run.diagonal.sum())
        samples: list[float] = []

        def watched(vector: Tensor) -> Tensor:
            image = self.engine(vector)
            samples.append(float(vector @ image))
            return image

        def enough() -> bool:
            error = float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
            total = abs(known + float(np.mean(samples)))
            return len(samples) >= LEAST_PROBES and error <= STANDARD_ERROR * total

        found = hutchinson(
            watched,
            self.subject.size,
            MOST_PROBES,
            generator=generator(next(self.seed), "probes"),
            deflate=run,
            stop=enough,
        )
        return Answer(found.trace.value, run.matvecs + found.matvecs)

    def density(self, probes: int, steps: int, ends: tuple[float, float]) -> Density:
        found = stochastic_quadrature(
            self.engine,
            self.subject.size,
            probes,
            steps,
            generator=generator(next(self.seed), "density"),
        )
        return Density(found.rule.node.numpy(), found.rule.weight.numpy(), found.matvecs)


class OursJoined(Ours):
    """On all rows as one batch, as ``--batch-size`` joins them; only its product is measured."""

    def __init__(self, subject: Subject) -> None:
        objective = subject.objective
        rows = tuple(torch.cat(parts) for parts in zip(*subject.batches, strict=True))
        joined = replace(objective.batches, items=(rows,), shares=(1.0,))
        super().__init__(replace(subject, objective=replace(objective, batches=joined)))
        self.label += ", all rows as one batch"


class PyHessian(Peer):
    """Over its loader."""

    def __init__(self, subject: Subject) -> None:
        from pyhessian import hessian

        self.subject = subject
        self.label = f"PyHessian {version('pyhessian')}"
        self.inner = hessian(
            subject.model, nn.CrossEntropyLoss(), dataloader=subject.batches, cuda=False
        )

    def product(self, vector: Tensor) -> Tensor:
        _, image = self.inner.dataloader_hv_product(unflatten(vector, self.subject.parameters))
        return flatten(image)

    def _counted(self) -> list[int]:
        product, counted = self.inner.__class__.dataloader_hv_product, [0]

        def counting(vector: Any) -> Any:
            counted[0] += 1
            return product(self.inner, vector)

        self.inner.dataloader_hv_product = counting
        return counted

    def top(self, setting: float) -> Answer:
        counted = self._counted()
        values, _ = self.inner.eigenvalues(maxIter=MOST_ITERATIONS, tol=setting)
        return Answer(float(values[0]), counted[0])

    def trace(self, probes: int) -> Answer:
        counted = self._counted()
        samples = self.inner.trace(maxIter=probes, tol=0.0)
        return Answer(float(np.mean(samples)), counted[0])

    def density(self, probes: int, steps: int, ends: tuple[float, float]) -> Density:
        self.inner.density(iter=steps, n_v=probes)  # raises on any torch that hessdiag runs on
        raise RuntimeError("density() returned, so this benchmark should read what it says")


class PyHessianJoined(PyHessian):
    """On all rows as one batch, whose gradient graph it keeps; only its product is measured."""

    def __init__(self, subject: Subject) -> None:
        from pyhessian import hessian

        self.subject = subject
        self.label = f"PyHessian {version('pyhessian')}, all rows as one batch"
        subject.model.zero_grad()  # PyHessian adds its gradient to what it finds there
        rows = tuple(torch.cat(parts) for parts in zip(*subject.batches, strict=True))
        self.inner = hessian(subject.model, nn.CrossEntropyLoss(), data=rows, cuda=False)

    def product(self, vector: Tensor) -> Tensor:
        from pyhessian.utils import hessian_vector_product

        pieces = unflatten(vector, self.subject.parameters)
        return flatten(hessian_vector_product(self.inner.gradsH, self.inner.params, pieces))


class Curvlinops(Peer):
    """Its linear operator, with scipy's eigsh for λ_max."""

    def __init__(self, subject: Subject) -> None:
        from curvlinops import HessianLinearOperator

        self.subject = subject
        self.label = f"curvlinops {version('curvlinops-for-pytorch')}"
        self.inner = HessianLinearOperator(
            subject.model,
            nn.CrossEntropyLoss(),
            subject.parameters,
            subject.batches,
            check_deterministic=False,
        )
        self.settings = (0.3, 0.1, 0.03, 0.01, *SETTINGS)

    def product(self, vector: Tensor) -> Tensor:
        return self.inner @ vector

    def top(self, setting: float) -> Answer:
        counted = [0]

        def product(vector: np.ndarray) -> np.ndarray:
            counted[0] += 1
            return self.product(torch.from_numpy(vector.reshape(-1).copy())).numpy()

        size = self.subject.size
        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        values = eigsh(operator, k=1, which="LA", tol=setting, return_eigenvectors=False)
        return Answer(float(values[0]), counted[0])

    def trace(self, probes: int) -> Answer:
        from curvlinops import hutchinson_trace

        # One by one: all at once would hold every layer's activations for each of them.
        values = [float(hutchinson_trace(self.inner, 1)) for _ in range(probes)]
        return Answer(float(np.mean(values)), probes)

    def xtrace(self, products: int) -> Answer:
        """By XTrace, which needs its vectors all at once."""
        from curvlinops import xtrace

        return Answer(float(xtrace(self.inner, products)), products)

    def density(self, probes: int, steps: int, ends: tuple[float, float]) -> Density:
        from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

        grid, density = lanczos_approximate_spectrum(
            self.inner, steps, num_repeats=probes, boundaries=ends
        )
        weight = density.clamp_min(0).numpy()
        return Density(grid.numpy(), weight / weight.sum(), probes * steps)


class Eigenthings(Peer):
    """Its Lanczos, Hutchinson's trace and its density, where it is installed."""

    def __init__(self, subject: Subject) -> None:
        from hessian_eigenthings import HessianOperator, __version__, supervised_loss

        self.subject = subject
        self.label = f"hessian-eigenthings {__version__}"
        self.inner = HessianOperator(
            subject.model, list(subject.batches), supervised_loss(nn.CrossEntropyLoss())
        )
        self.seed = itertools.count()
        self.settings = (10, 15, 20, 30, 40, 60, 100)

    def product(self, vector: Tensor) -> Tensor:
        return self.inner.matvec(vector).detach()

    def top(self, setting: float) -> Answer:
        """With so many Lanczos steps."""
        from hessian_eigenthings import lanczos as their_lanczos

        found = their_lanczos(
            self.inner, k=1, max_iter=int(setting), which="LA", seed=next(self.seed)
        )
        return Answer(float(found.eigenvalues[0]), int(found.iterations))

    def trace(self, probes: int) -> Answer:
        from hessian_eigenthings import hutchinson as their_hutchinson

        found = their_hutchinson(self.inner, num_samples=probes, seed=next(self.seed))
        return Answer(float(found.estimate), probes)

    def density(self, probes: int, steps: int, ends: tuple[float, float]) -> Density:
        from hessian_eigenthings import spectral_density

        found = spectral_density(
            self.inner, num_runs=probes, lanczos_steps=steps, seed=next(self.seed)
        )
        weight = found.raw_weights.numpy()
        return Density(
            found.raw_eigenvalues.numpy().ravel(),
            (weight / weight.sum(axis=1, keepdims=True)).ravel() / probes,
            probes * steps,
        )


NEEDS = {
    Ours: "hessdiag",
    PyHessian: "pyhessian",
    Curvlinops: "curvlinops",
    Eigenthings: "hessian_eigenthings",
    OursJoined: "hessdiag",
    PyHessianJoined: "pyhessian",
}
"""What each is imported from, in the order of the tables."""


def installed() -> list[type[Peer]]:
    """Those that can be measured here."""
    return [kind for kind, module in NEEDS.items() if find_spec(module) is not None]


def reference_product(subject: Subject) -> Callable[[Tensor], Tensor]:
    """``H v`` by reverse over reverse on kept graphs, written for nothing but being right."""
    parameters = subject.parameters
    rows = sum(len(inputs) for inputs, _ in subject.batches)
    graphs = []
    with only(parameters):
        for inputs, targets in subject.batches:
            loss = nn.functional.cross_entropy(subject.model(inputs), targets)
            gradient = torch.autograd.grad(loss * len(inputs) / rows, parameters, create_graph=True)
            graphs.append(gradient)

    def product(vector: Tensor) -> Tensor:
        pieces = unflatten(vector, parameters)
        total = torch.zeros_like(vector)
        with only(parameters):
            for gradient in graphs:
                parts = torch.autograd.grad(gradient, parameters, pieces, retain_graph=True)
                total += flatten(parts)
        return total

    return product
