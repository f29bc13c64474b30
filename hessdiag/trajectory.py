"""Cosines of the rows of the Hessian to the way from p* to each iterate of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hessdiag.cosine_summary import LARGE
from hessdiag.curvature.objective import Objective, flatten, placed
from hessdiag.errors import InputError, OutOfResources, OutOfTime
from hessdiag.iterates import Iterate
from hessdiag.memory import free_memory
from hessdiag.progress import Event, Report
from hessdiag_probes.types import Matvec, Vector

Array = NDArray[np.float64]
COSINES = ("cosine", "cosine_low", "cosine_high")
NUMBER = 25
"""Bytes per (iterate, parameter): three cosines and a mask."""
COPIES = 3
"""Of the cosines in memory while a run is written and read back."""
NOISE_MARGIN = 10.0
"""What a row's error may be over the one that was measured, as elsewhere."""


def cosines(
    objective: Objective,
    named: Mapping[str, nn.Parameter],
    iterates: Sequence[Iterate],
    *,
    product: Matvec,
    rows: Mapping[str, Array],
    noise: Vector | None = None,
    weight_decay: float = 0.0,
    report: Report | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, NDArray[Any]]:
    """cos∠(h_i, p_t - p*) of every row of the full Hessian at p* and every iterate p_t.

    With e_t = p_t - p* it is (H e_t)_i / (‖h_i‖ |e_t|), so the only uncertainty besides rounding
    is that of the row norm; a row of zeros, and an iterate that is p* itself, have no cosine.

    Args:
        objective: Its model is at p*; for another p* than the model's, see :func:`placed`.
        named: Every trainable parameter by its first name, in the order of the rows.
        iterates: By ascending step, read one at a time.
        product: ``v -> H v`` of the raw loss at p*, without weight decay.
        rows: ``norm, norm_low, norm_high`` of H at p*, (n,) each, weight decay included; 0 for a
            row that is zero or rounding noise.
        noise: Error of each row in a product with entries of about ±1, (n,); None counts the
            roundoff of the dtype alone.
        weight_decay: λ, on the diagonal of H and, times p, in the gradients.
        report: Told of every iterate.
        stop: Whether the time is up, asked before every iterate.
    Returns:
        The arrays of ``/cosines`` (``docs/file-format.md``). The gradients' root mean square is
        over the iterates at which the gradient is finite.
    Raises:
        CheckpointError: An iterate cannot be read, or does not fit; the message names it.
        InputError: There are no iterates, or an iterate is too far away to be measured.
        OutOfTime: ``stop`` said so.
        OutOfResources: The cosines do not fit into memory.
    Cost:
        One product and one gradient per iterate, one gradient more, and 25 bytes per iterate and
        parameter, three times that while the run is written.
    Source:
        Ye (2024), section 3; maths.md 6.1 to 6.3.
    """
    if not iterates:
        raise InputError("there are no iterates, so there are no cosines; give --iterates GLOB")
    parameters = list(named.values())
    here = flatten([p.data for p in parameters]).double()
    size = here.numel()
    _check_memory(len(iterates), size)
    eps = torch.finfo(parameters[0].dtype).eps
    norm, low, high = (
        torch.as_tensor(rows[key]).to(here) for key in ("norm", "norm_low", "norm_high")
    )
    slack = 4 * size**0.5 * eps * norm
    spread = torch.zeros_like(here) if noise is None else NOISE_MARGIN * noise.to(here)
    rest = objective.gradient(parameters).double() + weight_decay * here

    found = _empty(len(iterates), size)
    found["row_norm"], found["row_norm_low"], found["row_norm_high"] = (
        tensor.cpu().numpy() for tensor in (norm, low, high)
    )
    squares, finite = torch.zeros_like(here), 0
    for t, iterate in enumerate(iterates):
        if stop is not None and stop():
            raise OutOfTime(
                f"the time was up after {t} of {len(iterates)} iterates; allow more --max-seconds"
            )
        if report is not None:
            report(Event(message=f"cosines: iterate {t + 1} of {len(iterates)}"))
        values = iterate.load(objective.model)
        there = flatten([values[name] for name in named]).double()
        with placed(parameters, [values[name] for name in named]):
            gradient = objective.gradient(parameters).double() + weight_decay * there
        if bool(torch.isfinite(gradient).all()):
            squares += gradient.square()
            finite += 1
        way = there - here
        distance = float(torch.linalg.vector_norm(way))
        found["step"][t], found["distance"][t] = iterate.step, distance
        if distance == 0:
            continue
        if not np.isfinite(distance):
            raise InputError(
                f"{iterate.path} is too far from p* for the distance to be a number; leave out the "
                "iterates from where the training diverged"
            )
        unit = way / distance
        turned = product(unit.to(parameters[0].dtype)).double() + weight_decay * unit
        turned[norm == 0] = 0.0
        error = spread * float(unit.abs().max()) + slack
        ends = _ends(turned, error, low, high)
        valid = (norm > 0) & torch.isfinite(turned)
        for key, numbers in zip(COSINES, (turned / norm, *ends), strict=True):
            kept = torch.where(valid, numbers.clamp(-1, 1), torch.nan)
            found[key][t] = kept.cpu().numpy()
        found["valid"][t] = valid.cpu().numpy()
        if bool((turned != 0).any()):
            off = torch.linalg.vector_norm((gradient - rest) / distance - turned)
            found["quadratic_residual"][t] = float(off / torch.linalg.vector_norm(turned))
        found["fraction_above"][t] = _share(found["cosine"][t], found["valid"][t])
    found["gradient_rms"] = (squares / max(finite, 1)).sqrt().cpu().numpy()
    return found


def _ends(turned: Vector, error: Vector, low: Vector, high: Vector) -> tuple[Vector, Vector]:
    """What (H e)_i / ‖h_i‖ can be when neither is known exactly; ±inf where ‖h_i‖ may be 0."""
    least, most = turned - error, turned + error
    return (
        torch.where(least >= 0, least / high, least / low),
        torch.where(most > 0, most / low, most / high),
    )


def _share(cosine: Array, valid: NDArray[np.bool_]) -> float:
    count = int(valid.sum())
    return float((np.abs(cosine[valid]) > LARGE).sum() / count) if count else np.nan


def _empty(iterates: int, size: int) -> dict[str, NDArray[Any]]:
    full = (iterates, size)
    missing = {key: np.full(full, np.nan) for key in COSINES}
    per_iterate = ("step", "distance", "quadratic_residual", "fraction_above")
    return {
        **missing,
        "valid": np.zeros(full, dtype=np.bool_),
        **{key: np.full(iterates, np.nan) for key in per_iterate},
    }


def _check_memory(iterates: int, size: int) -> None:
    needed, free = COPIES * NUMBER * iterates * size, free_memory(torch.device("cpu"))
    if needed > free:
        raise OutOfResources(
            f"the cosines of {iterates} iterates and {size:,} parameters need "
            f"{needed / 1e9:.3g} GB of memory until they are stored, and {free / 1e9:.3g} GB are "
            "free; give fewer --iterates"
        )
