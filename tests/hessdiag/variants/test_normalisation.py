import dataclasses

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.datasets import load_wine
from torch import nn

from hessdiag import Task
from hessdiag.variants.affine import Affine
from hessdiag.variants.coordinates import congruence
from hessdiag.variants.normalisation import bnp, bnp_floor, bnp_s, minmax, standardize
from hessdiag.variants.scene import NotApplicable
from lent_scenes import dense, lent_scene
from sample_networks import Case, dense_hessian, mse, pinn, pinn_leaf_loss


@pytest.fixture(autouse=True)
def same_numbers():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def half_squares(model, batch):
    return 0.5 * (model(batch[0]) - batch[1]).square().mean()


def parameters_of(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def case_of(model, data, loss=mse):
    sizes = [float(len(batch[0])) for batch in data]
    return Case(model.double(), data, loss, sizes, trainable=parameters_of(model))


def regression(*shape, out=2, sizes=(7, 4), shift=0.0):
    data = []
    for n in sizes:
        x = torch.randn(n, *shape, dtype=torch.float64) * torch.linspace(0.5, 4, shape[-1])
        data.append((x + shift, torch.randn(n, out, dtype=torch.float64)))
    return data


def features_of(layer, given):
    """What the weights of a layer multiply, (values, inputs or channels), written out."""
    if isinstance(layer, nn.Linear):
        return given.reshape(-1, given.shape[-1])
    padded = pad(layer, given)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        reach = dilation * (kernel - 1) + 1
        padded = padded.unfold(axis, reach, stride)[..., ::dilation]
    return padded.transpose(0, 1).reshape(padded.shape[1], -1).T


def pad(layer, given):
    sides = [side for padding in reversed(layer.padding) for side in (padding, padding)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(given, sides, mode=mode)


class Folded(nn.Module):
    """The layer with inputs (h - mu) / s and weights changed so that its function is the same."""

    def __init__(self, layer, mean, scale):
        super().__init__()
        self.layer, self.mean, self.scale = [layer], mean, scale
        expand = mean.numel() // layer.weight.shape[1]  # groups of a convolution
        weight = layer.weight.detach()
        grouped = weight.reshape(expand, -1, *weight.shape[1:])
        mine = [m.reshape(expand, 1, -1, *[1] * (weight.ndim - 2)) for m in (mean, scale)]
        self.weight = nn.Parameter((grouped * mine[1]).reshape(weight.shape))
        moved = (grouped * mine[0]).reshape(len(weight), -1).sum(dim=1)
        self.bias = nn.Parameter(layer.bias.detach() + moved)

    def forward(self, given):
        (layer,) = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear((given - self.mean) / self.scale, self.weight, self.bias)
        shape = (-1, *[1] * len(layer.kernel_size))
        normal = (pad(layer, given) - self.mean.view(shape)) / self.scale.view(shape)
        convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        return convolve(
            normal, self.weight, self.bias, layer.stride, 0, layer.dilation, layer.groups
        )


def moments(values):
    return values.mean(dim=0), values.std(dim=0, correction=0)


def standardised(model, data, describe=moments, only=None):
    """The whole network with every Linear and convolution layer folded."""
    given = torch.cat([x for x, _ in data]).double()
    layers = []
    for index, layer in enumerate(model):
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
        if isinstance(layer, kinds) and (only is None or index in only):
            layers.append(Folded(layer, *describe(features_of(layer, given))))
        else:
            layers.append(layer)
        given = layer(given).detach()
    return nn.Sequential(*layers)


NETWORKS = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.ELU(), nn.Linear(3, 2)),
        regression(3, shift=1.0),
    ),
    "sequence": lambda: (
        nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)),
        regression(4, 3),
    ),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 2, 2, dilation=2, padding=1, padding_mode="circular"),
            nn.Flatten(),
            nn.Linear(18, 2),
        ),
        regression(2, 5, 5, shift=3.0),
    ),
    "one dimension": lambda: (
        nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)),
        regression(2, 5),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_bnp_is_the_hessian_of_the_network_that_was_standardised_and_folded(name):
    model, data = NETWORKS[name]()
    model = model.double()
    folded = standardised(model, data)
    torch.testing.assert_close(folded(data[0][0]), model(data[0][0]))
    expected = dense_hessian(case_of(folded, data))
    hessian = dense_hessian(case_of(model, data))
    with lent_scene(case_of(model, data).task) as scene:
        built = bnp(scene)
    found = congruence(hessian, built.coordinates)
    assert built.source == "activations"
    assert not built.coordinates.diagonal
    assert float((found - expected).norm()) <= 1e-10 * float(expected.norm())
    for layer in (layer for layer in folded if isinstance(layer, Folded)):
        assert (layer.scale != 1).all()  # every layer was really changed


@pytest.mark.parametrize("maker", [standardize, minmax], ids=["standardize", "minmax"])
def test_input_normalisation_changes_the_first_layer_alone(maker):
    model, data = NETWORKS["mlp"]()
    model = model.double()

    def describe(values):
        if maker is standardize:
            return moments(values)
        return values.amin(dim=0), values.amax(dim=0) - values.amin(dim=0)

    expected = dense_hessian(case_of(standardised(model, data, describe, only={0}), data))
    case = case_of(model, data)
    with lent_scene(case.task) as scene:
        built = maker(scene)
        first = dataclasses.replace(
            scene.block, parameters=("0.weight", "0.bias"), size=16, name="0"
        )
        alone = maker(dataclasses.replace(scene, block=first, dead=scene.dead[:16]))
        later = dataclasses.replace(first, parameters=("2.weight", "2.bias"), size=15, name="2")
        with pytest.raises(NotApplicable, match="no input layer"):
            maker(dataclasses.replace(scene, block=later))
    found = congruence(dense_hessian(case), built.coordinates)
    assert float((found - expected).norm()) <= 1e-10 * float(expected.norm())
    assert "left as they are: 2.weight, 2.bias, 4.weight, 4.bias" in built.notes
    cut = congruence(dense_hessian(case)[:16, :16], alone.coordinates)
    torch.testing.assert_close(cut, found[:16, :16])
    assert alone.notes == ()


@pytest.mark.parametrize("first_class_only", [False, True])
def test_raw_wine_data_have_the_known_condition_numbers(first_class_only):
    features, target = load_wine(return_X_y=True)
    x, y = torch.tensor(features), torch.tensor(target)
    y = ((y == 0) if first_class_only else y).double()[:, None]
    case = case_of(nn.Linear(13, 1), [(x[:100], y[:100]), (x[100:], y[100:])], half_squares)
    hessian = dense_hessian(case)
    with lent_scene(case.task) as scene:
        found = {maker.__name__: maker(scene).coordinates for maker in (standardize, bnp, minmax)}
    mean = found["bnp"].mean
    found["centred"] = Affine(mean, torch.ones_like(mean), 1)
    kappa = {}
    for name, coordinates in found.items():
        values = torch.linalg.eigvalsh(congruence(hessian, coordinates))
        kappa[name] = float(values[-1] / values[0])
    raw = torch.linalg.eigvalsh(hessian)
    assert float(raw[-1] / raw[0]) == pytest.approx(4.5887e8, rel=2e-5)
    assert kappa["centred"] == pytest.approx(1.2092e7, rel=5e-5)
    assert kappa["standardize"] == pytest.approx(45.5208, rel=2e-6)
    assert kappa["bnp"] == pytest.approx(45.5208, rel=2e-6)
    assert kappa["minmax"] == pytest.approx(754.10, rel=1e-5)


def statistics_of(x, maker=bnp, dtype=torch.float64):
    """What the maker subtracts from and divides the inputs of one Linear layer by."""
    data = [(part, torch.randn(len(part), 1)) for part in x.split([5, 1, len(x) - 6])]
    with lent_scene(Task(nn.Linear(x.shape[1], 1), data, mse), dtype=dtype) as scene:
        built = maker(scene)
    return built.coordinates.mean[0], built.coordinates.scale[0], built.notes


def test_a_large_mean_does_not_spoil_the_variance():
    apart = torch.randn(50, 2, dtype=torch.float64)
    apart = (apart * 2**20).round() / 2**20  # so that 1e8 + apart is exact
    mean, scale, _ = statistics_of(1e8 + apart)
    torch.testing.assert_close(mean, 1e8 + apart.mean(dim=0), rtol=1e-15, atol=0)
    torch.testing.assert_close(scale, apart.std(dim=0, correction=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("maker", [bnp, standardize, minmax])
def test_constant_inputs_keep_scale_one_and_lose_their_mean(maker):
    x = torch.randn(20, 4, dtype=torch.float64)
    x[:, 1], x[:, 2], x[:, 3] = 3.7, 0.0, 0.3
    x[::2, 3] = 0.1 + 0.2  # the same but for rounding
    mean, scale, notes = statistics_of(x, maker)
    assert scale[0] != 1
    assert scale[1:].tolist() == [1, 1, 1]
    torch.testing.assert_close(mean[1:], torch.tensor([3.7, 0, 0.3]).double())
    assert notes == ("3 of 4 inputs of the network are constant and keep scale 1",)


def test_small_variations_are_no_constants():
    _, scale, notes = statistics_of(1 + 1e-10 * torch.randn(20, 1, dtype=torch.float64))
    assert 1e-11 < float(scale) < 1e-9
    assert notes == ()


def test_the_floor_is_the_papers():
    x = torch.randn(30, 3, dtype=torch.float64) * torch.tensor([10.0, 0.1, 0.0])
    mean, scale, _ = statistics_of(x, bnp_floor)
    variance = x.var(dim=0, correction=0)
    expected = (variance + 1e-2 * variance.max() + 1e-4).sqrt()
    torch.testing.assert_close(mean, x.mean(dim=0))
    torch.testing.assert_close(scale, expected)


def test_float32_networks_are_normalised_in_float64():
    x = torch.randn(40, 2)
    mean, scale, _ = statistics_of(x, dtype=torch.float32)
    torch.testing.assert_close(mean, x.double().mean(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scale, x.double().std(dim=0, correction=0), rtol=1e-12, atol=0)


def test_one_pass_over_the_data_serves_all_blocks_and_variants():
    model, data = NETWORKS["mlp"]()
    passes = []

    def counted(model, batch):
        passes.append(len(batch[0]))
        return mse(model, batch)

    with lent_scene(Task(model, data, counted)) as scene:
        for names in (scene.block.parameters, ("2.weight", "2.bias")):
            block = dataclasses.replace(scene.block, parameters=names)
            for maker in (bnp, bnp_floor):
                maker(dataclasses.replace(scene, block=block))
        assert passes == [7, 4]
        hooks = [m._forward_pre_hooks or m._forward_hooks for m in scene.model.modules()]
        assert not any(hooks)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(dim=1))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))[:, :2]


class Squared(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.square(), self.bias)


def tokens():
    return [(torch.randint(0, 5, (6, 4)), torch.randn(6, 2))]


PLAIN = {
    "bias=False": (lambda: nn.Linear(3, 2, bias=False), ["weight"], r"no bias to take up the mean"),
    "weight alone": (lambda: nn.Linear(3, 2), ["weight"], r"its bias is not in the block"),
    "bias alone": (lambda: nn.Linear(3, 2), ["bias"], r"its weight is not in the block"),
    "tied": (Twice, ["first.weight", "first.bias"], r"tied to another module's"),
    "more than linear": (lambda: Squared(3, 2), None, r"needs a Linear.*\(Squared is none\)"),
    "norm": (
        lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)),
        ["0.weight", "0.bias"],
        r"needs a Linear, Conv1d or Conv2d layer \(LayerNorm is none\)",
    ),
    "made weight": (
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 2)),
        None,
        r"needs a Linear",
    ),
    "infinite": (
        lambda: nn.Sequential(nn.Linear(3, 2), Scaled(1e200), nn.Linear(2, 2), Scaled(1e-200)),
        ["2.weight", "2.bias"],
        r"not finite, or their squares",
    ),
}


class Scaled(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x * self.by


@pytest.mark.parametrize(("build", "names", "reason"), PLAIN.values(), ids=PLAIN)
def test_a_block_that_bnp_cannot_change_is_told_why(build, names, reason):
    task = Task(build(), [(torch.randn(6, 3), torch.randn(6, 2))], mse)
    with lent_scene(task, names) as scene, pytest.raises(NotApplicable, match=reason):
        bnp(scene)


def test_an_embedding_has_nothing_to_normalise():
    with lent_scene(Task(Words(), tokens(), mse), ["embed.weight"]) as scene:
        for maker in (bnp, standardize):
            with pytest.raises(NotApplicable, match=r"one-hot, and it has no bias"):
                maker(scene)


def test_a_layer_behind_an_embedding_is_no_input_layer():
    with lent_scene(Task(Words(), tokens(), mse)) as scene:
        with pytest.raises(NotApplicable, match=r"depend on parameters"):
            standardize(scene)
        assert bnp(scene).notes == ("left as they are: embed.weight",)


def test_weights_that_attention_uses_itself_are_left_alone():
    task = Task(Attending(), [(torch.randn(6, 3, 4), torch.randn(6, 2))], mse)
    names = ["attention.out_proj.weight", "attention.out_proj.bias"]
    with lent_scene(task, names) as scene, pytest.raises(NotApplicable, match="never called"):
        bnp(scene)
    with lent_scene(task) as scene:
        (note,) = bnp(scene).notes
    assert note.startswith("left as they are: attention.in_proj_weight")


def test_several_reasons_are_told_by_layer():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), Twice())
    task = Task(model, [(torch.randn(6, 3), torch.randn(6, 2))], mse)
    with (
        lent_scene(task) as scene,
        pytest.raises(NotApplicable, match=r"^0: it has no bias.*; 1\.first: its weight.*tied"),
    ):
        bnp(scene)


def test_inputs_that_the_loss_differentiates_by_are_inputs_of_the_network():
    case = pinn(pinn_leaf_loss, requires_grad=True)
    with lent_scene(case.task, ["0.weight", "0.bias"]) as scene:
        assert isinstance(standardize(scene).coordinates, Affine)


def test_parameters_in_another_order_keep_their_places():
    model, data = NETWORKS["mlp"]()
    with lent_scene(Task(model, data, mse), ["0.weight", "0.bias"]) as scene:
        ordered = dense(bnp(scene).coordinates)
    with lent_scene(Task(model, data, mse), ["0.bias", "0.weight"]) as scene:
        swapped = dense(bnp(scene).coordinates)
    turn = torch.cat([torch.arange(12, 16), torch.arange(12)])
    torch.testing.assert_close(swapped, ordered[turn][:, turn])


def classes(n=40, features=3, count=3):
    x = torch.randn(n, features, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1]) + 2
    return [(x[:25], torch.randint(0, count, (25,))), (x[25:], torch.randint(0, count, (n - 25,)))]


def neuron_blocks(matrix, outputs, features):
    """The diagonal blocks of the neurons of one layer, bias first."""
    for neuron in range(outputs):
        weight = torch.arange(neuron * features, (neuron + 1) * features)
        places = torch.cat([torch.tensor([outputs * features + neuron]), weight])
        yield matrix[places[:, None], places]


def test_curvature_weighted_bnp_gives_each_neuron_a_constant_diagonal_and_a_decoupled_bias():
    case = case_of(nn.Linear(3, 3), classes(), cross_entropy)
    hessian = dense_hessian(case)
    with lent_scene(case.task) as scene:
        weighted = congruence(hessian, bnp_s(scene).coordinates)
        plain = congruence(hessian, bnp(scene).coordinates)
    for block in neuron_blocks(weighted, 3, 3):
        diagonal = block.diagonal()
        torch.testing.assert_close(diagonal, diagonal[:1].expand(4), rtol=1e-10, atol=0)
        assert float(block[0, 1:].abs().max()) <= 1e-12 * float(diagonal[0])
    for block in neuron_blocks(plain, 3, 3):
        assert float(block[0, 1:].abs().max()) > 1e-3 * float(block[0, 0])


def test_the_weights_are_the_second_derivatives_by_the_neurons_own_sum():
    model = nn.Linear(3, 3).double()
    data = classes()
    x = torch.cat([batch[0] for batch in data])
    p = torch.softmax(model(x).detach(), dim=1)
    weight = (p * (1 - p)).T / (p * (1 - p)).sum(dim=0)[:, None]
    mean = weight @ x
    scale = (weight @ x.square() - mean.square()).sqrt()
    with lent_scene(case_of(model, data, cross_entropy).task) as scene:
        coordinates = bnp_s(scene).coordinates
    torch.testing.assert_close(coordinates.mean, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(coordinates.scale, scale, rtol=1e-8, atol=0)


def test_neurons_of_negative_curvature_keep_their_coordinates():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    with torch.no_grad():  # a unit whose tanh is almost linear has S of one sign
        model[0].weight[0] *= 1e-3
        model[0].bias[0] = 0
        model[2].weight[:, 0] *= 10
    case = case_of(model, regression(3, sizes=(30, 20)))
    with lent_scene(case.task, ["0.weight", "0.bias"]) as scene:
        built = bnp_s(scene)
    coordinates = built.coordinates
    assert "5 of 6 neurons of 0 keep their coordinates" in built.notes[0]
    assert (coordinates.mean[1:] == 0).all()
    assert (coordinates.scale[1:] == 1).all()
    assert (coordinates.mean[0] != 0).all()
    block = next(neuron_blocks(congruence(dense_hessian(case)[:24, :24], coordinates), 6, 3))
    torch.testing.assert_close(block.diagonal(), block[:1, 0].expand(4), rtol=1e-9, atol=0)


REFUSED = {
    "conv": (lambda: nn.Sequential(nn.Conv1d(3, 2, 1), nn.Flatten()), (3, 1), "convolution"),
    "positions": (lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten()), (2, 3), "positions"),
}


@pytest.mark.parametrize(("build", "shape", "reason"), REFUSED.values(), ids=REFUSED)
def test_shared_weights_have_no_curvature_of_their_own(build, shape, reason):
    task = Task(build(), [(torch.randn(6, *shape), torch.randn(6, 2))], mse)
    with lent_scene(task) as scene, pytest.raises(NotApplicable, match=reason):
        bnp_s(scene)


def test_the_weights_of_bnp_s_are_not_those_of_the_ggn():
    task = case_of(nn.Linear(3, 3), classes(), cross_entropy).task
    with (
        lent_scene(task, curvature="ggn") as scene,
        pytest.raises(NotApplicable, match="not the GGN's"),
    ):
        bnp_s(scene)


def test_a_curvature_that_memory_should_not_hold_is_refused(monkeypatch):
    monkeypatch.setattr("hessdiag.variants.weighted.MOST_NUMBERS", 100)
    task = case_of(nn.Linear(3, 3), classes(), cross_entropy).task  # 40 samples, 3 neurons
    with lent_scene(task) as scene:
        for _ in range(2):  # also from the cache
            with pytest.raises(NotApplicable, match="1e\\+02 entries, over the 1e\\+02"):
                bnp_s(scene)
