import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.datasets import load_wine
from torch import nn

from hessdiag import hidden, streamed_qr
from hessdiag.activations import find_layers
from hessdiag.hidden import Streamed, affine_change, hidden_matrices
from hessdiag.streamed_qr import StreamedQR
from hessdiag.task import Task
from hessdiag.variants.affine import Affine
from hessdiag.variants.coordinates import Dense, Diagonal, Joined, identity

EPS = torch.finfo(torch.float64).eps
WINE = torch.tensor(load_wine().data)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def found(rows, change=None, parts=None):
    """What is found of the matrix whose columns are (1; row)."""
    streamed = Streamed(rows.shape[1], change)
    for part in rows.split(parts or len(rows)):
        streamed.add(part)
    return streamed.arrays()


def extended(rows):
    return np.vstack([np.ones(len(rows)), rows.numpy().T])


def squares(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def results(networks, model, data, loss=squares, **options):
    with networks.lent(Task(model, data, loss)) as (objective, _):
        layers = find_layers(objective.model)
        return {r.layer: r for r in hidden_matrices(objective, layers.values(), **options)}


def regression(inputs, model, sizes):
    torch.manual_seed(0)
    return [(x, torch.randn(len(x), *model(x.float()).shape[1:])) for x in inputs.split(sizes)]


def spread(count, features, condition, seed=0):
    """A matrix (count, features) of known singular values, from 1 down to 1 / condition."""
    left = torch.linalg.qr(normal(count, features, seed=seed)).Q
    right = torch.linalg.qr(normal(features, features, seed=seed + 1)).Q
    return left * torch.logspace(0, -math.log10(condition), features, dtype=torch.float64) @ right


def test_kappa_of_the_wine_data_raw_and_standardised():
    assert found(WINE, parts=50)["kappa"] == pytest.approx(21421.2, rel=1e-5)
    mean, scale = WINE.mean(dim=0), WINE.std(dim=0, correction=0)
    standard = found(WINE, lambda rows: (rows - mean) / scale, parts=50)
    assert standard["kappa"] == pytest.approx(6.74691, rel=1e-6)
    assert standard["row_norm"] == pytest.approx(np.full(14, math.sqrt(178)))


def test_norms_cosines_and_singular_values_are_those_of_the_dense_matrix():
    rows = normal(41, 5) * torch.tensor([1.0, 1e-6, 1e6, 3.0, 1.0]) + torch.tensor([0, 1, 0, 2, -9])
    arrays, dense = found(rows, parts=7), extended(rows)
    norms = np.linalg.norm(dense, axis=1)
    assert arrays["row_norm"] == pytest.approx(norms, rel=1e-13)
    assert arrays["column_norm"] == pytest.approx(np.linalg.norm(dense, axis=0), rel=1e-13)
    assert arrays["bias_cosine"] == pytest.approx(dense @ dense[0] / norms / norms[0], abs=1e-13)
    assert arrays["bias_cosine"][5] < -0.9
    values = np.linalg.svd(dense, compute_uv=False)
    assert arrays["singular_value"] == pytest.approx(values, rel=0, abs=1e-14 * values[0])
    assert arrays["rank"] == 6


@pytest.mark.parametrize("parts", [1, 13, 400])
def test_streaming_qr_resolves_a_condition_of_1e12_where_the_gram_matrix_cannot(parts):
    matrix = spread(400, 6, 1e12)
    streamed = StreamedQR(6)
    for part in matrix.split(parts):
        streamed.add(part)
    values = torch.linalg.svdvals(streamed.result())
    assert float(values[0] / values[-1]) == pytest.approx(1e12, rel=1e-2)
    gram = torch.linalg.eigvalsh(matrix.T @ matrix).abs().sqrt()
    assert float(gram[-1] / gram[0]) < 1e10


def test_the_factor_is_triangular_and_has_the_gram_matrix_of_all_rows(monkeypatch):
    monkeypatch.setattr(streamed_qr, "SLAB", 8)
    matrix = normal(50, 4)
    streamed = StreamedQR(4)
    for part in matrix.split(3):
        streamed.add(part)
    factor = streamed.result()
    assert factor.shape == (4, 4)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor, matrix.T @ matrix, atol=1e-13)


def test_rows_that_wait_do_not_hold_the_batch_they_came_in():
    for count in (3, 5000):
        numbers = np.ones((count, 2))
        batch = weakref.ref(numbers)
        streamed = StreamedQR(2)
        streamed.add(torch.from_numpy(numbers))
        del numbers
        assert batch() is None
        assert streamed.result()[0, 0].abs() == pytest.approx(math.sqrt(count))


def test_a_large_batch_is_looked_at_in_pieces(monkeypatch):
    rows, pieces = normal(100, 3) + 2, []

    def change(part):
        pieces.append(len(part))
        return 2 * part

    whole = found(rows, lambda part: 2 * part)
    monkeypatch.setattr(hidden, "NUMBERS", 4 * 15)
    parts = found(rows, change)
    assert pieces == [15] * 6 + [10]
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name


def test_layers_share_a_pass_while_what_they_hold_and_one_factorisation_fit(networks):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    calls = []

    def loss(model, batch):
        calls.append(1)
        return squares(model, batch)

    # A layer: 4 rows of R and 4096 that wait, 4 columns; their copy while one is factorised.
    held, copied = 8 * 4 * (4 + 4096), 2 * 8 * 4 * (4 + 4096)
    for memory, passes in ((2 * held + copied, 1), (2 * held + copied - 1, 2)):
        calls.clear()
        results(networks, model, [(torch.randn(5, 3), torch.randn(5, 3))], loss, memory=memory)
        assert len(calls) == passes


def test_fewer_positions_than_features_leave_as_many_singular_values():
    rows = normal(3, 7)
    arrays = found(rows)
    values = np.linalg.svd(extended(rows), compute_uv=False)
    assert arrays["singular_value"] == pytest.approx(values, rel=1e-12)
    assert arrays["rank"] == 3
    assert arrays["kappa"] == pytest.approx(values[0] / values[2], rel=1e-12)


def test_rank_counts_singular_values_above_ten_sizes_of_rounding():
    exact = normal(60, 3)
    assert found(torch.cat([exact, exact[:, :1] + exact[:, 1:2]], dim=1))["rank"] == 4
    tolerance = 10 * 60 * EPS
    for factor, rank in ((3.0, 2), (0.3, 1)):
        # [e; t u] with u orthogonal to e and of its length: singular values √60 (1, t).
        rows = factor * tolerance * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(30)
        arrays = found(rows[:, None])
        assert arrays["rank"] == rank
        assert arrays["kappa"] == pytest.approx(1 / (factor * tolerance) if rank == 2 else 1)


def test_dead_and_constant_features_are_told_apart():
    rows = torch.cat([normal(20, 1), torch.zeros(20, 1), torch.full((20, 1), 0.7)], dim=1).double()
    arrays = found(rows, parts=6)
    assert arrays["dead"].tolist() == [False, False, True, False]
    assert arrays["constant"].tolist() == [True, False, True, True]
    assert np.isnan(arrays["bias_cosine"]).tolist() == [False, False, True, False]
    assert arrays["bias_cosine"][3] == pytest.approx(1.0, abs=1e-15)
    assert arrays["rank"] == 2


def test_a_feature_that_varies_by_a_billionth_is_not_constant():
    rows = 1 + 1e-9 * normal(20, 1)
    assert found(rows)["constant"].tolist() == [True, False]
    assert found(1 + EPS * normal(20, 1).round())["constant"].tolist() == [True, True]


@pytest.mark.parametrize("noise", [0.0, 1e-17, 1e-11])
@pytest.mark.parametrize("left", [0.0, 1e-17])
def test_a_constant_feature_that_is_centred_is_dead_though_rounding_leaves_something(left, noise):
    rows = torch.cat([normal(30, 1), torch.full((30, 1), 0.1, dtype=torch.float64)], dim=1)
    rest = torch.cat([rows[:, :1], left + noise * normal(30, 1, seed=3)], dim=1)
    arrays = found(rows, lambda _: rest)
    assert arrays["dead"].tolist() == [False, False, True]
    assert arrays["row_norm"][2] == 0
    assert np.isnan(arrays["bias_cosine"]).tolist() == [False, False, True]
    assert arrays["rank"] == 2


def test_centring_lowers_kappa_where_the_rows_are_independent():
    for seed in range(5):
        assert found(normal(30, 4, seed=seed) + 3)["centring_holds"] == 1
    assert found(spread(60, 5, 1e11) + 1)["centring_holds"] == 1


def test_centring_raises_kappa_in_the_rank_deficient_counterexample():
    # maths 4.4: X = [c e; u], u orthogonal to e, |u|² = N (1 + c²): κ₊ from 1 to √(1 + c²).
    for c, holds in ((2.0, 0), (0.0, 1)):
        side = math.sqrt(1 + c * c) * torch.tensor([1.0, -1.0]).repeat(10).double()
        rows = torch.stack([torch.full((20,), c, dtype=torch.float64), side], dim=1)
        arrays = found(rows)
        assert arrays["kappa"] == pytest.approx(1.0)
        assert arrays["rank"] == 2
        assert arrays["centring_holds"] == holds


def test_h_e_of_every_layer_of_a_network_over_ragged_batches(networks):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    inputs = torch.randn(23, 5)
    data = regression(inputs, model, 9)
    seen = results(networks, model, data)
    assert list(seen) == ["0", "2"]
    assert [seen[name].index for name in seen] == [1, 3]  # the root comes first
    after = torch.tanh(model.double()[0](inputs.double())).detach()
    for name, rows in (("0", inputs.double()), ("2", after)):
        values = np.linalg.svd(extended(rows), compute_uv=False)
        assert seen[name].hidden["singular_value"] == pytest.approx(values, rel=1e-12)
        assert seen[name].hidden["column_norm"].shape == (23,)
    assert results(networks, model, data, indices={"0": 4, "2": 7})["2"].index == 7


def test_one_pass_over_the_data_serves_all_layers_and_more_where_memory_is_short(networks):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    data = regression(torch.randn(10, 5), model, 5)
    calls = []

    def loss(model, batch):
        calls.append(1)
        return squares(model, batch)

    usual = results(networks, model, data, loss)
    assert len(calls) == 2
    short = results(networks, model, data, loss, memory=1)
    assert len(calls) == 6
    for name in usual:
        for key, value in usual[name].hidden.items():
            assert np.array_equal(short[name].hidden[key], value, equal_nan=True)


@pytest.mark.parametrize("groups", [1, 2])
def test_columns_of_a_convolution_are_its_patches_of_the_worst_group(networks, groups):
    torch.manual_seed(2)
    model = nn.Conv2d(4, 2, 3, padding=1, stride=2, groups=groups)
    inputs = torch.randn(5, 4, 6, 5)
    inputs[:, 3] *= 100
    seen = results(networks, model, regression(inputs, model, 3))[""].hidden
    patches = F.unfold(inputs.double(), 3, padding=1, stride=2)  # (5, 36, positions)
    worst = patches[:, -36 // groups :]
    dense = extended(worst.mT.reshape(-1, worst.shape[1]))
    values = np.linalg.svd(dense, compute_uv=False)
    assert seen["singular_value"] == pytest.approx(values, rel=1e-10)
    assert seen["row_norm"] == pytest.approx(np.linalg.norm(dense, axis=1))
    other = patches[:, : 36 // groups]
    kappa = np.linalg.cond(extended(other.mT.reshape(-1, other.shape[1])))
    assert groups == 1 or seen["kappa"] > 2 * kappa


def test_an_input_that_was_replaced_is_seen_as_the_layer_sees_it(networks):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    inputs = torch.randn(23, 5)
    data = regression(inputs, model, 9)
    model[0].register_forward_pre_hook(lambda _module, args: (7 * args[0],))
    seen = results(networks, model, data)["0"].hidden
    norms = np.linalg.norm(extended(7 * inputs.double()), axis=1)
    assert seen["row_norm"] == pytest.approx(norms, rel=1e-12)


def test_a_layer_that_is_never_called_is_left_out_with_the_reason(networks):
    torch.manual_seed(3)
    case = networks.make("tied transformer")
    reasons = {}
    seen = results(networks, case.model, case.data, case.loss, reasons=reasons)
    assert list(seen) == ["head"]
    assert list(reasons) == ["attention.out_proj"]
    assert "never called" in reasons["attention.out_proj"]


def test_infinite_inputs_are_left_out_with_the_reason(networks):
    model = nn.Linear(2, 1)
    data = [(torch.tensor([[1.0, math.inf]]), torch.zeros(1, 1))]
    reasons = {}
    assert not results(networks, model, data, reasons=reasons)
    assert reasons == {"": "its inputs are not finite"}


def test_above_the_limit_of_features_the_statistics_stay(networks, monkeypatch):
    monkeypatch.setattr(hidden, "MOST_FEATURES", 5)
    monkeypatch.setattr(hidden, "MOST_COLUMNS", 20)
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    inputs = torch.randn(23, 5)
    reasons = {}
    seen = results(networks, model, regression(inputs, model, 9), reasons=reasons)
    first = seen["0"].hidden
    assert "singular_value" not in first
    assert "column_norm" not in first
    assert np.isnan([first["kappa"], first["rank"], first["centring_holds"]]).all()
    norms = np.linalg.norm(extended(inputs.double()), axis=1)
    assert first["row_norm"] == pytest.approx(norms, rel=1e-6)
    assert seen["2"].hidden["rank"] == 5
    assert list(reasons) == ["0"]


def test_singular_values_that_take_too_long_are_left_out_too(networks, monkeypatch):
    monkeypatch.setattr(hidden, "MOST_WORK", 23 * 6**2 - 1)
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    reasons = {}
    seen = results(networks, model, regression(torch.randn(23, 5), model, 9), reasons=reasons)
    assert "singular_value" not in seen["0"].hidden
    assert seen["2"].hidden["rank"] == 5
    assert reasons == {
        "0": "singular values are left out for 5 features at 23 positions; "
        "--max-examples takes fewer"
    }


def test_float32_inputs_have_the_tolerance_of_float32(networks):
    model = nn.Linear(2, 1)
    inputs = torch.randn(30, 1, generator=rng(5)) * torch.tensor([[1.0, 1e-6]])
    data = [(inputs + 1e-9 * torch.randn(30, 2, generator=rng(6)), torch.zeros(30, 1))]
    with networks.lent(Task(model, data, squares), dtype=torch.float32) as (objective, _):
        (seen,) = hidden_matrices(objective, find_layers(objective.model).values())
    assert seen.hidden["rank"] == 2
    with networks.lent(Task(model, data, squares)) as (objective, _):
        (seen,) = hidden_matrices(objective, find_layers(objective.model).values())
    assert seen.hidden["rank"] == 3


def places(outputs, features, bias=True):
    weight = torch.arange(outputs * features).reshape(outputs, features)
    return weight, outputs * features + torch.arange(outputs) if bias else None


def folded(outputs, scale, shift):
    """P with Pᵀ(h; 1) = (D h + c; 1) for every neuron, as a dense matrix."""
    features = len(scale)
    weight, bias = places(outputs, features)
    matrix = torch.eye(outputs * (features + 1), dtype=torch.float64)
    for neuron in range(outputs):
        matrix[weight[neuron], weight[neuron]] = scale
        matrix[bias[neuron], weight[neuron]] = shift
    return Dense(matrix, torch.linalg.inv(matrix))


def test_the_change_of_the_inputs_is_read_off_the_coordinates():
    scale, shift = torch.tensor([2.0, 1e-6, 30.0]).double(), torch.tensor([1.0, -5.0, 0.0]).double()
    coordinates = folded(4, scale, shift)
    change = affine_change(coordinates, *places(4, 3))
    rows = normal(6, 3)
    assert torch.allclose(change(rows), rows * scale + shift, rtol=1e-14)
    # Pᵀ of the gradient of Σ_i g_i (w_i·h + b_i) is that gradient with the changed inputs.
    g = normal(4, seed=8)
    before = torch.cat([torch.outer(g, rows[0]).reshape(-1), g])
    after = torch.cat([torch.outer(g, change(rows)[0]).reshape(-1), g])
    assert torch.allclose(coordinates.transposed(before), after, rtol=1e-13)


def hidden_by_its_mean(big):
    """Two features that are nearly the same, far from zero; standardised in extended precision."""
    base = normal(40, 2, seed=3)
    rows = torch.stack([base[:, 0], base[:, 0] + 1e-3 * base[:, 1]], dim=1) + big
    wide = rows.numpy().astype(np.longdouble)
    mean = wide.mean(axis=0)
    spread = np.sqrt(((wide - mean) ** 2).mean(axis=0))
    truth = ((wide - mean) / spread).astype(float)
    scale = torch.from_numpy(spread.astype(float))
    return rows, Affine(torch.from_numpy(mean.astype(float))[None], scale[None], 2), truth


@pytest.mark.parametrize("big", [1e9, 1e12])
def test_what_a_large_mean_hides_is_kept_to_the_rounding_of_the_mean_itself(big):
    rows, affine, truth = hidden_by_its_mean(big)
    change = affine_change(affine, *places(2, 2))
    mean, scale = affine.mean[0].numpy(), affine.scale[0].numpy()
    exact = ((rows.numpy().astype(np.longdouble) - mean) / scale).astype(float)
    assert change(rows).numpy() == pytest.approx(exact, rel=1e-15)
    arrays = found(rows, change)
    kappa = np.linalg.cond(np.vstack([np.ones(40), truth.T]))
    assert arrays["kappa"] == pytest.approx(kappa, rel=1e-6)
    error = float(arrays["kappa"] * arrays["input_error"])
    assert abs(arrays["kappa"] / kappa - 1) < error
    assert error == pytest.approx(EPS * big * kappa, rel=0.5)


def test_the_mean_of_affine_coordinates_is_taken_as_it_is_wherever_they_stand():
    features = 200
    mean, scale = 3 + normal(1, features), 1 + normal(1, features, seed=1).abs()
    affine = Affine(mean, scale, 2)
    weight, bias = places(2, features)
    taken = affine_change(affine, weight, bias)(mean)
    assert torch.equal(taken, torch.zeros_like(mean))
    shift = torch.randperm(affine.size + 5, generator=rng())
    block = Joined([(shift[:-5], affine), (shift[-5:], identity(scale[0, :5]))])
    assert torch.equal(affine_change(block, shift[weight], shift[bias])(mean), taken)
    others = folded(2, 1 / scale[0], -mean[0] / scale[0])
    left = affine_change(others, weight, bias)(mean).abs()
    assert 0 < left.max() < 1e-14


def test_input_error_is_what_the_change_makes_of_the_rounding_of_the_inputs():
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)
    rows = torch.stack([1e6 + 4 * sign, torch.full((16,), 1e9, dtype=torch.float64)], dim=1)
    mean, scale = rows.mean(dim=0), torch.tensor([4.0, 1.0])
    # [e; ±1; 0]: singular values 4; of the feature ε |h| / 4 remains, of the constant one nothing.
    arrays = found(rows, lambda part: (part - mean) / scale, parts=5)
    assert arrays["singular_value"] == pytest.approx([4.0, 4.0, 0.0], abs=1e-12)
    assert arrays["input_error"] == pytest.approx(EPS * 1e6 / 4, rel=1e-9)
    assert found(rows)["input_error"] == 0


def test_the_change_of_a_layer_is_found_inside_a_larger_block():
    scale, shift = torch.tensor([2.0, 3.0]).double(), torch.tensor([1.0, -5.0]).double()
    inner = folded(2, scale, shift)
    order = torch.tensor([7, 0, 6, 1, 5, 2])  # the layer's places in a block of 9
    rest = torch.tensor([3, 4, 8])
    block = Joined([(order, inner), (rest, Diagonal(torch.full((3,), 9.0).double()))])
    weight, bias = places(2, 2)
    change = affine_change(block, order[weight], order[bias])
    rows = normal(4, 2)
    assert torch.allclose(change(rows), rows * scale + shift)


def test_without_a_bias_features_are_scaled_only():
    scale = torch.tensor([2.0, 3.0]).double()
    change = affine_change(Diagonal(scale.repeat(3)), *places(3, 2, bias=False))
    assert torch.allclose(change(normal(4, 2)), normal(4, 2) * scale)


def test_coordinates_that_are_no_change_of_the_inputs_are_told_so():
    weight, bias = places(3, 2)
    scales = torch.rand(9, generator=rng()).double() + 1
    assert affine_change(Diagonal(scales), weight, bias) is None  # neurons differ
    assert affine_change(identity(scales), weight, bias) is None
    same = torch.cat([torch.tensor([2.0, 3.0]).repeat(3), torch.full((3,), 5.0)]).double()
    assert affine_change(Diagonal(same), weight, bias) is None  # the row of ones is scaled
    mixed = torch.eye(9, dtype=torch.float64)
    mixed[0, 1] = 0.5  # features are mixed in one neuron
    assert affine_change(Dense(mixed, torch.linalg.inv(mixed)), weight, bias) is None
