"""Shampoo's M against matrix powers of SciPy, and what is known of it in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power

import hessdiag.variants.shampoo
from hessdiag.checkpoint.optimizer import OptimizerState
from hessdiag.variants.scene import NotApplicable
from hessdiag.variants.shampoo import shampoo
from lent_scenes import dense, lent_scene, linear_task

EPSILON = 1e-6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def drawn(*shapes, steps=5):
    return [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(steps)]


def damped_power(total, exponent):
    total = np.asarray(total)
    shift = EPSILON * np.linalg.norm(total, 2)
    return torch.from_numpy(fractional_matrix_power(total + shift * np.eye(len(total)), exponent))


def expected(gradients, left, right):
    """``(Σ GGᵀ + εI)^left ⊗ (Σ GᵀG + εI)^right``; 0 leaves a side alone."""
    rows = damped_power(sum(g @ g.T for g in gradients), left)
    columns = damped_power(sum(g.T @ g for g in gradients), right)
    return torch.kron(rows, columns)


def built(shapes, gradients, **scene):
    with lent_scene(linear_task(shapes, gradients), **scene) as found:
        return shampoo(found)


def metric(made):
    p = dense(made.coordinates)
    return p @ p.T


@pytest.mark.parametrize("shape", [(3, 4), (5, 2), (1, 4)])
def test_m_of_a_matrix_is_the_kronecker_product_of_the_minus_fourth_roots(shape):
    gradients = drawn(shape)
    made = built([shape], gradients)
    truth = expected([step[0] for step in gradients], -0.25, -0.25)
    torch.testing.assert_close(metric(made), truth, rtol=1e-9, atol=1e-12)
    assert made.source == "minibatches"
    assert "1e-06 of its largest eigenvalue" in made.notes[0]
    assert "5 gradients" in made.notes[0]


def test_p_inverts_and_transposes():
    made = built([(3, 4), (5,)], drawn((3, 4), (5,))).coordinates
    p, eye = dense(made), torch.eye(17, dtype=torch.float64)
    torch.testing.assert_close(made.inverse(p.T), eye, atol=1e-9, rtol=0)
    torch.testing.assert_close(made.transposed(eye), p)
    least = torch.linalg.eigvalsh(p.T @ p)[0]
    assert made.least() == pytest.approx(float(least), rel=1e-8)


def test_m_of_one_gradient_makes_its_singular_values_nearly_equal():
    shape = 3, 4
    gradients = drawn(shape, steps=1)
    u, s, v = torch.linalg.svd(gradients[0][0], full_matrices=False)
    step = (metric(built([shape], gradients)) @ gradients[0][0].reshape(-1)).reshape(shape)
    flattened = s / (s**2 + EPSILON * s[0] ** 2).sqrt()
    torch.testing.assert_close(step, (u * flattened) @ v)


def test_a_convolution_is_the_matrix_of_its_output_channels():
    gradients = drawn((3, 2, 2, 1))
    truth = expected([step[0].reshape(3, 4) for step in gradients], -0.25, -0.25)
    torch.testing.assert_close(metric(built([(3, 2, 2, 1)], gradients)), truth, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(4,), (1,), ()])
def test_m_of_a_vector_is_the_minus_square_root_of_its_full_second_moment(shape):
    gradients = drawn(shape)
    flat = [step[0].reshape(-1) for step in gradients]
    truth = damped_power(sum(torch.outer(g, g) for g in flat), -0.5)
    torch.testing.assert_close(metric(built([shape], gradients)), truth, rtol=1e-9, atol=0)


def test_each_parameter_of_a_block_has_its_own_factors():
    shapes = (2, 3), (2,), (3, 2)
    gradients = drawn(*shapes)
    weights = [expected([step[i] for step in gradients], -0.25, -0.25) for i in (0, 2)]
    bias = damped_power(sum(torch.outer(step[1], step[1]) for step in gradients), -0.5)
    truth = torch.block_diag(weights[0], bias, weights[1])
    torch.testing.assert_close(metric(built(shapes, gradients)), truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("shape", "powers"), [((3, 5), (-0.5, 0)), ((5, 3), (0, -0.5))])
def test_a_large_side_keeps_the_identity_and_the_other_the_whole_exponent(
    shape, powers, monkeypatch
):
    monkeypatch.setattr(hessdiag.variants.shampoo, "SIDE_LIMIT", 4)
    gradients = drawn(shape)
    made = built([shape], gradients)
    truth = expected([step[0] for step in gradients], *powers)
    torch.testing.assert_close(metric(made), truth, rtol=1e-9, atol=1e-12)
    assert "sides of more than 4 keep the identity" in made.notes[1]
    assert made.notes[1].endswith(": p0")


@pytest.mark.parametrize("shape", [(5,), (5, 6)])
def test_without_any_small_side_m_is_the_diagonal_of_adagrad(shape, monkeypatch):
    monkeypatch.setattr(hessdiag.variants.shampoo, "SIDE_LIMIT", 4)
    gradients = drawn(shape)
    total = sum(step[0].reshape(-1) ** 2 for step in gradients)
    truth = torch.diag((total + EPSILON * total.max()) ** -0.5)
    made = built([shape], gradients)
    assert made.coordinates.diagonal
    torch.testing.assert_close(metric(made), truth)


def test_m_has_the_units_of_one_over_the_gradient():
    shapes = (3, 4), (4,), ()
    gradients = drawn(*shapes)
    small = [[1e-9 * g for g in step] for step in gradients]
    torch.testing.assert_close(
        1e-9 * metric(built(shapes, small)), metric(built(shapes, gradients)), rtol=1e-8, atol=0
    )


def test_a_parameter_without_gradient_keeps_the_identity_and_is_named():
    gradients = [[g, torch.zeros(3)] for (g,) in drawn((2, 2))]
    made = built([(2, 2), (3,)], gradients)
    torch.testing.assert_close(metric(made)[4:, 4:], torch.eye(3, dtype=torch.float64))
    assert "no gradient, so M is the identity there: p1" in made.notes


def test_rows_without_gradient_leave_p_finite_and_invertible():
    gradients = drawn((3, 3))
    for (step,) in gradients:
        step[1] = 0
        step[:, 2] = 0
    made = built([(3, 3)], gradients).coordinates
    assert torch.linalg.cond(dense(made)) < 2 * EPSILON**-0.25
    assert dense(made).isfinite().all()


def test_a_block_without_any_gradient_is_refused():
    with pytest.raises(NotApplicable, match="every replayed gradient of the block is zero"):
        built([(2, 2)], [[torch.zeros(2, 2)]] * 2)


def test_iterates_are_the_source_where_there_are_some():
    task = linear_task([(2, 2)], drawn((2, 2)))
    with lent_scene(task, iterates=[{"p0": torch.ones(2, 2)}] * 3) as scene:
        made = shampoo(scene)
    assert made.source == "iterates"
    assert "3 gradients at the iterates" in made.notes[0]


def test_coupled_weight_decay_is_part_of_the_gradients():
    gradients = drawn((2, 3))
    decayed = [step[0] + 0.3 for step in gradients]  # the parameters are ones
    made = built([(2, 3)], gradients, weight_decay=0.3)
    torch.testing.assert_close(metric(made), expected(decayed, -0.25, -0.25), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "state",
    [
        OptimizerState("AdamW", [{}]),
        OptimizerState("NAdam", [{"decoupled_weight_decay": True}]),
    ],
)
def test_decay_that_the_checkpoints_optimizer_decouples_is_not(state):
    gradients = drawn((2, 3))
    made = built([(2, 3)], gradients, weight_decay=0.3, optimizer=state)
    truth = expected([step[0] for step in gradients], -0.25, -0.25)
    torch.testing.assert_close(metric(made), truth, rtol=1e-9, atol=1e-12)


def test_the_eigenvectors_of_the_factors_are_the_rotation():
    """Of one gradient they make it diagonal: C is vec(S) vec(S)ᵀ (maths.md 7)."""
    gradients = drawn((3, 3), steps=1)
    s = torch.linalg.svdvals(gradients[0][0])
    made = built([(3, 3)], gradients)
    off = (1 - (s**4).sum() / (s**2).sum() ** 2).sqrt()
    g = gradients[0][0]
    before = (1 - (g**4).sum() / (g**2).sum() ** 2).sqrt()
    assert made.off_diagonality == pytest.approx({"before": float(before), "after": float(off)})


def test_float32_parameters_are_served():
    gradients = drawn((3, 4), (5,))
    wide = built([(3, 4), (5,)], gradients)
    with lent_scene(linear_task([(3, 4), (5,)], gradients), dtype=torch.float32) as scene:
        made = shampoo(scene).coordinates
    z = torch.randn(2, 17, dtype=torch.float32)
    assert made.apply(z).dtype == torch.float32
    torch.testing.assert_close(
        made.apply(z).double(), wide.coordinates.apply(z.double()), rtol=1e-3, atol=1e-4
    )
