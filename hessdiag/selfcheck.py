"""Checks that run before any long work: can this model's products be trusted at all?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from hessdiag.checks import Check, SelfChecks
from hessdiag.culprits import find_unrepeatable, layers_of
from hessdiag.curvature.engines import BUILD, Difference, Engine, Recompute
from hessdiag.curvature.engines.base import no_second_derivative
from hessdiag.curvature.ggn import pushforward, split
from hessdiag.curvature.loan import loan
from hessdiag.curvature.objective import Objective, flatten, moved, only, unflatten
from hessdiag.curvature.precision import gradient_noise, hidden_casts, loss_noise, noise_of
from hessdiag.curvature.twice import gradient_once_only
from hessdiag.data import convert
from hessdiag.difference_checks import check_agreement, check_symmetry, notice
from hessdiag.errors import SelfCheckFailed
from hessdiag.options import Curvature, EngineName
from hessdiag.slope_check import check_slope
from hessdiag_probes.random import generator, rademacher
from hessdiag_probes.types import Vector

SYMMETRY_LIMIT = {torch.float64: 1e-8, torch.float32: 1e-4}
DIFFERENCE_LIMIT = {torch.float64: 1e-4, torch.float32: 1e-2}
# Of |p|. Those of float32 reach down to where a ReLU network crosses no kink on the way.
STEPS = {
    torch.float64: (3e-5, 3e-6, 3e-7, 3e-8),
    torch.float32: (1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 3e-6, 1e-6, 3e-7),
}
FAR_STEPS = (3e-4, 3e-3, 3e-2)  # for a curvature that is small beside the gradient
NOISE_FACTOR = 1e3
KINK_MOVE = {torch.float64: 1e-6, torch.float32: 1e-4}


@dataclass(frozen=True)
class _Subject:
    """What the checks work on."""

    objective: Objective
    parameters: Sequence[nn.Parameter]
    curvature: Curvature
    seed: int
    precision: torch.dtype  # the narrowest type that the arithmetic passes through
    engine: EngineName = "auto"

    @property
    def length(self) -> float:
        """|p|, the unit of all steps."""
        return float(flatten([p.data for p in self.parameters]).norm()) or 1.0

    @cached_property
    def differences(self) -> Difference:
        return Difference(self.objective, self.parameters)

    def product(self, parameters: Sequence[nn.Parameter] | None = None) -> Engine:
        if self.engine == "difference":
            own = parameters is None
            return self.differences if own else Difference(self.objective, parameters or ())
        return Recompute(self.objective, parameters or self.parameters, BUILD[self.curvature])

    def vector(self, purpose: str, parameters: Sequence[nn.Parameter] | None = None) -> Vector:
        chosen = parameters or self.parameters
        return rademacher(
            sum(p.numel() for p in chosen),
            generator=generator(self.seed, "selfcheck", purpose),
            dtype=chosen[0].dtype,
            device=chosen[0].device,
        )


def run_selfchecks(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    *,
    curvature: Curvature,
    seed: int,
    engine: EngineName = "auto",
) -> SelfChecks:
    """Repeatability, hidden casts, slope, symmetry and a central difference (maths 0.2).

    Args:
        objective: On loan, in its dtype.
        parameters: All that will be analysed.
        curvature: Whose products are checked.
        seed: Of the random vectors.
        engine: Of the analysis. Of ``difference`` the central difference is what its own steps
            agree to, and symmetry counts beyond that.
    Raises:
        SelfCheckFailed: The products cannot be trusted; names the module where it can be found.
    Cost:
        About six products, 9 losses and up to 34 gradients; in float32 twice that where kinks
        are near.
    """
    dtype = parameters[0].dtype
    subject = _Subject(objective, parameters, curvature, seed, dtype, engine)
    repeatability = _repeatability(subject)
    casts = hidden_casts(objective, parameters)
    notices = tuple(
        f"hidden {kind} in {place}: its rounding spoils small eigenvalues; no number of this run "
        "is claimed exact (take the loss from float64 values to mend it)"
        for place, kind in casts.items()
    )
    if casts:
        subject = replace(subject, precision=torch.float32)
    slope = _or_off_the_kink(subject, _slope)
    if not slope.passed:
        raise SelfCheckFailed(
            f"the gradient is not the derivative of the loss: they differ by {slope.value:.1e} "
            f"relative (limit {slope.limit:.0e}), so parts of the loss are hidden from it "
            "(reentrant activation checkpointing, detach(), a custom autograd.Function, a hook "
            "that changes gradients?), or rounding drowns it (the loss is "
            f"{objective.value():.1e}); take it out of the loss that is analysed "
            "(checkpointing: use_reentrant=False)" + _blame(casts)
        )
    if (
        curvature == "hessian"
        and engine != "difference"
        and gradient_once_only(objective, parameters)
    ):
        raise SelfCheckFailed(
            no_second_derivative("an autograd.Function in it is marked once_differentiable")
        )
    symmetry = _symmetry(subject)
    if not symmetry.passed:
        raise SelfCheckFailed(_asymmetry_message(subject, symmetry) + _blame(casts))
    if engine == "difference":
        agreement = check_agreement(subject.differences, subject.vector("difference"))
        notices += (notice(agreement),)
        return SelfChecks(slope, symmetry, agreement, repeatability, casts, notices)
    difference = _checked_difference(subject)
    if not difference.passed and dtype == torch.float32:
        # Float32 cannot tell a kink that is near from a wrong backward; the model's code can.
        with _widened(subject) as wide:
            again = _checked_difference(wide)
        note = "; ".join(("checked in float64", again.note) if again.note else ("in float64",))
        difference = Check(again.value, again.limit, again.passed, note)
    if not difference.passed:
        raise SelfCheckFailed(
            f"the {_matrix(curvature)} product disagrees with a central difference by "
            f"{difference.value:.1e} relative (limit {difference.limit:.0e}), also at a point "
            "nearby: the model's backward is not the derivative of its forward (a custom "
            "autograd.Function, detach(), a straight-through estimator?)" + _blame(casts)
        )
    for what, check in (("slope of the loss", slope), ("central difference", difference)):
        if "kink" in check.note:
            notices += (f"{what} {check.note} (ReLU at exactly zero?)",)
        if "drowned" in check.note:
            notices += (f"the {what} could not check the products: {check.note}",)
    return SelfChecks(slope, symmetry, difference, repeatability, casts, notices)


def _blame(casts: dict[str, str]) -> str:
    """What rounding may have to do with a failure, where the model hides any."""
    if not casts:
        return ""
    places = ", ".join(f"{place} ({kind})" for place, kind in casts.items())
    return f".\nIt computes in a narrower type in {places}: let it follow the type of its input"


def _checked_difference(subject: _Subject) -> Check:
    """The central difference, at a point nearby where it fails here."""
    difference = _or_off_the_kink(subject, _difference)
    if "kink" in difference.note:
        nearby = _off_the_kink(subject, _symmetry)
        if not nearby.passed:
            raise SelfCheckFailed(_asymmetry_message(subject, nearby))
    return difference


@contextmanager
def _widened(subject: _Subject) -> Iterator[_Subject]:
    """The same model and data in float64."""
    objective, wide = subject.objective, torch.float64
    device, default = subject.parameters[0].device, torch.get_default_dtype()
    mode = "train" if objective.model.training else "eval"
    items = tuple(
        convert(item, dtype=wide, device=device, keep_grad=True) for item in objective.batches.items
    )
    wider = replace(objective, batches=replace(objective.batches, items=items))
    try:
        torch.set_default_dtype(wide)
        with loan([objective.model], mode=mode, dtype=wide, device=device):
            yield replace(subject, objective=wider, precision=wide)
    finally:
        torch.set_default_dtype(default)


def _matrix(curvature: Curvature) -> str:
    return "Hessian-vector" if curvature == "hessian" else "Gauss–Newton-vector"


def _repeatability(subject: _Subject) -> Check:
    product = subject.product()
    vector = subject.vector("repeat")
    first = product(vector)
    second = product(vector)
    if not bool(torch.isfinite(first).all()):
        raise SelfCheckFailed(
            "a product is not finite though the loss is: a derivative is infinite or NaN at these "
            "weights (sqrt, norm or a power at zero, log of zero?); move the operation off that "
            "point, for example by sqrt(x + 1e-12)"
        )
    scale = float(first.norm())
    value = float((first - second).norm()) / scale if scale > 0 else float(second.norm() > 0)
    limit = 10 * torch.finfo(subject.precision).eps
    if not (value <= limit):
        culprit = find_unrepeatable(subject.objective)
        raise SelfCheckFailed(
            f"the same product twice differs by {value:.1e} relative: {culprit}\n"
            "Make the loss deterministic: mode='eval' in the Task turns dropout off and freezes "
            "BatchNorm statistics; fix any random number drawn in the loss."
        )
    return Check(value, limit, True)


def _slope(subject: _Subject) -> Check:
    sign = subject.vector("slope")
    return check_slope(
        subject.objective,
        subject.parameters,
        sign / sign.norm() * subject.length,
        steps=STEPS[subject.precision],
        noise=loss_noise(subject.objective, narrow=subject.precision != sign.dtype),
    )


def _symmetry(subject: _Subject, parameters: Sequence[nn.Parameter] | None = None) -> Check:
    product = subject.product(parameters)
    limit = SYMMETRY_LIMIT[subject.precision]
    if isinstance(product, Difference):
        pairs = [
            (subject.vector(f"{pair} u", parameters), subject.vector(f"{pair} v", parameters))
            for pair in ("first", "second")
        ]
        found, told = check_symmetry(product, pairs)
        return Check(found, limit, found < limit, told)
    noise = noise_of(subject.objective, parameters or subject.parameters, subject.curvature)
    worst = 0.0
    note = ""
    for pair in ("first", "second"):
        u = subject.vector(f"{pair} u", parameters)
        v = subject.vector(f"{pair} v", parameters)
        cu, cv = product(u), product(v)
        scale = float(cv.norm() * u.norm() + cu.norm() * v.norm())
        wrong = float(noise(v).norm() * u.norm())
        if scale <= 2 * NOISE_FACTOR * wrong:
            note = "the matrix is zero or rounding noise"
            continue
        rounding = NOISE_FACTOR * wrong
        worst = max(worst, max(abs(float(u @ cv - v @ cu)) - rounding, 0.0) / scale)
    return Check(worst, limit, worst < limit, note)


def _difference(subject: _Subject) -> Check:
    limit = DIFFERENCE_LIMIT[subject.precision]
    steps = STEPS[subject.precision]
    if subject.curvature == "ggn":
        return _jacobian_difference(subject, limit, steps)
    product = subject.product()
    sign = subject.vector("difference")
    bent = product(sign)
    noise = noise_of(subject.objective, subject.parameters, subject.curvature)
    if float(bent.norm()) <= NOISE_FACTOR * float(noise(sign).norm()):
        return Check(0.0, limit, True, "the matrix is zero or rounding noise")
    # The diagonal by one Rademacher probe; where it fails the row's size stands in.
    diagonal = (sign * bent).abs()
    size = torch.maximum(diagonal, 1e-3 * bent.abs())
    scaled = torch.where(size > 0, sign / size.clamp_min(1e-300).sqrt(), torch.zeros_like(sign))
    directions = [(d / d.norm() * subject.length) for d in (sign, scaled)]
    claims = [(unit, product(unit)) for unit in directions]
    best, seen = float("inf"), []
    tries = [(claim, step) for claim in claims for step in steps]
    if subject.precision == torch.float64:
        tries += [(claim, step) for claim in claims for step in FAR_STEPS]
    for (unit, wanted), step in tries:
        if best < limit and step in FAR_STEPS:
            break
        error = _one_difference(subject, unit, step, wanted)
        seen.append((error, step))
        best = min(best, error / float(wanted.norm()) if wanted.any() else 0.0)
        if best < 0.01 * limit:
            break
    if best >= limit and subject.precision == torch.float64 and _drowned(subject, seen):
        return Check(best, limit, True, "the difference is drowned in the gradient's rounding")
    return Check(best, limit, best < limit)


def _drowned(subject: _Subject, seen: Sequence[tuple[float, float]]) -> bool:
    """Whether, at the step that sees most, no more is left than the gradient's rounding.

    Beside a large gradient a difference of gradients cannot see a small curvature.
    """
    rounding = 10 * float(gradient_noise(subject.objective, subject.parameters).norm())
    error, step = min(seen, key=lambda found: found[0] + rounding / found[1])
    return error <= 3 * rounding / step


def _one_difference(subject: _Subject, unit: Vector, step: float, wanted: Vector) -> float:
    """``|(g(p + hv) − g(p − hv)) / 2h − Hv|``, absolute."""
    objective, parameters = subject.objective, subject.parameters
    with moved(parameters, step * unit):
        ahead = objective.gradient(parameters)
    with moved(parameters, -step * unit):
        behind = objective.gradient(parameters)
    return float(((ahead - behind) / (2 * step) - wanted).norm())


def _jacobian_difference(subject: _Subject, limit: float, steps: Sequence[float]) -> Check:
    """For Gauss–Newton the derivative to check is the model's first: ``J v`` on one batch."""
    parameters = subject.parameters
    batch = subject.objective.batches.items[0]
    sign = subject.vector("difference")
    unit = sign / sign.norm() * subject.length

    def outputs() -> Vector | None:
        with only(parameters):
            found = split(subject.objective, batch, parameters).outputs
        return flatten(found) if found else None

    with only(parameters):
        parts = split(subject.objective, batch, parameters)
        if not parts.outputs:
            return Check(0.0, limit, True, "no output depends on the parameters")
        wanted = flatten(pushforward(parts, parameters)(unflatten(unit, parameters)))
    best = float("inf")
    for step in steps:
        with moved(parameters, step * unit):
            ahead = outputs()
        with moved(parameters, -step * unit):
            behind = outputs()
        if ahead is None or behind is None or float(wanted.norm()) == 0:
            return Check(0.0, limit, True, "no output depends on the parameters")
        error = ((ahead - behind) / (2 * step) - wanted).norm() / wanted.norm()
        best = min(best, float(error))
    return Check(best, limit, best < limit)


def _or_off_the_kink(subject: _Subject, check: Callable[[_Subject], Check]) -> Check:
    """A check here, or else nearby: ReLUs at exactly zero have no derivative here."""
    here = check(subject)
    if here.passed or not _off_the_kink(subject, check).passed:
        return here
    note = f"on a kink: it passes at a point {KINK_MOVE[subject.precision]:.0e} away"
    return Check(here.value, here.limit, True, note)


def _off_the_kink(subject: _Subject, check: Callable[[_Subject], Check]) -> Check:
    random = subject.vector("kink")
    step = KINK_MOVE[subject.precision] * subject.length
    with moved(subject.parameters, random / random.norm() * step):
        return check(subject)


def _asymmetry_message(subject: _Subject, check: Check) -> str:
    loss = subject.objective.value()
    message = (
        f"the {_matrix(subject.curvature)} product is not symmetric: |u·Cv − v·Cu| is "
        f"{check.value:.1e} relative (limit {check.limit:.0e}), so it is no second derivative "
        f"(or rounding drowns it: the loss is {loss:.1e})"
    )
    culprits = []
    for name, parameters in layers_of(subject.objective, subject.parameters):
        if not _symmetry(subject, parameters).passed:
            culprits.append(name)
    if culprits:
        message += f".\nFound in {', '.join(culprits[:6])}"
        if any("weight_norm" in name for name in culprits):
            message += (
                ": torch's weight_norm has a wrong double backward. Write w = g·v/|v| by hand in "
                "the module, or remove the weight norm, or use --curvature ggn or "
                "--engine difference"
            )
    return message
