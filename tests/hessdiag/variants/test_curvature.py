import numpy as np
import pytest
import torch

from hessdiag.variants.coordinates import congruence
from hessdiag.variants.curvature import block_inverse, jacobi, rownorm, ruiz
from hessdiag.variants.scene import NotApplicable
from hessian_scenes import equal_squares, scaled, scene, two_cyclic

EPS = np.finfo(float).eps


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def definite(n=10):
    factor = drawn(n, n + 3)
    return factor @ factor.T


def indefinite(n=10):
    factor = drawn(n, n, seed=3)
    return factor + factor.T


def grading(n=10, decades=8.0, seed=5):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(10 ** rng.uniform(-decades, decades, n))


def without_row(matrix, dead):
    matrix = matrix.clone()
    matrix[dead] = 0
    matrix[:, dead] = 0
    return matrix


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("matrix", [definite(), indefinite()], ids=["definite", "indefinite"])
@pytest.mark.parametrize("decades", [0.5, 8.0, 20.0])
def test_jacobi_gives_one_matrix_whatever_the_scaling(matrix, decades):
    d = grading(decades=decades)
    one = congruence(matrix, jacobi(scene(matrix)).coordinates)
    built = jacobi(scene(scaled(matrix, d)))
    other = congruence(scaled(matrix, d), built.coordinates)
    assert (other - one).abs().max() <= 20 * EPS * one.abs().max()
    assert torch.allclose(one.diagonal().abs(), torch.ones(10).double(), rtol=1e-14)
    assert built.notes == ()
    assert built.source == "hessian"


def test_jacobi_keeps_a_small_diagonal_entry_that_is_no_rounding():
    # A floor of 1e-8 ‖h_i‖ would replace the entry 1e-12, which has all its digits.
    matrix = double([[1e-12, 1e-3], [1e-3, 1.0]])
    assert jacobi(scene(matrix)).coordinates.scale[0] == pytest.approx(1e6, rel=1e-12)


def test_jacobi_takes_the_norm_where_the_diagonal_is_zero_to_rounding():
    matrix = double([[1e-30, 3, 0], [3, 1e-30, 4], [0, 4, 1]])
    built = jacobi(scene(matrix))
    expected = double([3, 5, np.sqrt(17)]).rsqrt()
    expected[2] = 17**-0.25
    assert torch.allclose(built.coordinates.scale, expected, rtol=1e-12)
    assert built.notes == ("3 of 3 rows take their norm: their diagonal is zero to rounding",)


def test_jacobi_measures_each_row_by_itself():
    matrix = double([[0, 2, 0], [2, 0, 0], [0, 0, 9]])
    built = jacobi(scene(matrix))
    assert torch.allclose(built.coordinates.scale, double([0.5**0.5, 0.5**0.5, 1 / 3]))
    assert built.notes[0].startswith("2 of 3 rows")


def test_the_floor_of_jacobi_follows_the_precision_of_the_products():
    matrix = double([[1e-12, 1], [1, 1]])
    assert jacobi(scene(matrix)).notes == ()
    assert jacobi(scene(matrix, dtype=torch.float32)).notes[0].startswith("2 of 2 rows")


def estimates(diagonal, half, norm):
    diagonal = np.asarray(diagonal, dtype=float)
    return {
        "norm": norm,
        "diagonal": diagonal,
        "diagonal_low": diagonal - half,
        "diagonal_high": diagonal + half,
    }


def test_an_estimated_diagonal_counts_beyond_three_standard_errors():
    # 2.0930 standard errors make a half-width at 95 % of 20 probes: 19 degrees of freedom.
    error = 1.0
    rows = estimates([3.1, -3.1, 2.9, 0.0], 2.0930 * error, [100.0, 100.0, 25.0, 0.0])
    built = jacobi(scene(torch.eye(4).double(), exact=False, rows=rows, probes=20))
    expected = [3.1**-0.5, 3.1**-0.5, 0.2, 1.0]
    assert built.coordinates.scale.tolist() == pytest.approx(expected, rel=1e-12)
    assert built.notes == (
        "1 of 3 rows take their norm: their estimated diagonal is within three standard errors "
        "of zero",
    )
    fewer = jacobi(scene(torch.eye(4).double(), exact=False, rows=rows, probes=3))
    assert fewer.notes == ()  # 4.303 standard errors to a half-width: the error is half as large


@pytest.mark.parametrize("maker", [jacobi, rownorm])
def test_without_probes_and_matrix_there_is_a_remedy(maker):
    with pytest.raises(NotApplicable, match="--probes 0"):
        maker(scene(torch.eye(3).double(), exact=False))


@pytest.mark.parametrize("maker", [jacobi, rownorm, ruiz])
@pytest.mark.parametrize("exact", [True, False])
def test_dead_rows_keep_scale_one(maker, exact):
    matrix = without_row(100 * definite(), [2, 7])
    norm = matrix.norm(dim=1).numpy()
    rows = estimates(matrix.diagonal().numpy(), 0.0, norm)
    scale = maker(scene(matrix, exact=exact, rows=rows)).coordinates.scale
    assert scale[2] == scale[7] == 1
    live = [i for i in range(10) if i not in (2, 7)]
    assert bool((scale[live] < 0.5).all())


@pytest.mark.parametrize("maker", [jacobi, rownorm])
def test_a_dead_row_keeps_scale_one_though_its_estimate_is_noise(maker):
    rows = estimates([4.0, 1e-20], 0.0, [4.0, 1e-20])
    made = scene(torch.diag(double([4, 0])), exact=False, rows=rows)
    assert maker(made).coordinates.scale.tolist() == [0.5, 1]


@pytest.mark.parametrize("maker", [jacobi, rownorm, ruiz])
def test_rows_that_hold_weight_decay_alone_are_scaled_by_it(maker):
    matrix = without_row(definite(), [2])
    decayed = matrix + 1e-4 * torch.eye(10).double()
    made = scene(decayed, weight_decay=1e-4)
    made.dead[2] = True
    assert maker(made).coordinates.scale[2] == pytest.approx(100, rel=1e-9)


@pytest.mark.parametrize("maker", [jacobi, rownorm, ruiz, block_inverse])
def test_a_zero_block_is_left_as_it_is(maker):
    built = maker(scene(torch.zeros(3, 3).double()))
    assert built.coordinates.apply(torch.ones(3).double()).tolist() == [1, 1, 1]
    assert built.notes == ()


@pytest.mark.parametrize("maker", [jacobi, rownorm, ruiz])
def test_scales_are_float64_beside_a_matrix_and_of_the_working_type_without(maker):
    matrix = definite()
    rows = estimates(matrix.diagonal().numpy(), 0.0, matrix.norm(dim=1).numpy())
    made = maker(scene(matrix, dtype=torch.float32)).coordinates.scale
    assert made.dtype == torch.float64
    made = maker(scene(matrix, exact=False, rows=rows, dtype=torch.float32)).coordinates.scale
    assert made.dtype == torch.float32


def test_rownorm_is_the_inverse_norm():
    matrix = indefinite()
    built = rownorm(scene(matrix))
    m = built.coordinates.scale.numpy() ** 2
    assert np.allclose(m, 1 / np.linalg.norm(matrix.numpy(), axis=1), rtol=1e-14)
    rows = {"norm": np.arange(1, 11)}
    built = rownorm(scene(matrix, exact=False, rows=rows))
    assert np.allclose(built.coordinates.scale.numpy() ** -2, np.arange(1, 11), rtol=1e-14)
    assert built.notes == ("from estimated row norms",)


@pytest.mark.parametrize("d", [torch.ones(10).double(), grading(decades=2.0)])
def test_the_check_of_van_der_sluis_shows_both_condition_numbers(d):
    matrix = scaled(indefinite(), d)
    dense = matrix.numpy()
    scaled_rows = dense / np.linalg.norm(dense, axis=1, keepdims=True)
    left, right = np.linalg.cond(scaled_rows), np.sqrt(10) * np.linalg.cond(dense)
    assert left <= right
    (note,) = rownorm(scene(matrix)).notes
    assert f"kappa_2(MH) = {left:.3g} <= sqrt(10) kappa_2(H) = {right:.3g}" in note
    assert "one-sided" in note


def test_the_check_of_van_der_sluis_leaves_out_zero_rows_and_the_null_space():
    full = torch.zeros(5, 5).double()
    factor = drawn(4, 2)
    full[:4, :4] = factor @ factor.T  # rank 2
    dense = full[:4, :4].numpy()
    rows = dense / np.linalg.norm(dense, axis=1, keepdims=True)
    left, right = (np.linalg.svd(m)[1] for m in (rows, dense))
    (note,) = rownorm(scene(full)).notes
    limit = 2 * right[0] / right[1]
    assert f"= {left[0] / left[1]:.3g} <= sqrt(4) kappa_2(H) = {limit:.3g}" in note


def test_the_check_of_van_der_sluis_says_when_rounding_hides_the_rank():
    (note,) = rownorm(scene(torch.diag(double([1, 1e-20])))).notes[:1]
    assert "not checked, for 1 singular values of H and 2 of MH are above rounding" in note


def test_a_definite_block_gets_the_two_sided_statement():
    matrix = scaled(two_cyclic(double([0.1, 0.5])), grading(4))
    note = rownorm(scene(matrix)).notes[1]
    assert "two-sided: kappa with unit diagonal is 3, at most 4 times that of the best" in note
    assert len(rownorm(scene(indefinite())).notes) == 1


@pytest.mark.parametrize("matrix", [definite(), indefinite(), scaled(indefinite(), grading())])
def test_ruiz_makes_all_rows_norm_one(matrix):
    built = ruiz(scene(matrix))
    dense = congruence(matrix, built.coordinates).numpy()
    assert np.abs(np.linalg.norm(dense, axis=1) - 1).max() < 1e-9
    assert built.notes == ()


def test_ruiz_tells_that_a_rectangular_saddle_has_no_such_scaling():
    matrix = double([[0, 1, 1], [1, 0, 0], [1, 0, 0]])
    built = ruiz(scene(matrix))
    assert "there may be no scaling that makes them equal" in built.notes[0]
    norms = congruence(matrix, built.coordinates).norm(dim=1)
    assert f"within {float((norms - 1).abs().max()):.2g} of 1" in built.notes[0]


def test_ruiz_without_a_matrix_spends_eighty_products_and_says_so():
    matrix = scaled(indefinite(60), grading(60, 2.0))
    made = scene(matrix, exact=False)
    built = ruiz(made)
    norms = congruence(matrix, built.coordinates).norm(dim=1)
    assert float(norms.min()) > 0.5
    assert float(norms.max()) < 2
    assert made.product.count == 80
    assert built.notes[0].startswith("estimated from 80 products")
    again = ruiz(scene(matrix, exact=False)).coordinates.scale
    assert torch.equal(built.coordinates.scale, again)
    assert not torch.equal(again, ruiz(scene(matrix, exact=False, seed=1)).coordinates.scale)


SIGNS = double([3, 2e-3, 1, -1e-4, -5, 7e-8])


def turned(value, seed=0):
    vector = torch.linalg.qr(drawn(len(value), len(value), seed=seed))[0]
    matrix = (vector * value) @ vector.T
    return (matrix + matrix.T) / 2


def test_the_inverse_of_one_layer_leaves_only_signs_and_zeros():
    value = torch.cat([SIGNS, torch.zeros(2).double()])
    matrix = turned(value)
    built = block_inverse(scene(matrix))
    found = np.linalg.eigvalsh(congruence(matrix, built.coordinates).numpy())
    assert np.allclose(found, [-1, -1, 0, 0, 1, 1, 1, 1], atol=1e-7)
    assert built.notes == ("2 eigenvalues within tolerance of zero kept a common scale",)


def test_the_inverse_is_that_of_the_absolute_value_and_null_directions_keep_a_common_scale():
    value = double([4, -9, 1e-20, 25])
    vector = torch.linalg.qr(drawn(4, 4))[0]
    matrix = (vector * value) @ vector.T
    p = block_inverse(scene((matrix + matrix.T) / 2)).coordinates.apply(torch.eye(4).double()).T
    expected = (vector / double([4, 9, 25, 25])) @ vector.T
    assert torch.allclose(p @ p.T, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("matrix", [definite(6), indefinite(6), turned(SIGNS)])
def test_the_inverse_undoes_itself(matrix):
    coordinates = block_inverse(scene(matrix)).coordinates
    vector = drawn(6, seed=9)
    assert torch.allclose(coordinates.inverse(coordinates.apply(vector)), vector, atol=1e-8)


@pytest.mark.parametrize("decades", [3, 9])
def test_the_inverse_of_a_graded_definite_layer_has_all_its_digits(decades):
    # eigh has no digit of the small eigenvalues here: κ is 1e12 to 1e36.
    d = torch.logspace(-2 * decades, 0, 4, dtype=torch.float64)
    matrix = scaled(equal_squares(), d)
    coordinates = block_inverse(scene(matrix)).coordinates
    assert torch.allclose(
        congruence(matrix, coordinates), torch.eye(4).double(), rtol=0, atol=1e-11
    )
    p = coordinates.apply(torch.eye(4).double()).T
    exact = torch.linalg.inv(equal_squares()) / d[:, None] / d
    assert torch.allclose((p @ p.T) * d[:, None] * d, exact * d[:, None] * d, rtol=1e-10)
    assert block_inverse(scene(matrix)).notes == ()


def test_the_inverse_is_taken_layer_by_layer_and_leaves_the_couplings():
    sizes = {"one.weight": 3, "two.weight": 2, "one.bias": 1, "two.bias": 2}
    matrix = definite(8)
    layers = [[0, 1, 2, 5], [3, 4, 6, 7]]
    built = block_inverse(scene(matrix, sizes=sizes))
    found = congruence(matrix, built.coordinates)
    for places in layers:
        part = found[places][:, places]
        assert torch.allclose(part, torch.eye(4).double(), atol=1e-10)
    inverse = np.zeros((8, 8))
    for places in layers:
        inverse[np.ix_(places, places)] = np.linalg.inv(matrix.numpy()[np.ix_(places, places)])
    expected = np.sort(np.linalg.eigvals(inverse @ matrix.numpy()).real)
    assert np.allclose(np.linalg.eigvalsh(found.numpy()), expected, rtol=1e-8)
    assert built.notes == ("block-diagonal over 2 layers: couplings between them remain",)


def test_dead_rows_of_a_layer_stay_as_they_are():
    matrix = without_row(definite(), [2, 7])
    coordinates = block_inverse(scene(matrix)).coordinates
    unit = torch.eye(10).double()
    assert torch.equal(coordinates.apply(unit[2]), unit[2])
    assert torch.equal(coordinates.transposed(unit[7]), unit[7])
    value = torch.linalg.eigvalsh(congruence(matrix, coordinates))
    assert torch.allclose(value, double([0, 0, *[1] * 8]), atol=1e-10)


def test_the_inverse_takes_the_matrix():
    with pytest.raises(NotApplicable, match=r"3 parameters are above the exact limit.*--exact"):
        block_inverse(scene(torch.eye(3).double(), exact=False))


def test_above_two_thousand_rows_the_check_of_van_der_sluis_is_left_out():
    rows = torch.arange(1, 2050).double()
    built = rownorm(scene(torch.diag(rows)))
    assert built.notes == ("van der Sluis: not checked above 2048 rows",)
    assert torch.equal(built.coordinates.scale, rows.rsqrt())
