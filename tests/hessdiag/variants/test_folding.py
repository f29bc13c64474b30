"""Normalisation layers folded away, against networks folded by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from changed_networks import changed, hessian, hessian_of, task
from hessdiag.demos.tasks import demo_task
from hessdiag.variants.scene import NotApplicable
from sample_networks import mse


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(4)


def warm(norm):
    """Statistics, scales and shifts that are not the trivial ones."""
    with torch.no_grad():
        for tensor in (norm.weight, getattr(norm, "running_var", None)):
            if tensor is not None:
                tensor.uniform_(0.5, 2)
        for tensor in (norm.bias, getattr(norm, "running_mean", None)):
            if tensor is not None:
                tensor.normal_()
    return norm


def by_hand(conv, norm):
    """Weight and bias of a convolution that does what it and the BatchNorm do."""
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    weight = torch.einsum("o,ochw->ochw", scale, conv.weight.detach())
    return weight, norm.bias.detach() - norm.running_mean * scale


def test_the_demo_convnet_without_its_batchnorm_is_the_one_folded_by_hand():
    given = demo_task("convnet")
    images, labels = given.data[0][0][:40], given.data[0][1][:40]
    given = type(given)(given.model, [(images, labels)], given.loss)
    net = given.model
    warm(net.bn1), warm(net.bn2)
    plain = copy.deepcopy(net).double()

    def loss(w1, b1, w2, b2, w3, b3):
        h = F.avg_pool2d(torch.relu(F.conv2d(images.double(), w1, b1)), 2)
        h = torch.relu(F.conv2d(h, w2, b2))
        return F.cross_entropy(h.flatten(1) @ w3.T + b3, labels)

    folded = [*by_hand(plain.conv1, plain.bn1), *by_hand(plain.conv2, plain.bn2)]
    folded += [p.detach() for p in plain.head.parameters()]
    value = F.cross_entropy(plain.eval()(images.double()), labels).item()
    with changed("without-bn", given) as (found, named):
        left = [name for name in named if name not in found.gone]
        assert left == [f"{m}.{p}" for m in ("conv1", "conv2", "head") for p in ("weight", "bias")]
        assert found.gone["bn1.weight"] == "folded into conv1"
        assert "conv1, conv2" in found.notes[0]
        assert found.same_function
        assert found.objective.value() == pytest.approx(value, rel=1e-12)
        for name, tensor in zip(left, folded, strict=True):
            torch.testing.assert_close(named[name].detach(), tensor, rtol=1e-13, atol=1e-13)
        block = [named["conv2.weight"], named["conv2.bias"], named["head.bias"]]
        got = hessian(found.objective, block)
    expected = hessian_of(
        lambda w2, b2, b3: loss(*folded[:2], w2, b2, folded[4], b3), [*folded[2:4], folded[5]]
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_batchnorm_in_train_mode_is_folded_with_the_statistics_of_its_batch():
    norm = warm(nn.BatchNorm1d(4))
    net = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2))
    given = task(net, 3, mode="train")
    x = given.data[0][0].double()
    w, b = (p.detach().double() for p in net[0].parameters())
    a = x @ w.T + b
    scale = norm.weight.detach().double() / (a.var(0, correction=0) + norm.eps).sqrt()
    shift = (b - a.mean(0)) * scale + norm.bias.detach().double()
    with changed("without-bn", given) as (_, named):
        torch.testing.assert_close(named["0.weight"].detach(), w * scale[:, None])
        torch.testing.assert_close(named["0.bias"].detach(), shift)


def test_batchnorm_in_train_mode_over_several_batches_is_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    given = task(net, 3, sizes=(6, 6), mode="train")
    with (
        pytest.raises(NotApplicable, match="BatchNorm 1 normalises each of 2 batches"),
        changed("without-bn", given),
    ):
        pass


@pytest.mark.parametrize("bias", [True, False])
def test_batchnorm_after_an_activation_is_folded_into_the_next_linear_layer(bias):
    norm = warm(nn.BatchNorm1d(4))
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), norm, nn.Linear(4, 2, bias=bias))
    given = task(net, 3)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    shift = norm.bias.detach().double() - norm.running_mean.double() * scale
    w = net[3].weight.detach().double()
    expected = w @ shift + (net[3].bias.detach().double() if bias else 0)
    with changed("without-bn", given) as (found, named):
        torch.testing.assert_close(named["3.weight"].detach(), w * scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(named["3.bias"].detach(), expected, rtol=1e-6, atol=1e-7)
        assert found.changed == {"3"}
        assert found.gone == {"2.weight": "folded into 3", "2.bias": "folded into 3"}
    assert (net[3].bias is not None) == bias


class Residual(nn.Module):
    """A layer's output goes into BatchNorm and around it."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.body(x)
        return self.head(torch.tanh(h + self.norm(h)))


def test_a_layer_whose_output_is_used_twice_takes_up_no_batchnorm():
    given = task(Residual(), 3)
    with (
        pytest.raises(NotApplicable, match="BatchNorm norm cannot be folded"),
        changed("without-bn", given),
    ):
        pass


class InPlace(nn.Module):
    """An activation writes into the layer's output before BatchNorm sees it."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.body(x).relu_())))


def test_a_layers_output_that_is_overwritten_is_no_longer_its_output():
    with (
        pytest.raises(NotApplicable, match="BatchNorm norm cannot be folded"),
        changed("without-bn", task(InPlace(), 3)),
    ):
        pass


def test_two_batchnorms_around_one_layer_are_both_folded_into_it():
    net = nn.Sequential(
        *(nn.Linear(3, 4), nn.Tanh(), warm(nn.BatchNorm1d(4)), nn.Linear(4, 3)),
        *(warm(nn.BatchNorm1d(3)), nn.Tanh(), nn.Linear(3, 2)),
    )
    given = task(net, 3)
    net.eval().double()
    x, y = (t.double() for t in given.data[0])
    value = mse(net, (x, y)).item()
    net.float()
    with changed("without-bn", given) as (found, named):
        assert found.objective.value() == pytest.approx(value, rel=1e-12)
        w1, b1, w2, b2, w3, b3 = (p for n, p in named.items() if n not in found.gone)
        h = torch.tanh(x @ w1.T + b1) @ w2.T + b2
        out = torch.tanh(h) @ w3.T + b3
        assert F.mse_loss(out, y).item() == pytest.approx(value, rel=1e-12)


def test_a_network_without_batchnorm_has_none_to_fold():
    with (
        pytest.raises(NotApplicable, match="no BatchNorm"),
        changed("without-bn", task(nn.Sequential(nn.Linear(3, 2)), 3)),
    ):
        pass


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "BatchNorm": lambda: nn.BatchNorm1d(4),
}


class TwoHeads(nn.Module):
    def __init__(self, norm, bias=True, around=False):
        super().__init__()
        self.body, self.norm = nn.Linear(3, 4), norm
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 2, bias=bias)
        self.around = around

    def forward(self, x):
        h = self.norm(torch.tanh(self.body(x)))
        out = torch.tanh(self.one(h)) + self.two(h)
        return out + h[:, :2] if self.around else out


def with_bias(norm):
    norm.bias = getattr(norm, "bias", None)
    return norm


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("variant", ["bn", "bn-detached", "ln", "gn", "rms"])
def test_weights_and_biases_of_a_normalisation_move_into_the_linear_layers_it_feeds(kind, variant):
    norm = warm(with_bias(NORMS[kind]()))
    net = TwoHeads(norm)
    given = task(net, 3)
    names = [f"norm.{name}" for name, _ in norm.named_parameters()]
    x = given.data[0][0].double()
    net.eval().double()
    plain = (torch.tanh(net.body(x)), net.norm(torch.tanh(net.body(x))))
    wanted = plain[1] @ net.one.weight.T + net.one.bias
    net.float()
    with changed(variant, given) as (found, named):
        assert list(found.gone) == names
        assert set(found.gone.values()) == {"folded into one, two"}
        assert {"one", "two"} <= found.changed
        assert torch.equal(named["norm.weight"], torch.ones(4).double())
        if len(names) > 1:
            assert not named["norm.bias"].any()
        bare = norm(plain[0])
        mu, sigma = bare.mean(0), bare.var(0, correction=0).sqrt()
        given_to = {"bn": (bare - mu) / sigma, "bn-detached": (bare - mu) / sigma}
        folded = given_to.get(variant, bare) @ named["one.weight"].T + named["one.bias"]
        torch.testing.assert_close(folded, wanted, rtol=1e-6, atol=1e-7)


def test_a_normalisation_that_also_goes_elsewhere_keeps_its_weights():
    norm = warm(nn.LayerNorm(4))
    given = task(TwoHeads(norm, around=True), 3)
    with changed("ln", given) as (found, named):
        assert not found.gone
        assert found.notes[0].startswith("weight and bias kept: norm")
        assert torch.equal(named["norm.weight"], norm.weight)


def test_a_shift_needs_a_bias_to_go_to_and_no_shift_needs_none():
    norm = warm(nn.LayerNorm(4))
    with changed("ln", task(TwoHeads(norm, bias=False), 3)) as (found, _):
        assert not found.gone
    nn.init.zeros_(norm.bias)
    with changed("ln", task(TwoHeads(norm, bias=False), 3)) as (found, _):
        assert list(found.gone) == ["norm.weight", "norm.bias"]
    with changed("bn", task(TwoHeads(norm, bias=False), 3)) as (found, _):
        assert found.notes[0] == "left alone: two (no bias to take up a mean)"
        assert found.changed == {"one", "two"}  # its input lost the scale all the same


def test_weights_that_two_normalisations_share_stay():
    first, second = warm(nn.LayerNorm(4)), nn.LayerNorm(4)
    second.weight, second.bias = first.weight, first.bias
    net = nn.Sequential(nn.Linear(3, 4), first, nn.Linear(4, 4), nn.Tanh(), second, nn.Linear(4, 2))
    with changed("ln", task(net, 3)) as (found, _):
        assert not found.gone
        assert found.notes[0].startswith("weight and bias kept: 1, 4 ")


class Chain(nn.Module):
    """One normalisation before each of two layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.two(self.norm(torch.tanh(self.one(self.norm(x)))))


def test_a_normalisation_called_before_two_layers_is_folded_into_both():
    net = Chain()
    warm(net.norm)
    given = task(net, 3)
    wanted = net.double()(given.data[0][0].double())
    net.float()
    with changed("bn-detached", given) as (found, _):
        assert found.gone["norm.bias"] == "folded into one, two"
        torch.testing.assert_close(net(given.data[0][0].double()), wanted.detach())


class Sequence(nn.Module):
    """BatchNorm over the positions of a sequence, not over the neurons of the layer before."""

    def __init__(self, before):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.before = before

    def forward(self, x):
        h = self.body(x)
        return self.head(torch.tanh(self.norm(h)) if self.before else self.norm(torch.tanh(h)))


@pytest.mark.parametrize("before", [True, False])
def test_batchnorm_over_positions_is_no_scale_of_neurons(before):
    with (
        pytest.raises(NotApplicable, match="BatchNorm norm cannot be folded"),
        changed("without-bn", task(Sequence(before), 5, 3)),
    ):
        pass


class Again(nn.Module):
    """A layer, or a normalisation, called twice."""

    def __init__(self, norm, twice):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 4), norm, nn.Linear(4, 2)
        self.twice = twice

    def forward(self, x):
        h = torch.tanh(self.body(x))
        also = self.head(x) if self.twice == "head" else 0
        if self.twice == "norm":
            h = torch.tanh(self.norm(h))
        if self.twice == "body":
            h = self.body(h)
        return also + self.head(self.norm(h))


@pytest.mark.parametrize("twice", ["norm", "body", "head"])
def test_what_is_called_twice_neither_gives_nor_takes_a_scale(twice):
    given = task(Again(warm(nn.BatchNorm1d(4)), twice), 4)
    if twice == "body":  # the layer after is called once
        with changed("without-bn", given) as (found, _):
            assert found.gone == {
                "norm.weight": "folded into head",
                "norm.bias": "folded into head",
            }
        return
    message = "called 2 times" if twice == "norm" else "cannot be folded"
    with pytest.raises(NotApplicable, match=message), changed("without-bn", given):
        pass
    if twice == "norm":
        with changed("ln", given) as (found, _):
            assert not found.gone


def test_a_scale_that_differs_by_position_stays():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), warm(nn.LayerNorm((5, 4))), nn.Linear(4, 2))
    with changed("ln", task(net, 5, 3)) as (found, _):
        assert not found.gone


def test_a_scale_of_places_is_none_of_a_convolutions_channels():
    norm = warm(nn.LayerNorm(5))
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Tanh(), norm, nn.Conv1d(4, 2, 5))
    with changed("ln", task(net, 1, 7)) as (found, _):
        assert not found.gone
        assert found.notes[0].startswith("weight and bias kept: 2 ")


def test_a_layer_that_shares_its_weights_takes_up_no_batchnorm():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    net = nn.Sequential(first, nn.Tanh(), second, nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))
    with (
        pytest.raises(NotApplicable, match="BatchNorm 3 cannot be folded"),
        changed("without-bn", task(net, 3)),
    ):
        pass


def test_a_batchnorms_parameters_stay_while_something_else_uses_them():
    first, second, other = warm(nn.BatchNorm1d(3)), nn.BatchNorm1d(3), nn.LayerNorm(3)
    second.weight, other.bias = first.weight, first.bias
    layers = (nn.Linear(3, 3), first, nn.Tanh(), nn.Linear(3, 3), second, other)
    with changed("without-bn", task(nn.Sequential(*layers), 3)) as (found, _):
        assert found.gone == {"1.weight": "folded into 0", "4.bias": "folded into 3"}
