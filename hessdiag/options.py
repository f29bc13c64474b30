"""The options of ``analyze``, checked once; the names are those of the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

from hessdiag.errors import OptionError
from hessdiag.shard import parse_shard
from hessdiag.variants.grammar import RAW, parse_variant

Curvature = Literal["hessian", "ggn"]
EngineName = Literal["auto", "kept", "linearized", "recompute", "difference"]
DType = Literal["float64", "float32"]
Eigensolver = Literal["lanczos", "power"]

DEFAULT_VARIANTS = ("raw", "optimizer", "bnp")
EXACT_LIMIT = {"cpu": 4096, "cuda": 16384}
SIZES = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Options:
    """What ``analyze`` may be told. Defaults give a useful answer on a laptop.

    Attributes:
        variants: Views of the problem, ``network``, ``coordinates`` or ``network+coordinates``;
            ``raw`` is always there, first. None takes ``raw,optimizer,bnp``, without
            ``optimizer`` where the checkpoint holds no optimizer state.
        blocks: ``layer``, ``parameter``, ``whole``, ``GLOB`` or ``NAME=GLOB``, in order.
        curvature: ``hessian``, or ``ggn`` for the Gauss–Newton matrix.
        exact_limit: Largest block that is assembled and solved; None takes 4096 on the CPU and
            16384 on CUDA; 0 means never.
        steps: Most products that the ends of the spectrum of a larger block may take.
        probes: Random probes of a larger block, for its trace, diagonal, row and Frobenius norms;
            0 leaves them unresolved.
        density: Estimate the spectral density of larger blocks too, by stochastic Lanczos
            quadrature: kappa_quantile, counts and profile.
        tolerance: Certified width of the intervals of λ_max and λ_min, relative to ‖H‖, at which
            the search for them ends.
        eigensolver: ``lanczos``, or ``power``, which needs some ten vectors of memory instead of
            ``steps``; it also stands in where the Krylov basis does not fit ``memory_budget``.
        max_seconds: Ends early with what is certified by then; None takes the time it takes.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: Of parameters, data and products.
        seed: Of every random vector and of the drawn subset.
        batch_size: Rows per batch; None keeps the task's own batches.
        max_examples: Analyse a subset of this many rows, drawn with the seed.
        weight_decay: λ on the Hessian's diagonal and λp in the gradient, as in torch.
        damping: μ of ``kappa_damped``, absolute; None leaves it out.
        engine: How a product is computed; ``auto`` keeps the graph where memory allows.
        memory_budget: Bytes (or text such as ``8G``) for kept graphs, and as much for a Krylov
            basis; None takes half of what is free.
        iterates: Glob of checkpoints along a training, for cosines and for replaying optimizers.
        reference: Checkpoint of the point p* that the cosines are taken at; None takes the
            analysed one.
        shard: ``I/N``: compute the I-th of N parts of the blocks only, I from 1; ``hessdiag
            merge`` joins the parts. None computes all.
    """

    variants: tuple[str, ...] | None = None
    blocks: tuple[str, ...] = ("layer",)
    curvature: Curvature = "hessian"
    exact_limit: int | None = None
    steps: int = 40
    probes: int = 20
    density: bool = False
    tolerance: float = 1e-3
    eigensolver: Eigensolver = "lanczos"
    max_seconds: float | None = None
    device: str = "auto"
    dtype: DType = "float64"
    seed: int = 0
    batch_size: int | None = None
    max_examples: int | None = None
    weight_decay: float = 0.0
    damping: float | None = None
    engine: EngineName = "auto"
    memory_budget: int | None = None
    iterates: str | None = None
    reference: str | None = None
    shard: str | None = None


def exact_limit(options: Options, device_type: str) -> int:
    """Largest block that is assembled and solved on such a device."""
    return EXACT_LIMIT[device_type] if options.exact_limit is None else options.exact_limit


def make_options(**given: Any) -> Options:
    """Options from keyword arguments; text is split and sizes are parsed.

    Raises:
        OptionError: An unknown name or a value that makes no sense; the message says which.
    """
    known = {field.name for field in fields(Options)}
    for name in given:
        if name not in known:
            raise OptionError(f"analyze has no option {name!r}{_hint(name, known)}")
    for name in ("variants", "blocks"):
        if name in given and not (name == "variants" and given[name] is None):
            given[name] = _listed(name, given[name])
    if given.get("variants") is not None:
        given["variants"] = _variants(given["variants"])
    if given.get("memory_budget") is not None:
        given["memory_budget"] = parse_size(given["memory_budget"])
    if given.get("shard") is not None:
        given["shard"] = str(parse_shard(given["shard"]))
    options = Options(**given)
    _check_choices(options)
    _check_numbers(options)
    return options


def with_variants(options: Options, *, has_state: bool) -> Options:
    """The options with the default variants spelled out.

    Args:
        options: Of the analysis.
        has_state: The checkpoint holds an optimizer's state, usable or not.
    """
    if options.variants is not None:
        return options
    left_out = () if has_state else ("optimizer",)
    return replace(options, variants=tuple(v for v in DEFAULT_VARIANTS if v not in left_out))


def _listed(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise OptionError(f"{name} is {value!r}; it must be text or a list of text")
    items = tuple(part.strip() for part in parts if part.strip())
    if not items:
        example = "raw" if name == "variants" else "layer"
        raise OptionError(f"{name} is empty; give at least one, such as {name}={example!r}")
    return items


def _variants(names: Sequence[str]) -> tuple[str, ...]:
    """Their shortest spellings, each once, ``raw`` first."""
    return tuple(dict.fromkeys([RAW, *(parse_variant(name).key for name in names)]))


def parse_size(value: int | float | str) -> int:
    """Bytes from a number, or from text such as ``512M`` and ``8GiB`` (powers of 1024)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        size = float(value)
    else:
        match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGTB]?)(?:i?B)?\s*", str(value), re.IGNORECASE)
        try:
            size = float(match[1]) * SIZES[match[2].upper()] if match else math.nan
        except ValueError:
            size = math.nan
    if not (math.isfinite(size) and size >= 0):
        raise OptionError(f"memory_budget {value!r} is no size; write it like 512M or 8G")
    return int(size)


def _check_choices(options: Options) -> None:
    choices = (
        ("curvature", get_args(Curvature)),
        ("dtype", get_args(DType)),
        ("engine", get_args(EngineName)),
        ("eigensolver", get_args(Eigensolver)),
    )
    for name, allowed in choices:
        value = getattr(options, name)
        if value not in allowed:
            raise OptionError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    if options.engine == "difference" and options.curvature == "ggn":
        raise OptionError(
            "engine difference takes differences of gradients, which give the Hessian: there are "
            "none for the Gauss–Newton matrix; use --curvature hessian with it, or another engine "
            "for --curvature ggn"
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(options.device)):
        raise OptionError(f"device is {options.device!r}; it must be auto, cpu, cuda or cuda:N")


def _check_numbers(options: Options) -> None:
    whole = (
        *(("exact_limit", 0), ("steps", 1), ("batch_size", 1), ("max_examples", 1), ("seed", 0)),
        ("probes", 0),
    )
    for name, least in whole:
        value = getattr(options, name)
        if value is None and name not in ("steps", "seed", "probes"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionError(f"{name} is {value!r}; it must be a whole number >= {least}")
    for name in ("iterates", "reference"):
        value = getattr(options, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise OptionError(f"{name} is {value!r}; it must be text, a path")
    if options.probes == 1:
        raise OptionError("probes is 1; an error bar takes at least 2 (0 leaves the probes out)")
    if not isinstance(options.density, bool):
        raise OptionError(f"density is {options.density!r}; it must be True or False")
    for name in ("weight_decay", "damping", "tolerance", "max_seconds"):
        value = getattr(options, name)
        if value is None and name in ("damping", "max_seconds"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise OptionError(f"{name} is {value!r}; it must be a number")
        if not (math.isfinite(value) and value >= 0):
            raise OptionError(f"{name} is {value!r}; it must be a finite number >= 0")


def _hint(name: str, known: Sequence[str] | set[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
