"""AdaDiag's M against NumPy's SVD and Adam's average written out, and off-diagonality densely."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hessdiag.variants.rotations
from hessdiag.variants.coordinates import congruence
from hessdiag.variants.held import held_gradients
from hessdiag.variants.rotations import adadiag, adadiag2
from lent_scenes import dense, lent_scene, linear_task

BETA, EPS = 0.999, 1e-8
MAKERS = {"adadiag": (adadiag, False), "adadiag2": (adadiag2, True)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(5)


def drawn(*shapes, steps=4):
    return [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(steps)]


def built(make, shapes, gradients, **scene):
    with lent_scene(linear_task(shapes, gradients), **scene) as found:
        return make(found)


def metric(made):
    p = dense(made.coordinates)
    return p @ p.T


def second_moment(vectors):
    """Adam's v̂ after these gradients."""
    v = np.zeros(vectors[0].shape)
    for vector in vectors:
        v = BETA * v + (1 - BETA) * vector**2
    return v / (1 - BETA ** len(vectors))


def expected(gradients, *, right):
    """``R diag(1/(√v̂ + ε)) Rᵀ`` from NumPy's full SVD of the last gradient."""
    given = [np.asarray(g) for g in gradients]
    u, _, vt = np.linalg.svd(given[-1], full_matrices=True)
    r = np.kron(u, vt.T if right else np.eye(vt.shape[0]))
    v = second_moment([r.T @ g.reshape(-1) for g in given])
    return torch.from_numpy(r @ np.diag(1 / (np.sqrt(v) + EPS)) @ r.T)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(3, 3), (3, 4), (2, 3)])
def test_m_is_adams_in_the_coordinates_of_the_last_gradients_singular_vectors(name, shape):
    make, right = MAKERS[name]
    gradients = drawn(shape)
    made = built(make, [shape], gradients)
    truth = expected([step[0] for step in gradients], right=right)
    torch.testing.assert_close(metric(made), truth, rtol=1e-8, atol=1e-9)
    assert made.source == "minibatches"
    assert "R of the last one" in made.notes[0]


@pytest.mark.parametrize("name", MAKERS)
def test_a_tall_gradient_is_rotated_by_all_its_left_vectors(name):
    make, right = MAKERS[name]
    gradients = drawn((4, 3))
    truth = expected([step[0] for step in gradients], right=right)
    torch.testing.assert_close(
        metric(built(make, [(4, 3)], gradients)), truth, rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("shape", [(6, 2), (2, 6)])
def test_the_rotation_is_orthogonal_also_where_singular_vectors_are_missing(shape):
    made = built(adadiag2, [shape], drawn(shape)).coordinates
    rotation = dense(made.first)
    eye = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(made.inverse(dense(made).T), eye, atol=1e-9, rtol=0)


def test_m_turns_with_the_neurons():
    """Rotated gradients QG give (Q ⊗ I) M (Q ⊗ I)ᵀ, which no diagonal M does."""
    gradients = drawn((3, 3))
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q.contiguous()
    turned = [[q @ step[0]] for step in gradients]
    both = torch.kron(q, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(
        metric(built(adadiag, [(3, 3)], turned)),
        both @ metric(built(adadiag, [(3, 3)], gradients)) @ both.T,
        rtol=1e-8,
        atol=1e-8,
    )


def test_vectors_keep_the_m_of_torchs_adam():
    gradients = drawn((3,), ())
    parameters = [torch.nn.Parameter(torch.ones_like(g)) for g in gradients[0]]
    optimizer = torch.optim.Adam(parameters)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    v = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in parameters])
    m = 1 / ((v / (1 - BETA ** len(gradients))).sqrt() + EPS)
    made = built(adadiag, [(3,), ()], gradients)
    torch.testing.assert_close(metric(made), torch.diag(m))
    assert made.coordinates.diagonal
    assert "this is Adam's M" in made.notes[1]


def test_convolutions_and_vectors_stand_side_by_side():
    shapes = (3, 2, 1, 2), (3,)
    gradients = drawn(*shapes)
    made = built(adadiag, shapes, gradients)
    weight = expected([step[0].reshape(3, 4) for step in gradients], right=False)
    bias = torch.diag(
        torch.from_numpy(1 / (np.sqrt(second_moment([s[1].numpy() for s in gradients])) + EPS))
    )
    torch.testing.assert_close(metric(made), torch.block_diag(weight, bias), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "shape", "turned"),
    [
        ("adadiag", (5, 3), None),
        ("adadiag2", (5, 5), None),
        ("adadiag2", (5, 3), "right"),
        ("adadiag2", (3, 5), "left"),
    ],
)
def test_a_large_side_is_not_rotated(name, shape, turned, monkeypatch):
    monkeypatch.setattr(hessdiag.variants.rotations, "SIDE_LIMIT", 4)
    made = built(MAKERS[name][0], [shape], drawn(shape))
    assert made.coordinates.diagonal is (turned is None)
    if turned:
        rotation = made.coordinates.first
        sides = {side for side in ("left", "right") if getattr(rotation, side) is not None}
        assert sides == {turned}
    assert any("sides of more than 4 are not rotated: p0" in note for note in made.notes)


def test_what_is_made_of_dead_rows_alone_has_scale_one():
    """Both columns 1 and the bias's entry 0: they stay themselves under a rotation of rows."""
    gradients = drawn((3, 2), (2,))
    dead = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0]).bool()
    for step in gradients:
        step[0][:, 1] = 0
        step[1][0] = 0
    made = built(adadiag, [(3, 2), (2,)], gradients, dead=dead)
    m = metric(made)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(m[dead][:, dead], eye)
    assert not m[dead][:, ~dead].abs().max() > 1e-12
    assert made.zero_state == 4
    assert not any("not dead" in note for note in made.notes)


def test_live_directions_without_gradient_are_counted_and_take_the_floor_of_eps():
    gradients = drawn((3, 2), (2,))
    for step in gradients:
        step[0][:, 1] = 0
        step[1][0] = 0
    made = built(adadiag, [(3, 2), (2,)], gradients)
    values = torch.linalg.eigvalsh(metric(made))
    assert made.zero_state == 4
    assert "4 directions that are not dead have no gradient: eps sets their M" in made.notes
    torch.testing.assert_close(values[-4:], torch.full((4,), 1 / EPS, dtype=torch.float64))
    assert values[-5] < 1e4
    assert made.coordinates.least() > 0


def test_rounding_in_rotated_coordinates_counts_as_no_gradient():
    """One gradient turned from both sides is its three singular values, and rounding besides."""
    assert built(adadiag2, [(3, 3)], drawn((3, 3), steps=1)).zero_state == 6


def test_a_gradient_of_zero_leaves_p_invertible():
    made = built(adadiag2, [(2, 3)], [[torch.zeros(2, 3)]])
    torch.testing.assert_close(
        metric(made), torch.eye(6, dtype=torch.float64) / EPS, rtol=1e-9, atol=1e-6
    )
    assert made.off_diagonality is None


def test_float32_parameters_are_served():
    gradients = drawn((3, 4), (5,))
    wide = built(adadiag, [(3, 4), (5,)], gradients)
    with lent_scene(linear_task([(3, 4), (5,)], gradients), dtype=torch.float32) as scene:
        made = adadiag(scene).coordinates
    z = torch.randn(2, 17, dtype=torch.float32)
    assert made.apply(z).dtype == torch.float32
    torch.testing.assert_close(
        made.apply(z).double(), wide.coordinates.apply(z.double()), rtol=1e-3, atol=1e-4
    )


def off(c):
    return float(np.linalg.norm(c - np.diag(np.diag(c))) / np.linalg.norm(c))


def unit(c):
    d = np.sqrt(np.abs(np.diag(c)))
    return c / np.outer(d, d)


def dense_gradients(gradients, r):
    rows = np.stack(
        [np.concatenate([np.asarray(g).reshape(-1) for g in step]) for step in gradients]
    )
    return (rows @ r).T @ (rows @ r) / len(rows)


@pytest.mark.parametrize("name", MAKERS)
def test_off_diagonality_is_that_of_the_dense_matrices(name):
    """Of the gradients' second moment and of H, as they are and with a unit diagonal."""
    make, right = MAKERS[name]
    shapes = (2, 3), (2,)
    gradients = drawn(*shapes, steps=6)
    half = torch.randn(8, 8, dtype=torch.float64)
    h = (half + half.T).numpy()
    made = built(make, shapes, gradients, matrix=torch.from_numpy(h))
    u, _, vt = np.linalg.svd(gradients[-1][0].numpy())
    r = np.eye(8)
    r[:6, :6] = np.kron(u, vt.T if right else np.eye(3))
    before, after = dense_gradients(gradients, np.eye(8)), dense_gradients(gradients, r)
    assert made.off_diagonality == pytest.approx({"before": off(before), "after": off(after)})
    second, hessian = made.notes[-2:]
    for note, one, two in ((second, before, after), (hessian, h, r.T @ h @ r)):
        numbers = (off(one), off(two), off(unit(one)), off(unit(two)))
        assert [f"{number:.2g}" for number in numbers] == [
            word.rstrip(";") for word in note.split() if word[0].isdigit()
        ]
    assert second.startswith("off-diagonality of the gradients")
    assert hessian.startswith("off-diagonality of H")


def test_off_diagonality_of_one_gradient_is_that_of_its_singular_values():
    """C becomes vec(S) vec(S)ᵀ, which is diagonal for a gradient of rank one only (maths.md 7)."""
    full = drawn((3, 3), steps=1)
    s = torch.linalg.svdvals(full[0][0])
    truth = (1 - (s**4).sum() / (s**2).sum() ** 2).sqrt()
    after = built(adadiag2, [(3, 3)], full).off_diagonality["after"]
    assert after == pytest.approx(float(truth))
    one = [[torch.outer(full[0][0][0], full[0][0][1])]]
    found = built(adadiag2, [(3, 3)], one).off_diagonality
    assert found["after"] < 1e-7 < found["before"]


def test_rounding_is_left_out_of_a_unit_diagonal():
    """One gradient and H = ggᵀ turned from both sides: three entries are left, C is 3 × 3 ones."""
    gradients = drawn((3, 3), steps=1)
    g = gradients[0][0].reshape(-1)
    made = built(adadiag2, [(3, 3)], gradients, matrix=torch.outer(g, g))
    before, after = ((1 - 1 / n) ** 0.5 for n in (9, 3))
    for note in made.notes[-2:]:
        assert note.endswith(f"with a unit diagonal {before:.2g} and {after:.2g}")


def test_a_hessian_of_zero_has_no_off_diagonality():
    zeros = torch.zeros(4, 4, dtype=torch.float64)
    made = built(adadiag, [(2, 2)], drawn((2, 2)), matrix=zeros)
    assert not any("of H" in note for note in made.notes)


def test_a_hessian_that_was_not_assembled_has_no_off_diagonality():
    assert not any("of H" in note for note in built(adadiag, [(2, 2)], drawn((2, 2))).notes)


def test_the_spectrum_is_that_of_m_times_h():
    half = torch.randn(6, 6, dtype=torch.float64)
    h = half @ half.T
    made = built(adadiag2, [(2, 3)], drawn((2, 3)), matrix=h)
    found = torch.linalg.eigvalsh(congruence(h, made.coordinates))
    truth = torch.linalg.eigvals(metric(made) @ h).real.sort().values
    torch.testing.assert_close(found, truth)


def test_gradients_are_computed_once_for_all_blocks_and_the_last_are_kept(monkeypatch):
    task = linear_task([(2,)], [[torch.full((2,), float(t))] for t in range(5)])
    monkeypatch.setattr("hessdiag.variants.held.SLICES", 3)
    monkeypatch.setattr("hessdiag.variants.held.HELD_BYTES", 0)
    with lent_scene(task) as scene:
        first = held_gradients(scene)
        assert held_gradients(scene) is first
    assert [float(each["p0"][0]) for each in first.each] == [2, 3, 4]
    assert first.note.startswith("from the last 3 of 5 gradients")
