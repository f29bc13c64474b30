import numpy as np
import pytest
import torch

from hessdiag.variants.coordinates import congruence
from hessdiag.variants.curvature import optimal
from hessdiag.variants.scene import NotApplicable
from hessian_scenes import equal_squares, scaled, scene, two_cyclic


def padded(matrix, places, n):
    full = torch.zeros(n, n, dtype=torch.float64)
    index = torch.tensor(places)
    full[index[:, None], index] = matrix
    return full


def test_kappa_of_the_coordinates_is_the_known_optimum_and_the_note_says_so():
    d = torch.logspace(-4, 4, 4, dtype=torch.float64)
    matrix = scaled(equal_squares(), d)
    built = optimal(scene(matrix))
    value = np.linalg.eigvalsh(congruence(matrix, built.coordinates).numpy())
    kappa = value[-1] / value[0]
    assert 100 * (1 - 1e-9) <= kappa <= 100.1
    assert 99.9 <= built.diagonal_bound <= 100 * (1 + 1e-12)
    assert built.coordinates.diagonal
    assert built.source == "hessian"
    note = built.notes[0]
    assert note.startswith(f"kappa at most {kappa:.6g}, and no diagonal has less than ")
    assert note.endswith(f"{built.diagonal_bound:.6g} (gap {kappa / built.diagonal_bound:.4g})")


def test_dead_rows_keep_scale_one_and_do_not_count():
    matrix = padded(equal_squares(), [0, 2, 3, 5], 6)
    scale = optimal(scene(matrix)).coordinates.scale
    assert scale[1] == scale[4] == 1
    live = scale[[0, 2, 3, 5]]
    value = np.linalg.eigvalsh(scaled(equal_squares(), live).numpy())
    assert value[-1] / value[0] <= 100.1


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        (torch.diag(torch.tensor([1.0, -1])), "indefinite.*ruiz"),
        (torch.tensor([[1.0, 2], [2, 1]]), "indefinite.*ruiz"),
        (torch.tensor([[0.0, 1], [1, 1]]), "indefinite.*ruiz"),
        (torch.tensor([[0.0, 1e-20], [1e-20, 1]]), "indefinite.*ruiz"),
        (torch.ones(3, 3), "not certainly positive definite"),
        (torch.zeros(3, 3), "is zero"),
        (torch.eye(501), "at most 500 nonzero rows, and there are 501"),
    ],
)
def test_where_there_is_no_certified_optimum_the_reason_is_said(matrix, reason):
    with pytest.raises(NotApplicable, match=reason):
        optimal(scene(matrix.double()))


def test_a_large_block_of_few_live_rows_is_taken():
    matrix = padded(equal_squares(), [0, 100, 300, 509], 510)
    assert optimal(scene(matrix)).diagonal_bound > 99


def test_above_the_exact_limit_it_is_refused():
    with pytest.raises(NotApplicable, match="above the exact limit"):
        optimal(scene(torch.eye(3).double(), exact=False))


def test_what_float64_certifies_is_drowned_in_narrow_products():
    matrix = two_cyclic(torch.tensor([0.5, 1 - 1e-6], dtype=torch.float64))
    assert optimal(scene(matrix)).diagonal_bound == pytest.approx(2e6, rel=1e-4)
    with pytest.raises(NotApplicable, match="not certainly positive definite"):
        optimal(scene(matrix, dtype=torch.float32))
