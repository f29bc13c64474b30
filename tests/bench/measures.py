"""What is measured of each library on one network, accuracy beside time."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peers import (
    SETTINGS,
    STANDARD_ERROR,
    SURE,
    Curvlinops,
    Ours,
    OursJoined,
    Peer,
    PyHessian,
    PyHessianJoined,
    Subject,
    installed,
    reference_product,
)
from scipy.stats import wasserstein_distance
from torch import Tensor

from hessdiag import Task
from hessdiag.curvature.loan import exact_arithmetic, loan
from hessdiag.curvature.objective import Objective, only
from hessdiag.data import load_batches
from hessdiag.peak import PeakMemory
from hessdiag.task import as_loss, units
from hessdiag_probes import generator, hutchinson, lanczos, rademacher, sphere

DENSE = 3000  # parameters up to which the reference is the whole matrix
REFERENCE_STEPS, REFERENCE_PROBES = 60, 16
STARTS, ITERATIONS = 1000, 400
LARGE_SEEDS, LARGE_ITERATIONS = 2, 100
SETTLED = 1e-5  # relative change in a step after which a right path is followed no further
XTRACE = (10, 20, 40, 80, 160, 320)
SLACK = 1e-6  # relative, of the reference's own λ_max, a Ritz value too
CPU = torch.device("cpu")

Timed = tuple[float, Any]
"""Seconds, and what was returned; or the words of an error in its place."""


@dataclass(frozen=True)
class Truth:
    """What is known of the Hessian by the reference product.

    Attributes:
        ends: The smallest and the largest eigenvalue.
        trace: With ``trace_error``, its standard error; 0 where the matrix is known.
        variance: Of one Rademacher probe of the trace.
        matrix: The Hessian, where it is small.
        spectrum: All eigenvalues, where it is small.
    """

    product: Callable[[Tensor], Tensor]
    ends: tuple[float, float]
    trace: float
    trace_error: float
    variance: float
    matrix: Tensor | None = None
    spectrum: np.ndarray | None = None

    @property
    def top(self) -> float:
        return self.ends[1]

    @property
    def probes(self) -> int:
        """Rademacher probes to the wanted standard error, at least 2."""
        return max(math.ceil(self.variance / (STANDARD_ERROR * self.trace) ** 2), 2)


def measure(
    task: Task, report: Callable[[str], None], *, clock: Callable[[], float], quick: bool
) -> dict[str, Any]:
    """Everything about one network, in plain values; ``clock`` tells seconds."""
    model = task.model
    with (
        loan([model], mode="eval", dtype=torch.float64, device=CPU),
        exact_arithmetic([model], torch.float64),
    ):
        batches = load_batches(task.data, units(task), dtype=torch.float64, device=CPU)
        objective = Objective(model, as_loss(task), batches)
        subject = Subject(model, objective, list(model.parameters()), batches.items)
        return _Case(subject, report, clock, quick=quick).rows()


class _Case:
    def __init__(
        self,
        subject: Subject,
        report: Callable[[str], None],
        clock: Callable[[], float],
        *,
        quick: bool,
    ) -> None:
        self.subject, self.report, self.clock, self.quick = subject, report, clock, quick
        self.small = subject.size <= DENSE
        self.memory: dict[str, int] = {}
        self.build: dict[str, float] = {}
        self.peers: dict[str, Peer] = {}
        for kind in installed():
            self._open(kind)
        report("reference")
        self.truth = find_truth(subject)

    def _open(self, kind: type[Peer]) -> None:
        """Make a library's operator: once for its memory, then again for its time."""
        vector = torch.ones(self.subject.size, dtype=torch.float64)
        for attempt in range(2):
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # not every C library has it
                ctypes.CDLL(None).malloc_trim(0)
            peak = PeakMemory(CPU)
            peak.begin()
            started = self.clock()
            with only(self.subject.parameters):
                peer = kind(self.subject)
            seconds = self.clock() - started
            with only(self.subject.parameters):
                peer.product(vector)
                peer.product(vector)
            if attempt == 0:
                rise = peak.rise()
                del peer
                continue
            name = kind.__name__
            self.peers[name], self.build[name] = peer, seconds
            self.memory[name] = max(rise, 0)

    def rows(self) -> dict[str, Any]:
        """A row per library, and what they share."""
        products = self._products()
        gradient, found = products.pop("gradient")[0], {}
        tops, traces, densities = self._tops(), self._traces(), self._densities()
        for name, peer in self.peers.items():
            seconds, error = products[name]
            found[name] = {
                "label": peer.label,
                "build_seconds": self.build[name],
                "peak_mib": self.memory[name] / 2**20,
                "product": _cost(seconds, gradient, error),
                "lambda_max": tops.get(name),
                "trace": traces.get(name),
                "density": densities.get(name),
            }
        truth = self.truth
        return {
            "n": self.subject.size,
            "gradient_seconds": gradient,
            "lambda_max": truth.top,
            "lambda_min": truth.ends[0],
            "trace": truth.trace,
            "trace_error": truth.trace_error,
            "rademacher_probes": truth.probes,
            "stops": self.stops,
            "libraries": found,
        }

    def _products(self) -> dict[str, tuple[float, float]]:
        self.report("products")
        subject = self.subject
        vector = sphere(subject.size, generator=generator(7, "bench"))
        right = self.truth.product(vector)
        calls: dict[str, Callable[[], Any]] = {
            "gradient": lambda: subject.objective.gradient(subject.parameters)
        }
        for name, peer in self.peers.items():
            calls[name] = lambda p=peer: p.product(vector)
        timed = self._interleaved(calls, least=3 if self.quick else 7, seconds=4)
        return {
            name: (seconds, math.nan if name == "gradient" else _away(image, right))
            for name, (seconds, image) in timed.items()
        }

    def _tops(self) -> dict[str, Any]:
        self.report("λ_max")
        self.stops = _stops(self.truth, self.subject.size, small=self.small)
        chosen, first, found = {}, {}, {}
        for name, peer in self._measured().items():
            settings = peer.settings
            if isinstance(peer, PyHessian):
                right = [float(t) for t, stop in self.stops.items() if stop["right"]]
                settings = tuple(t for t in SETTINGS if right and t <= max(right))
            for setting in settings:
                with only(self.subject.parameters):
                    started = self.clock()
                    answer = peer.top(setting)
                    first[name] = self.clock() - started
                if abs(answer.value - self.truth.top) <= SURE * abs(self.truth.top):
                    chosen[name] = setting
                    break
            else:
                tried = ITERATIONS if self.small else LARGE_ITERATIONS
                found[name] = {"failure": "not within 1e-3 at any setting", "products": tried}
        calls = {
            name: (lambda p=self.peers[name], s=setting: p.top(s))
            for name, setting in chosen.items()
        }
        for name, (seconds, answer) in self._interleaved(calls, least=1, seconds=3).items():
            found[name] = {
                "seconds": min(seconds, first[name]),
                "products": answer.products,
                "setting": chosen[name],
                "error": abs(answer.value - self.truth.top) / abs(self.truth.top),
                "certified": answer.high is not None
                and answer.value <= self.truth.top * (1 + SLACK)
                and self.truth.top <= answer.high,
                "width": None if answer.high is None else answer.high / answer.value - 1,
            }
        return found

    def _traces(self) -> dict[str, Any]:
        self.report("trace")
        probes = self.truth.probes
        most = min(probes, (20 if self.quick else 100) if self.small else 4)
        calls = {name: (lambda p=peer: p.trace(most)) for name, peer in self._measured().items()}
        done = self._interleaved(calls, least=1 if self.quick or not self.small else 2, seconds=2)
        found = {}
        for name, (seconds, answer) in done.items():
            share = 1.0 if isinstance(self.peers[name], Ours) else most / probes
            found[name] = {
                "seconds": seconds / share,
                "products": answer.products if share == 1.0 else probes,
                "extrapolated": share < 1,
                "error": abs(answer.value / self.truth.trace - 1) if share == 1.0 else None,
            }
        enough = self._xtrace()
        peer = self.peers.get("Curvlinops")
        if isinstance(peer, Curvlinops) and enough is not None:
            timed = self._interleaved({"xtrace": lambda: peer.xtrace(enough)}, least=1, seconds=2)
            seconds, answer = timed["xtrace"]
            if seconds < found["Curvlinops"]["seconds"]:
                found["Curvlinops"] = {
                    "seconds": seconds,
                    "products": enough,
                    "extrapolated": False,
                    "error": abs(answer.value / self.truth.trace - 1),
                    "method": "xtrace",
                }
        return found

    def _xtrace(self) -> int | None:
        """Products with which XTrace has the wanted error, by trials on the whole matrix."""
        matrix = self.truth.matrix
        if matrix is None or "Curvlinops" not in self.peers:
            return None
        from curvlinops import xtrace

        for products in XTRACE:
            values = [float(xtrace(matrix, products)) for _ in range(10)]
            error = math.sqrt(np.mean((np.array(values) / self.truth.trace - 1) ** 2))
            if error <= STANDARD_ERROR:
                return products
        return None

    def _densities(self) -> dict[str, Any]:
        self.report("density")
        probes, steps = (5, 40) if self.small else (1, 12)
        if self.quick:
            probes, steps = 1, 10
        low, high = self.truth.ends
        found: dict[str, Any] = {}
        calls = {}
        for name, peer in self._measured().items():
            if isinstance(peer, PyHessian):
                try:
                    with only(self.subject.parameters):
                        peer.density(1, 2, (low, high))
                except Exception as error:
                    words = str(error).split(". ", maxsplit=1)[0].strip()
                    found[name] = {"failure": f"{type(error).__name__}: {words}"[:90]}
                continue
            calls[name] = lambda p=peer: p.density(probes, steps, (low, high))
        for name, (seconds, density) in self._interleaved(calls, least=1, seconds=1).items():
            distance = None
            if self.truth.spectrum is not None:
                distance = wasserstein_distance(
                    self.truth.spectrum, density.node, v_weights=density.weight
                ) / (high - low)
            found[name] = {
                "seconds": seconds,
                "products": density.products,
                "wasserstein": distance,
            }
        return found

    def _measured(self) -> dict[str, Peer]:
        """All but what only its product is measured of."""
        joined = (OursJoined, PyHessianJoined)
        return {n: p for n, p in self.peers.items() if not isinstance(p, joined)}

    def _interleaved(
        self, calls: Mapping[str, Callable[[], Any]], *, least: int, seconds: float
    ) -> dict[str, Timed]:
        """The best time of each, in turns A B A B; the last answer."""
        best: dict[str, Timed] = {}
        spent, rounds = 0.0, 0
        while rounds < least or (spent < seconds and rounds < 10 * least):
            for name, call in calls.items():
                with only(self.subject.parameters):
                    started = self.clock()
                    answer = call()
                    taken = self.clock() - started
                spent += taken
                best[name] = (min(taken, best.get(name, (math.inf, None))[0]), answer)
            rounds += 1
            if self.quick and spent > seconds:
                break
        return best


def find_truth(subject: Subject) -> Truth:
    """Ends, trace and its variance by a product of its own."""
    product = reference_product(subject)
    size = subject.size
    if size <= DENSE:
        eye = torch.eye(size, dtype=torch.float64)
        matrix = torch.stack([product(row) for row in eye])
        matrix = (matrix + matrix.T) / 2
        spectrum = torch.linalg.eigvalsh(matrix).numpy()
        diagonal = matrix.diagonal()
        variance = 2 * float(matrix.square().sum() - diagonal.square().sum())
        ends = (float(spectrum[0]), float(spectrum[-1]))
        return Truth(product, ends, float(diagonal.sum()), 0.0, variance, matrix, spectrum)

    def settled(ritz: Any) -> bool:
        return float(ritz.bound[-1]) <= 1e-4 * float(ritz.value[-1])  # its square in the value

    start = sphere(size, generator=generator(1, "truth"))
    run = lanczos(product, start, REFERENCE_STEPS, converged=settled)
    ritz = run.ritz().value
    found = hutchinson(
        product, size, REFERENCE_PROBES, generator=generator(2, "truth"), deflate=run
    )
    source = generator(3, "truth")
    probes = [rademacher(size, generator=source) for _ in range(REFERENCE_PROBES)]
    variance = float(np.var([float(probe @ product(probe)) for probe in probes], ddof=1))
    ends = (float(ritz[0]), float(ritz[-1]))
    return Truth(product, ends, found.trace.value, found.trace.stderr, variance)


def _stops(truth: Truth, size: int, *, small: bool) -> dict[str, dict[str, Any]]:
    """By tolerance: after how many products PyHessian's rule stops, and whether it is then right.

    A user cannot know which start is lucky. Where all eigenvalues are known, the rule is right if
    it is from all but a thousandth of a thousand starts, which is what our certificate claims; else
    if it is from each of a few.
    """
    paths = _all_paths(truth.spectrum) if small and truth.spectrum is not None else None
    if paths is None:
        paths = [_rayleigh(truth, size, seed, LARGE_ITERATIONS) for seed in range(LARGE_SEEDS)]
    found = {}
    for tolerance in SETTINGS:
        counts, errors = [], []
        for path in paths:
            changes = np.abs(np.diff(path)) / (np.abs(path[:-1]) + 1e-6)
            stops = np.flatnonzero(changes < tolerance)
            stop = len(path) - 1 if len(stops) == 0 else int(stops[0])
            counts.append(min(stop + 2, len(path)))
            errors.append(abs(path[stop] - truth.top) / abs(truth.top))
        wrong = np.array(errors) > SURE
        found[f"{tolerance:.3g}"] = {
            "products": float(np.mean(counts)),
            "error": float(np.quantile(errors, 1 - SURE)),
            "starts": len(paths),
            "right": int(wrong.sum()) <= SURE * len(paths),
        }
    return found


def _all_paths(spectrum: np.ndarray) -> list[np.ndarray]:
    """Rayleigh quotients of power iteration from many starts, in the basis of eigenvectors."""
    source = np.random.default_rng(0)
    vectors = source.standard_normal((STARTS, len(spectrum)))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    paths = []
    for _ in range(ITERATIONS):
        images = vectors * spectrum
        paths.append((vectors * images).sum(axis=1))
        vectors = images / (np.linalg.norm(images, axis=1, keepdims=True) + 1e-6)
        if len(paths) > 1 and np.all(np.abs(paths[-1] - paths[-2]) < 1e-9 * np.abs(paths[-2])):
            break
    return list(np.array(paths).T)


def _rayleigh(truth: Truth, size: int, seed: int, most: int) -> np.ndarray:
    """Rayleigh quotients of power iteration, normalised as PyHessian normalises."""
    vector = sphere(size, generator=generator(seed, "power"))
    path: list[float] = []
    while len(path) < most:
        image = truth.product(vector)
        path.append(float(vector @ image))
        vector = image / (float(image.norm()) + 1e-6)
        right = abs(path[-1] - truth.top) <= SURE / 10 * abs(truth.top)
        if right and len(path) > 1 and abs(path[-1] - path[-2]) < SETTLED * abs(path[-2]):
            break
    return np.array(path)


def _cost(seconds: float, gradient: float, error: float) -> dict[str, float]:
    return {"seconds": seconds, "gradients": seconds / gradient, "error": error}


def _away(image: Tensor, right: Tensor) -> float:
    return float((image - right).norm() / right.norm())
