"""Normalisations put in, against networks written out by hand."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from changed_networks import changed, hessian, hessian_of, tanh_mlp, task
from hessdiag.activations import find_layers, visit_inputs
from hessdiag.variants.insertion import group_count
from sample_networks import mse


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def originals(given):
    """Weights, inputs and targets of the MLP in float64."""
    weights = [p.detach().double() for p in given.model.parameters()]
    x, y = (torch.cat(column).double() for column in zip(*given.data, strict=True))
    return weights, x, y


def standardised(h):
    return (h - h.mean(0)) / h.var(0, correction=0).sqrt()


def compensated(weight, bias, h):
    """``W diag σ`` and ``b + W μ``, feature by feature."""
    sigma = h.var(0, correction=0).sqrt()
    return weight * sigma, bias + weight @ h.mean(0)


def hidden(weights, x):
    w1, b1, w2, b2, *_ = weights
    first = torch.tanh(x @ w1.T + b1)
    return first, torch.tanh(first @ w2.T + b2)


def compensated_weights(weights, x):
    first, second = hidden(weights, x)
    w1, b1, w2, b2, w3, b3 = weights
    return [w1, b1, *compensated(w2, b2, first), *compensated(w3, b3, second)]


@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3)])
def test_bn_has_the_hessian_of_a_network_with_batch_statistics_in_its_graph(sizes):
    given = task(tanh_mlp(), 3, sizes=sizes)
    weights, x, y = originals(given)

    def loss(w1, b1, w2, b2, w3, b3):
        first = torch.tanh(x @ w1.T + b1)
        second = torch.tanh(standardised(first) @ w2.T + b2)
        return F.mse_loss(standardised(second) @ w3.T + b3, y)

    expected = hessian_of(loss, compensated_weights(weights, x))
    with changed("bn", given) as (found, named):
        got = hessian(found.objective, list(named.values()))
        assert found.same_function
        assert found.changed == {"2", "4"}
        assert len(found.objective.batches.items) == 1
    assert (got - expected).norm() <= 1e-11 * expected.norm()


def bnp(h, outputs):
    """``P`` on (weight, bias) of a layer, from ``w = z_w / σ``, ``b = z_b - Σ μ z_w / σ``."""
    sigma, mu = h.var(0, correction=0).sqrt(), h.mean(0)
    features = len(mu)
    p = torch.zeros(outputs * (features + 1), outputs * (features + 1)).double()
    for i in range(outputs):
        at, bias = range(i * features, (i + 1) * features), outputs * features + i
        p[at, at] = 1 / sigma
        p[bias, at] = -mu / sigma
        p[bias, bias] = 1
    return p


def test_the_layer_after_the_last_bn_has_the_block_of_bnp():
    given = task(tanh_mlp(), 3)
    weights, x, y = originals(given)
    _, second = hidden(weights, x)
    raw = hessian_of(lambda w, b: F.mse_loss(second @ w.T + b, y), weights[4:])
    p = bnp(second, 2)
    with changed("bn", given) as (found, named):
        got = hessian(found.objective, [named["4.weight"], named["4.bias"]])
    torch.testing.assert_close(got, p.T @ raw @ p, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3)])
def test_detached_bn_is_the_congruence_of_bnp_on_every_layer(sizes):
    given = task(tanh_mlp(), 3, sizes=sizes)
    weights, x, y = originals(given)
    first, second = hidden(weights, x)

    def loss(*weights):
        h = hidden(weights, x)[1]
        return F.mse_loss(h @ weights[4].T + weights[5], y)

    raw = hessian_of(loss, weights)
    p = torch.block_diag(torch.eye(16).double(), bnp(first, 3), bnp(second, 2))
    expected = p.T @ raw @ p
    with changed("bn-detached", given) as (found, named):
        got = hessian(found.objective, list(named.values()))
        assert found.same_function
        assert len(found.objective.batches.items) == len(sizes)
    assert (got - expected).norm() <= 1e-11 * expected.norm()


def test_a_neuron_under_detached_bn_has_the_hessian_of_standardised_inputs():
    given = task(tanh_mlp(), 3)
    weights, x, y = originals(given)
    first, _ = hidden(weights, x)
    _, _, w2, b2, w3, b3 = weights

    def of_offset(offset):  # S: each sample's loss in the pre-activation of neuron 1
        a = first @ w2.T + b2
        a = a + offset[:, None] * torch.tensor([0.0, 1, 0]).double()
        return F.mse_loss(torch.tanh(a) @ w3.T + b3, y)

    s = torch.autograd.functional.hessian(of_offset, torch.zeros(12).double())
    extended = torch.cat([standardised(first).T, torch.ones(1, 12).double()])
    expected = extended @ s @ extended.T
    with changed("bn-detached", given) as (found, named):
        block = hessian(found.objective, [named["2.weight"], named["2.bias"]])
    at = [4, 5, 6, 7, 13]
    torch.testing.assert_close(block[at][:, at], expected, rtol=1e-9, atol=1e-13)


CONVOLUTIONS = {
    "padded": lambda: nn.Conv2d(4, 2, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 2, (3, 2), stride=(2, 3), padding=(1, 2)),
    "dilated, same": lambda: nn.Conv2d(4, 2, 2, padding="same", dilation=2),
    "grouped": lambda: nn.Conv2d(4, 4, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "circular": lambda: nn.Conv2d(4, 2, 3, padding=2, padding_mode="circular"),
    "reflecting": lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
    "pixelwise": lambda: nn.Conv2d(4, 2, 1),
    "1d": lambda: nn.Conv1d(4, 2, 3, padding=2, stride=2),
}


def before(convolution):
    """A network with this convolution second, and the shape of its input."""
    flat = isinstance(convolution, nn.Conv1d)
    first = nn.Conv1d(1, 4, 3) if flat else nn.Conv2d(1, 4, 3)
    net = nn.Sequential(first, nn.Tanh(), convolution, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
    shape = (1, 9) if flat else (1, 8, 7)
    net(torch.randn(2, *shape))
    return net, shape


@pytest.mark.parametrize("variant", ["bn", "bn-detached"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_channel_of_a_convolutions_patches_is_standardised(kind, variant):
    net, shape = before(CONVOLUTIONS[kind]())
    given = task(net, *shape, sizes=(4, 3))
    reference = sum(
        n / 7 * mse(net.double(), (x.double(), y.double()))
        for n, (x, y) in zip((4, 3), given.data, strict=True)
    )
    net.float()
    patches = []
    with changed(variant, given) as (found, _):
        assert found.changed == {"2", "5"}
        assert found.objective.value() == pytest.approx(reference.item(), rel=1e-11)
        layer = find_layers(net)["2"]
        visit_inputs(found.objective, [layer], lambda _, inputs: patches.append(inputs))
    channels = 4 // layer.groups
    for group in range(layer.groups):
        rows = torch.cat([p.rows for p in patches if p.group == group])
        values = rows.view(len(rows), channels, -1).transpose(0, 1).reshape(channels, -1)
        torch.testing.assert_close(values.mean(1), torch.zeros(channels).double())
        ones = torch.ones(channels).double()
        torch.testing.assert_close(values.var(1, correction=0), ones)


def test_bn_before_a_padded_convolution_has_the_hessian_of_standardised_patches():
    net = nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1, stride=2), nn.Flatten())
    )
    given = task(net, 1, 5, 5, sizes=(4, 3))
    weights, x, y = originals(given)
    w1, b1, w2, b2 = weights

    def patches(w1, b1):  # (samples, channels, kernel, positions)
        h = torch.tanh(F.conv2d(x, w1, b1))
        return F.unfold(h, 3, padding=1, stride=2).view(7, 2, 9, -1)

    def loss(w1, b1, w2, b2):
        given = patches(w1, b1)
        mean = given.mean((0, 2, 3), keepdim=True)
        sigma = given.var((0, 2, 3), correction=0, keepdim=True).sqrt()
        a = torch.einsum("ock,nckp->nop", w2.view(2, 2, 9), (given - mean) / sigma)
        return F.mse_loss((a + b2[:, None]).flatten(1), y)

    there = patches(w1, b1)
    mean, sigma = there.mean((0, 2, 3)), there.var((0, 2, 3), correction=0).sqrt()
    own = [w1, b1, w2 * sigma[:, None, None], b2 + w2.sum((2, 3)) @ mean]
    expected = hessian_of(loss, own)
    with changed("bn", given) as (found, named):
        got = hessian(found.objective, list(named.values()))
    assert (got - expected).norm() <= 1e-11 * expected.norm()


class Straight(nn.Module):
    """One normalisation before each hidden input, as torch's own functions make it."""

    def __init__(self, net, norm):
        super().__init__()
        self.net, self.norm = net, norm

    def forward(self, x):
        seen = 0
        for module in self.net:
            if isinstance(module, nn.Linear | nn.Conv2d):
                x = self.norm(x) if seen else x
                seen += 1
            x = module(x)
        return x


def groups_of_two(x):
    return F.group_norm(x, x.shape[1] // 2)


BY_SAMPLE = {
    "ln": lambda x: F.layer_norm(x, x.shape[1:]),
    "rms": lambda x: F.rms_norm(x, x.shape[1:]),
    "gn": groups_of_two,
}


@pytest.mark.parametrize("variant", BY_SAMPLE)
def test_normalisation_by_sample_is_torchs_own(variant):
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, 3, bias=False)),
    )
    given = task(net, 1, 4, 4, sizes=(4, 3))
    straight = Straight(net, BY_SAMPLE[variant])
    with changed(variant, given) as (found, named):
        got = hessian(found.objective, list(named.values()))
        value = found.objective.value()
        assert not found.same_function
        assert found.changed == {"2", "5"}
    x, y = (torch.cat(column).double() for column in zip(*given.data, strict=True))
    straight.double()
    assert value == pytest.approx(mse(straight, (x, y)).item(), rel=1e-12)

    def loss(*weights):
        named = dict(zip(dict(net.named_parameters()), weights, strict=True))
        prefixed = {f"net.{name}": w for name, w in named.items()}
        return F.mse_loss(torch.func.functional_call(straight, prefixed, (x,)), y)

    expected = hessian_of(loss, [p.detach() for p in net.parameters()])
    assert (got - expected).norm() <= 1e-11 * expected.norm()


def test_a_sequences_positions_are_normalised_one_by_one_and_counted_together():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    given = task(net, 5, 3)
    weights, x, _ = originals(given)
    first = torch.tanh(x @ weights[0].T + weights[1])
    expected = {
        "ln": F.layer_norm(first, (4,)),
        "gn": F.group_norm(first.flatten(0, 1), 2).view_as(first),
        "bn": standardised(first.flatten(0, 1)).view_as(first),
    }
    for variant, rows in expected.items():
        seen = []
        with changed(variant, given) as (found, _):
            layer = find_layers(net)["2"]
            visit_inputs(found.objective, [layer], lambda _, i, seen=seen: seen.append(i.rows))
        torch.testing.assert_close(seen[0], rows.flatten(0, 1))


@pytest.mark.parametrize(
    ("features", "groups"), [(1, 1), (2, 1), (4, 2), (7, 1), (12, 6), (64, 32), (96, 32), (130, 26)]
)
def test_groups_are_the_largest_divisor_that_leaves_two_features(features, groups):
    assert group_count(features) == groups


def test_a_constant_feature_is_centred_and_keeps_its_scale():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight[0] = 0
        net[0].bias[0] = 0.1
        net[0].bias[1] = -100  # dead
    given = task(net, 3, sizes=(5, 7))
    weight = net[2].weight.detach().double()
    for variant in ("bn", "bn-detached"):
        with changed(variant, given) as (found, named):
            block = hessian(found.objective, list(named.values()))
            assert torch.isfinite(block).all()
            assert torch.equal(named["2.weight"][:, :2].detach(), weight[:, :2])
            assert "2 of 3 inputs of 2 are constant and keep scale 1" in found.notes
