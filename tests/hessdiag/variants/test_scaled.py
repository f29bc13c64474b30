import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hessdiag.variants.coordinates import Diagonal, congruence
from hessdiag.variants.scaled import norm_scaled
from hessdiag.variants.scene import NotApplicable
from lent_scenes import lent_scene
from sample_networks import Case, dense_hessian


@pytest.fixture(autouse=True)
def same_numbers():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def squares(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


class Unit(nn.Module):
    """Normalisation without a mean, an eps or parameters."""

    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True)


def normalised_net():
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3, eps=1e-13), nn.Tanh(), nn.Flatten()),
        nn.Linear(12, 3),
    ).double()


def scaled_scene(case):
    """The scale that is found, and the dense Hessian, both of the whole network."""
    case.trainable = [n for n, _ in case.model.named_parameters()]
    matrix = dense_hessian(dataclasses.replace(case, model=copy.deepcopy(case.model)))
    size = matrix.abs().amax(dim=1)
    dead = size <= 1e-13 * size.max()
    with lent_scene(case.task, matrix=matrix, dead=dead) as scene:
        return norm_scaled(scene), matrix


def images(n=20):
    return [(torch.randn(n, 1, 3, 3).double(), torch.randint(0, 3, (n,)))]


def test_each_channel_before_batchnorm_is_measured_in_units_of_its_norm():
    model = normalised_net()
    built, matrix = scaled_scene(Case(model, images(), cross_entropy, [20.0], mode="train"))
    assert isinstance(built.coordinates, Diagonal)
    scale = built.coordinates.scale
    norms = model[0].weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(scale[:12], norms.repeat_interleave(4))
    assert (scale[12:] == 1).all()
    assert len(scale) == len(matrix)
    assert built.notes == ("scaled by their norms: 0.weight",)
    assert built.source == "hessian"


def test_the_scaled_hessian_does_not_depend_on_the_arbitrary_norms():
    model, data = normalised_net(), images()
    found = []
    for factor in (1.0, 50.0):
        with torch.no_grad():
            model[0].weight[1] *= factor
        built, matrix = scaled_scene(Case(model, data, cross_entropy, [20.0], mode="train"))
        found.append((matrix, congruence(matrix, built.coordinates)))
    (raw, scaled), (raw_after, scaled_after) = found
    torch.testing.assert_close(scaled_after, scaled, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(raw_after[4:8, 4:8], raw[4:8, 4:8] / 50**2, rtol=1e-6, atol=1e-10)


def test_dead_rows_keep_scale_one():
    data = images()
    data[0][0][:, :, :2, :2] = 0
    model = normalised_net()
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([0.0, 0.0, 1.0, 2.0]).view(2, 2) + model[0].weight
    case = Case(model, data, cross_entropy, [20.0], mode="train")
    case.trainable = [n for n, _ in model.named_parameters()]
    dead = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.bool)
    dead[[0, 5]] = True
    with lent_scene(case.task, dead=dead) as scene:
        scale = norm_scaled(scene).coordinates.scale
    assert scale[dead].tolist() == [1, 1]
    assert (scale[1:4] == scale[1]).all()
    assert scale[1] != 1


def test_weights_whose_norms_mean_something_are_not_scaled():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    data = [(torch.randn(9, 3), torch.randint(0, 3, (9,)))]
    with (
        lent_scene(Case(model, data, cross_entropy, [9.0]).task) as scene,
        pytest.raises(NotApplicable, match="none of its weights is scale-invariant"),
    ):
        norm_scaled(scene)


def test_batchnorm_with_running_statistics_leaves_the_norms_their_meaning():
    case = Case(normalised_net(), images(), cross_entropy, [20.0], mode="eval")
    with lent_scene(case.task) as scene, pytest.raises(NotApplicable, match="train mode"):
        norm_scaled(scene)


class Deep(nn.Module):
    """Scale-invariant weights in every one of many residual layers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(layers))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(F.layer_norm(layer(x), (3,), eps=1e-20))
        return self.head(x)


def test_every_scale_invariant_tensor_is_scaled_however_many_there_are():
    model = Deep(60).double()
    data = [(torch.randn(30, 3).double(), torch.randint(0, 3, (30,)))]
    with lent_scene(Case(model, data, cross_entropy, [30.0]).task) as scene:
        built = norm_scaled(scene)
        assert scene.product.count == 3  # two for all tensors, one for their rounding
    for layer, scale in zip(model.layers, built.coordinates.scale[: 60 * 9].split(9), strict=True):
        torch.testing.assert_close(scale, layer.weight.detach().norm().expand(9))


def test_no_number_of_tests_leaves_an_invariant_tensor_out():
    """At a minimum every tensor is a candidate; only half of them are invariant."""
    layers = [m for _ in range(12) for m in (nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), Unit())]
    model = nn.Sequential(*layers).double()
    x = torch.randn(40, 3).double()
    data = [(x, model(x).detach())]
    with lent_scene(Case(model, data, squares, [40.0]).task) as scene:
        scale = norm_scaled(scene).coordinates.scale
        assert scene.product.count > 100
        places = scene.places()
    for name, where in places.items():
        scaled = bool((scale[where] != 1).all())
        assert scaled == (int(name.split(".")[0]) % 4 == 2), name
