import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hessdiag import Task, activations
from hessdiag.activations import find_layers, layer_inputs, visit_inputs, watched
from sample_networks import Partial, lent, mse, pinn, pinn_loss


@pytest.fixture(autouse=True)
def same_numbers():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        yield


CONVOLUTIONS = {
    "plain": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 6)),
    "padded": (lambda: nn.Conv2d(2, 3, (3, 2), padding=(2, 1), stride=(1, 2)), (2, 5, 6)),
    "same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (2, 5, 6)),
    "reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 6)),
    "dilated groups": (lambda: nn.Conv2d(4, 6, 2, dilation=2, groups=2, stride=2), (4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 4, 4)),
    "one dimension": (lambda: nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=1), (2, 9)),
    "circular groups": (
        lambda: nn.Conv1d(4, 4, 3, padding=2, groups=2, padding_mode="circular"),
        (4, 7),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("build", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_patches_times_weights_are_the_convolution(build, shape, batched):
    module = build().double()
    given = torch.randn(*([4] if batched else []), *shape, dtype=torch.float64)
    (layer,) = find_layers(nn.Sequential(module)).values()
    inputs = list(layer_inputs(layer, given))
    assert [each.group for each in inputs] == list(range(module.groups))
    assert {each.rows.shape[1] for each in inputs} == {layer.features}
    assert {each.samples for each in inputs} == {4 if batched else 1}
    weights = module.weight.reshape(module.groups, -1, layer.features)
    found = torch.cat([each.rows @ w.T for each, w in zip(inputs, weights, strict=True)], dim=1)
    expected = module(given) if batched else module(given)[None]
    expected = expected.flatten(2).mT.reshape(-1, layer.outputs)
    torch.testing.assert_close(found + module.bias, expected)


class Sequences(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.layer, self.view = nn.Linear(3, 2), view

    def forward(self, x):
        return self.layer(self.view(x)).reshape(len(x), -1)


VIEWS = {
    "as they are": lambda x: x,
    "flattened positions": lambda x: x.reshape(-1, 3),
    "positions first": lambda x: x.transpose(0, 1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_samples_are_the_rows_of_the_batch_wherever_its_positions_stand(view):
    data = [(torch.randn(n, 4, 3), torch.randn(n, 8)) for n in (6, 3)]
    seen = []
    with lent(Task(Sequences(view), data, mse)) as (objective, _):
        layers = list(find_layers(objective.model).values())
        calls = visit_inputs(
            objective, layers, lambda _, given: seen.append((given.samples, given.rows.shape))
        )
    assert seen == [(6, (24, 3)), (3, (12, 3))]
    assert calls == {"layer": 1}


def test_a_visit_sees_every_batch_of_every_layer_in_order_and_leaves_no_hook():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    data = [(torch.randn(n, 3), torch.randn(n, 2)) for n in (5, 2)]
    seen = []
    with lent(Task(model, data, mse)) as (objective, _):
        layers = find_layers(objective.model)
        visit_inputs(
            objective,
            layers.values(),
            lambda layer, given: seen.append((layer.name, given.rows)),
        )
        hidden = torch.tanh(F.linear(data[1][0].double(), model[0].weight, model[0].bias))
        assert not any(m._forward_pre_hooks for m in objective.model.modules())
    assert [name for name, _ in seen] == ["0", "2", "0", "2"]
    torch.testing.assert_close(seen[0][1], data[0][0].double())
    torch.testing.assert_close(seen[3][1], hidden)
    assert not seen[3][1].requires_grad


@pytest.mark.parametrize("frames", [1, 3])
def test_patches_of_a_large_batch_come_in_parts_of_whole_samples(frames, monkeypatch):
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 4, 3, padding=1, groups=2)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).reshape(len(x), -1)

    given = torch.randn(7, frames, 2, 4, 4)
    one = frames * 2 * 4 * 4 * 9  # numbers in the patches of a sample
    seen = {0: [], 1: []}
    with lent(Task(Frames(), [(given, torch.randn(7, frames * 64))], mse)) as (objective, _):
        layers = list(find_layers(objective.model).values())
        for most in (2 * one + one // 2, one // 5):
            monkeypatch.setattr(activations, "PATCH_NUMBERS", most)
            for parts in seen.values():
                parts.clear()
            calls = visit_inputs(objective, layers, lambda _, i: seen[i.group].append(i))
            assert calls == {"layer": 1}
            patches = F.unfold(given.double().flatten(0, 1), 3, padding=1)
            for group, half in enumerate(patches.chunk(2, dim=1)):
                rows = torch.cat([part.rows for part in seen[group]])
                assert torch.equal(rows, half.mT.reshape(-1, 9))
                samples = [part.samples for part in seen[group]]
                assert samples == ([2, 2, 2, 1] if most > one else [1] * 7)
                assert all(len(part.rows) == part.samples * frames * 16 for part in seen[group])


def test_hooks_are_removed_when_the_forward_fails():
    model = nn.Linear(3, 2)
    layers = find_layers(model).values()
    with pytest.raises(RuntimeError), watched(layers, lambda *_: None):
        model(torch.randn(2, 5))
    assert not model._forward_pre_hooks


def test_inputs_carry_no_graph_where_the_loss_differentiates_by_them():
    case = pinn(pinn_loss, requires_grad=False)
    seen = []
    with lent(case.task) as (objective, _):
        layers = find_layers(objective.model).values()
        visit_inputs(objective, layers, lambda _, given: seen.append(given.rows.requires_grad))
    assert seen == [False] * 4


class Now(nn.Module):
    """Uses one layer in large batches only, another twice, and a third never."""

    def __init__(self):
        super().__init__()
        self.often, self.rarely, self.never = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        x = self.often(input=torch.tanh(self.often(x)))
        return self.rarely(x) if len(x) > 3 else x[:, :2]


def test_calls_are_counted_in_the_batch_that_has_most():
    data = [(torch.randn(n, 3), torch.randn(n, 2)) for n in (2, 5, 3)]
    with lent(Task(Now(), data, mse)) as (objective, _):
        layers = find_layers(objective.model).values()
        calls = visit_inputs(objective, layers, lambda *_: None)
    assert calls == {"often": 2, "rarely": 1, "never": 0}


def test_a_layer_knows_its_parameters_by_their_first_names():
    found = find_layers(Partial())
    assert {name: (x.weight, x.bias, x.shared) for name, x in found.items()} == {
        "first": ("first.weight", "first.bias", True),
        "second": ("first.weight", "second.bias", True),
        "unused": ("unused.weight", "unused.bias", False),
        "frozen": ("frozen.weight", "frozen.bias", False),
    }


class Squared(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.square(), self.bias)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Named(nn.Linear):
    """Adds nothing to how its output is computed."""


class Compiled(nn.Module):
    """Names its module as ``torch.compile`` does."""

    def __init__(self, inner):
        super().__init__()
        self.add_module("_orig_mod", inner)


def test_layers_are_those_whose_output_is_linear_in_the_parameters_they_own():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict(
        {
            "named": Named(2, 2),
            "convolution": nn.Conv1d(1, 1, 1),
            "squared": Squared(2, 2),
            "standardised": Standardised(1, 1, 1),
            "made": nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)),
            "transposed": nn.ConvTranspose1d(1, 1, 1),
            "embedding": nn.Embedding(2, 2),
            "once": shared,
            "again": shared,
            "compiled": Compiled(nn.Linear(2, 2)),
        }
    )
    found = find_layers(model)
    assert list(found) == ["named", "convolution", "once", "compiled"]
    assert [layer.shared for layer in found.values()] == [False, False, True, False]
    assert found["compiled"].weight == "compiled.weight"
