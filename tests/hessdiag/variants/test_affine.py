import pytest
import torch

from hessdiag.variants.affine import Affine
from lent_scenes import dense


def drawn(sets, features, outputs, seed=0):
    made = torch.Generator().manual_seed(seed)
    mean = torch.randn(sets, features, generator=made, dtype=torch.float64)
    scale = 0.2 + torch.rand(sets, features, generator=made, dtype=torch.float64)
    return Affine(mean, scale, outputs)


def by_the_book(affine):
    """P = U D of every neuron, bias first, moved to torch's order."""
    features, outputs = affine.mean.shape[1], affine.outputs
    n = outputs * (features + 1)
    whole = torch.zeros(n, n, dtype=torch.float64)
    for neuron in range(outputs):
        row = neuron * len(affine.mean) // outputs
        u = torch.eye(features + 1, dtype=torch.float64)
        u[0, 1:] = -affine.mean[row]
        d = torch.diag(torch.cat([torch.ones(1), 1 / affine.scale[row]]))
        weight = torch.arange(neuron * features, (neuron + 1) * features)
        places = torch.cat([torch.tensor([outputs * features + neuron]), weight])
        whole[places[:, None], places] = u @ d
    return whole


SHAPES = {"linear": (1, 4, 3), "groups": (2, 3, 4), "neurons": (3, 2, 3), "one feature": (1, 1, 2)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_u_times_d_of_equation_25(shape):
    affine = drawn(*shape)
    expected = by_the_book(affine)
    vectors = torch.randn(5, 2, affine.size, dtype=torch.float64)
    assert affine.size == len(expected)
    torch.testing.assert_close(dense(affine), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(affine.apply(vectors), vectors @ expected.T)
    torch.testing.assert_close(affine.transposed(vectors), vectors @ expected)
    torch.testing.assert_close(affine.inverse(vectors), vectors @ torch.linalg.inv(expected).T)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("stretch", [1e-6, 1.0, 1e6])
def test_least_lies_below_the_smallest_eigenvalue_by_at_most_a_factor_of_two(shape, stretch):
    affine = drawn(*shape)
    affine = Affine(affine.mean * stretch, affine.scale, affine.outputs)
    inverted = torch.linalg.inv(by_the_book(affine))
    true = float(torch.linalg.matrix_norm(inverted, ord=2)) ** -2
    assert true / 2 * (1 - 1e-9) <= affine.least() <= true * (1 + 1e-12)


def test_least_is_no_larger_than_the_truth_where_the_bound_is_sharp():
    affine = Affine(torch.zeros(1, 3).double(), torch.full((1, 3), 3.0).double(), 2)
    assert 1 / 9 - 1e-13 <= affine.least() < 1 / 9


def test_it_is_diagonal_only_without_means():
    scale = torch.full((1, 3), 2.0).double()
    assert Affine(torch.zeros(1, 3).double(), scale, 2).diagonal
    assert not drawn(1, 3, 2).diagonal


def test_vectors_keep_their_dtype():
    vector = torch.randn(drawn(1, 4, 3).size)
    for side in (Affine.apply, Affine.transposed, Affine.inverse):
        assert side(drawn(1, 4, 3), vector).dtype == torch.float32
