"""What gradient descent would gain in T steps on the quadratic model (maths 2.3)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hessdiag.quantity import Quantity
from hessdiag.run import HORIZONS, Value
from hessdiag_probes.rules import Rule

Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
PARTS = ("positive", "null", "negative", "total")
NEGATIVE_SHARE = 0.1
RULE_ROUNDING = 1e-12  # relative, of nodes and weights and of the sum over them
LOSS_ROUNDING = 1e-12  # of the loss: a total that exceeds it by less has not exceeded it


def gd_forecast(
    value: Array,
    coefficient: Array,
    *,
    error: Array,
    tolerance: float,
    resolved: bool,
    gradient_error: float,
    loss: float,
) -> dict[str, Value]:
    """``dL_T = Σ c_i² (1 − (1 − a l_i)^{2T}) / (2 l_i)`` with the step a = 1/‖H‖, and its parts.

    Args:
        value: All eigenvalues, (n,).
        coefficient: The gradient in the eigenvectors' basis, (n,).
        error: Bound on each eigenvalue's error, (n,).
        tolerance: τ, which tells positive, null and negative apart.
        resolved: The eigenvalues beyond τ are those that the inertia counts; else the null part's
            share may belong to the others.
        gradient_error: Bound on the error of the gradient, 2-norm.
        loss: L at this point: a total that exceeds it is no forecast.
    Returns:
        ``forecast_{positive,null,negative,total}`` per horizon. Parts carry the first-order image
        of the errors in eigenvalues, in the gradient, and in which part an eigenvector near τ
        belongs to.
    """
    size = np.abs(value)
    norm = float((size + error).max())
    step = 1.0 / norm
    rounding = float(error.max())
    step_error = 2 * rounding * step * step  # ‖H‖ is known to its error only
    gradient_error += 4 * EPS * math.sqrt(value.size) * float(np.linalg.norm(coefficient))
    parts = {
        "positive": value > tolerance,
        "null": size <= tolerance,
        "negative": value < -tolerance,
    }
    unsure = np.abs(size - tolerance) <= error if tolerance > 0 else np.zeros_like(parts["null"])
    if not resolved:
        unsure |= parts["null"]
    leak = {name: _leak(value, coefficient, inside, rounding) for name, inside in parts.items()}
    found: dict[str, dict[str, Quantity]] = {name: {} for name in PARTS}
    for horizon in HORIZONS:
        steps = int(horizon)
        gain, _, _ = _gain(value, step, steps)
        # f is convex, so its slope at the lower end bounds it on all of an eigenvalue's interval.
        _, slope, lag = _gain(value - error, step, steps)
        with np.errstate(over="ignore", invalid="ignore"):
            energy = np.where(coefficient == 0, 0.0, coefficient**2 * gain)
            change = slope * error + lag * step_error
            bend = np.where(coefficient == 0, 0.0, coefficient**2 * change)
            bend += (value.size + 16) * EPS * energy
            drift = 2 * gradient_error * np.abs(coefficient * gain)
            for name, inside in parts.items():
                mixed = leak[name] * (_most(gain) if name == "negative" else step * steps)
                amount = float(energy[inside].sum())
                slack = float(bend[inside].sum() + np.hypot.reduce(drift[inside]) + mixed)
                lent = float(energy[inside & unsure].sum())
                owed = float(energy[~inside & unsure].sum())
                found[name][horizon] = Quantity.exact(
                    amount, max(amount - slack - lent, 0.0), amount + slack + owed
                )
            total = float(energy.sum())
            slack = float(bend.sum() + np.hypot.reduce(drift))
        lost = float(energy[parts["negative"]].sum())
        exceeds = loss > 0 and total - slack > loss * (1 + LOSS_ROUNDING)
        found["total"][horizon] = (
            Quantity.unresolved()
            if exceeds or lost > NEGATIVE_SHARE * total
            else Quantity.exact(total, max(total - slack, 0.0), total + slack)
        )
    return {f"forecast_{name}": quantities for name, quantities in found.items()}


def krylov_forecast(
    inner: Rule,
    outer: Rule,
    *,
    norm: float,
    step: float,
    tolerance: float,
    rounding: float,
    gradient_error: float,
    loss: float,
    confidence: float,
) -> dict[str, Value]:
    """The forecast of a matrix that is known by one Lanczos run from its gradient (maths 2.3).

    Args:
        inner: Gauss rule of the gradient's spectral measure: a lower bound on the total.
        outer: Gauss–Radau rule with a node at or below λ_min: an upper bound.
        norm: Of the gradient.
        step: a = 1/u, u at least ‖H‖: then all derivatives of f alternate in sign.
        tolerance: τ, which tells positive, null and negative nodes apart.
        rounding: Absolute error of the nodes.
        gradient_error: Bound on the error of the gradient, 2-norm.
        loss: L at this point: a total that exceeds it is no forecast.
        confidence: With which the step and the node of ``outer`` are what they should be.
    Returns:
        ``forecast_total`` certified; the parts are estimates by the nodes of ``inner``.
    Source:
        Golub and Meurant (1994) for the two rules.
    """
    found: dict[str, dict[str, Quantity]] = {name: {} for name in PARTS}
    for horizon in HORIZONS:
        parts = _node_parts(inner, norm, step, int(horizon), tolerance)
        for name, amount in parts.items():
            found[name][horizon] = Quantity.estimate(amount)
        ends = []
        for rule, sign in ((inner, -1.0), (outer, 1.0)):
            node, weight = rule.node.numpy(), rule.weight.numpy().clip(0.0)
            gain, slope, lag = _gain(node, step, int(horizon))
            with np.errstate(over="ignore", invalid="ignore"):
                amount = norm**2 * _weighted(weight, gain)
                bend = norm**2 * _weighted(weight, slope) * rounding
                bend += norm**2 * _weighted(weight, lag) * 2 * rounding * step * step
                drift = 2 * gradient_error * norm * math.sqrt(_weighted(weight, gain**2))
                bend += norm**2 * 16 * weight.size * EPS * float(gain.max())  # errors of weights
                ends.append(amount + sign * (bend + drift + RULE_ROUNDING * amount))
        found["total"][horizon] = _total(max(ends[0], 0.0), ends[1], parts, loss, confidence)
    return {f"forecast_{name}": quantities for name, quantities in found.items()}


def _node_parts(
    rule: Rule, norm: float, step: float, steps: int, tolerance: float
) -> dict[str, float]:
    node, weight = rule.node.numpy(), rule.weight.numpy()
    gain, _, _ = _gain(node, step, steps)
    inside = {
        "positive": node > tolerance,
        "null": np.abs(node) <= tolerance,
        "negative": node < -tolerance,
    }
    return {name: norm**2 * _weighted(weight[mask], gain[mask]) for name, mask in inside.items()}


def _total(
    low: float, high: float, parts: dict[str, float], loss: float, confidence: float
) -> Quantity:
    """Unresolved where a step may not go so far; a lower bound where the upper one says nothing."""
    total = sum(parts.values())
    exceeds = loss > 0 and low > loss * (1 + LOSS_ROUNDING)
    if exceeds or not parts["negative"] <= NEGATIVE_SHARE * total:
        return Quantity.unresolved()
    if not math.isfinite(high) or (loss > 0 and high > loss):
        return Quantity.lower_bound(low, confidence)
    return Quantity.interval(min(max(total, low), high), low, high, confidence)


def _weighted(weight: Array, amount: Array) -> float:
    """``Σ w f`` in which a node without weight counts nothing, however large f is there."""
    return float(np.where(weight == 0, 0.0, weight * amount).sum())


def uniform_forecast(quantity: Quantity) -> dict[str, Value]:
    """The same Quantity everywhere: unresolved, absent or zero."""
    return {f"forecast_{name}": dict.fromkeys(HORIZONS, quantity) for name in PARTS}


def _gain(value: Array, step: float, steps: int) -> tuple[Array, Array, Array]:
    """``f(l) = (1 − (1 − a l)^{2T}) / (2 l)`` and bounds on ``|f'|`` and ``|∂f/∂a|``.

    All infinite where they overflow.
    """
    x = step * value
    tiny = np.abs(value) < np.finfo(float).tiny
    safe = np.where(tiny, 1.0, value)
    with np.errstate(over="ignore", divide="ignore"):
        log = np.log1p(-np.where(tiny, 0.5, x))
        gain = np.where(tiny, step * steps, -np.expm1(2 * steps * log) / (2 * safe))
        lag = steps * np.where(tiny, 1.0, np.exp((2 * steps - 1) * log))
        growth = np.exp(2 * steps * np.log1p(np.maximum(-x, 0.0)))
        flat = step**2 * steps * (2 * steps - 1) / 2
        slope = np.where(value > 0, np.minimum(flat, gain / safe), flat * growth)
    return gain, np.where(tiny, flat, slope), lag


def _leak(value: Array, coefficient: Array, inside: NDArray[np.bool_], rounding: float) -> float:
    """Energy that eigenvectors rotated by rounding may carry into or out of a part.

    An eigenvector at distance d from the nearest eigenvalue of the other side turns by at most
    ``rounding / d`` (Davis–Kahan).
    """
    if not inside.any() or inside.all():
        return 0.0
    energy_in = float(np.linalg.norm(coefficient[inside]))
    energy_out = float(np.linalg.norm(coefficient[~inside]))
    distance = np.abs(value[inside][:, None] - _edges(value, inside)[None, :]).min(axis=1)
    turn = np.minimum(rounding / np.maximum(distance, np.finfo(float).tiny), 1.0)
    moved = float(np.linalg.norm(turn * coefficient[inside]))
    gap = float(distance.min())
    entering = min(rounding / gap, 1.0) * energy_out if gap > 0 else energy_out
    return 2 * (moved + entering) * min(moved + entering + energy_in, energy_in + energy_out)


def _edges(value: Array, inside: NDArray[np.bool_]) -> Array:
    """The eigenvalues of the other side that lie nearest to this part's ends."""
    other = value[~inside]
    low, high = value[inside].min(), value[inside].max()
    below, above = other[other < low], other[other > high]
    found = [below.max()] if below.size else []
    found += [above.min()] if above.size else []
    return np.asarray(found)


def _most(gain: Array) -> float:
    finite = gain[np.isfinite(gain)]
    return float(finite.max(initial=0.0))
