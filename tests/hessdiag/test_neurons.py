import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import sample_networks
from hessdiag import neuron_passes, neurons
from hessdiag.activations import find_layers
from hessdiag.neuron_passes import Passes
from hessdiag.neurons import (
    Observed,
    explain_layers,
    neuron_curvature,
    neuron_factors,
    observe_neurons,
)
from hessdiag.variants.scene import NotApplicable
from sample_networks import Case, cross_entropy, dense_hessian, lent, mse


def net(activation, *sizes, bias=True):
    torch.manual_seed(len(sizes))
    layers = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def classes(features, count, sizes=(9, 4)):
    torch.manual_seed(17)
    return [(torch.randn(n, features), torch.randint(count, (n,))) for n in sizes]


def case(model, data, loss):
    found = Case(model, data, loss, [float(len(x)) for x, _ in data])
    found.trainable = [name for name, _ in model.named_parameters()]
    return found


def observe(case, name):
    with lent(case.task) as (objective, _):
        return observe_neurons(objective, find_layers(objective.model)[name])


def refused(case, name):
    with lent(case.task) as (objective, _), pytest.raises(NotApplicable) as caught:
        neuron_curvature(objective, find_layers(objective.model)[name])
    return str(caught.value)


def neuron_blocks(case, name):
    """The neurons' own blocks of the dense Hessian, (outputs, n, n), the bias first."""
    dense = dense_hessian(case)
    ends = np.cumsum([0] + [dict(case.model.named_parameters())[n].numel() for n in case.trainable])
    index = {n: np.arange(*ends[i : i + 2]) for i, n in enumerate(case.trainable)}
    weight = dict(case.model.named_parameters())[f"{name}.weight"]
    rows = index[f"{name}.weight"].reshape(weight.shape)
    if f"{name}.bias" in index:
        rows = np.column_stack([index[f"{name}.bias"], rows])
    return [dense[np.ix_(row, row)].numpy() for row in rows]


def kappa_plus(matrix):
    values = np.linalg.eigvalsh(matrix)
    tau = 10 * max(len(values), 10) * np.finfo(float).eps * np.abs(values).max()
    above = values[values > tau]
    return above[-1] / above[0] if above.size else math.nan


def assembled(seen):
    rows = seen.rows.numpy()
    if seen.layer.bias is not None:
        rows = np.column_stack([np.ones(len(rows)), rows])
    return [rows.T @ np.diag(s) @ rows for s in seen.curvature.numpy()]


THEOREM = {
    "tanh, hidden": (lambda: case(net(nn.Tanh, 3, 4, 5, 2), classes(3, 2), cross_entropy), "2"),
    "tanh, first": (lambda: case(net(nn.Tanh, 3, 4, 5, 2), classes(3, 2), cross_entropy), "0"),
    "relu, hidden": (lambda: case(net(nn.ReLU, 3, 6, 5, 2), classes(3, 2), cross_entropy), "2"),
    "relu, last": (lambda: case(net(nn.ReLU, 3, 6, 5, 2), classes(3, 2), cross_entropy), "4"),
    "no bias": (lambda: case(net(nn.Tanh, 3, 4, 2, bias=False), classes(3, 2), cross_entropy), "0"),
    "squares": (
        lambda: case(net(nn.Tanh, 3, 4, 2), sample_networks.pairs(3, sizes=(7, 7, 2)), mse),
        "2",
    ),
}


@pytest.mark.parametrize("name", THEOREM)
def test_a_neurons_hessian_is_h_e_s_h_e_transposed(name):
    build, layer = THEOREM[name]
    example = build()
    seen = observe(example, layer)
    factors = neuron_factors(seen)
    for i, (ours, dense) in enumerate(
        zip(assembled(seen), neuron_blocks(example, layer), strict=True)
    ):
        assert np.abs(ours - dense).max() <= 1e-13 * np.abs(dense).max() + 1e-18
        kappa = kappa_plus(dense)
        if kappa < 1e9:
            assert factors["kappa_hessian"][i] == pytest.approx(kappa, rel=1e-5)


def test_logistic_regression_has_p_times_one_minus_p_over_n():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data = [(x, (y > 0).float()[:, None]) for x, y in classes(3, 2, sizes=(10, 5, 1))]
    example = case(model, data, lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]))
    with lent(example.task) as (objective, _):
        curvature = neuron_curvature(objective, find_layers(objective.model)[""])
    inputs = torch.cat([x for x, _ in data]).double()
    p = torch.sigmoid(model.double()(inputs)).detach()[:, 0]
    assert torch.allclose(curvature[0], p * (1 - p) / 16, rtol=1e-13, atol=0)


def test_the_bound_and_slack_of_a_positive_neuron_are_those_of_its_factors():
    example = case(nn.Sequential(nn.Linear(3, 4)), classes(3, 4, sizes=(30, 7)), cross_entropy)
    seen = observe(example, "0")
    factors = neuron_factors(seen)
    rows = np.column_stack([np.ones(37), seen.rows.numpy()])
    for i, s in enumerate(seen.curvature.numpy()):
        assert (s > 0).all()
        hidden, ratio = np.linalg.cond(rows), s.max() / s.min()
        measured = np.linalg.cond(rows.T @ np.diag(s) @ rows)
        expected = {
            "kappa_hidden": hidden,
            "kappa_s": ratio,
            "bound": hidden**2 * ratio,
            "kappa_hessian": measured,
            "slack": hidden**2 * ratio / measured,
            "s_positive": 37,
            "s_negative": 0,
            "s_zero": 0,
        }
        assert {name: array[i] for name, array in factors.items()} == pytest.approx(expected)
        assert factors["slack"][i] > 1


def observed(rows, curvature, bias="bias"):
    layer = find_layers(nn.Sequential(nn.Linear(rows.shape[1], len(curvature), bias=bool(bias))))
    return Observed(layer["0"], rows, curvature)


def test_samples_of_zero_curvature_are_dropped_from_h_e():
    torch.manual_seed(1)
    rows = torch.randn(20, 2, dtype=torch.float64)
    rows[10:] *= 1e3
    curvature = torch.rand(2, 20, dtype=torch.float64) + 0.5
    curvature[1, 10:] = 0
    curvature[1, 15] = 1e-16  # rounding noise beside one half
    factors = neuron_factors(observed(rows, curvature))
    dense = np.column_stack([np.ones(20), rows.numpy()])
    assert factors["kappa_hidden"] == pytest.approx(
        [np.linalg.cond(dense), np.linalg.cond(dense[:10])]
    )
    assert factors["s_zero"].tolist() == [0, 10]
    assert (factors["bound"] > factors["kappa_hessian"]).all()


@pytest.mark.parametrize(("dtype", "zeros"), [(torch.float64, 1), (torch.float32, 3)])
def test_curvature_is_zero_below_a_hundred_rounding_errors_of_its_dtype(dtype, zeros):
    curvature = torch.tensor([[1.0, 1.0, 1e-6, 1e-13, -1e-15]], dtype=dtype)
    factors = neuron_factors(observed(torch.randn(5, 1, dtype=dtype), curvature))
    assert factors["s_zero"].tolist() == [zeros]


def test_there_is_no_bound_with_negative_curvature_or_dependent_rows():
    torch.manual_seed(2)
    rows = torch.randn(20, 2, dtype=torch.float64)
    mixed = torch.ones(1, 20, dtype=torch.float64)
    mixed[0, 3] = -0.1
    factors = neuron_factors(observed(rows, mixed))
    assert np.isnan([factors["bound"][0], factors["slack"][0]]).all()
    assert (factors["s_positive"][0], factors["s_negative"][0]) == (19, 1)
    assert factors["kappa_s"][0] == pytest.approx(10)
    dependent = torch.cat([rows, rows[:, :1]], dim=1)
    factors = neuron_factors(observed(dependent, torch.ones(1, 20, dtype=torch.float64)))
    assert np.isnan([factors["bound"][0], factors["slack"][0]]).all()
    extended = np.column_stack([np.ones(20), dependent.numpy()])
    assert factors["kappa_hessian"][0] == pytest.approx(kappa_plus(extended.T @ extended))


def test_a_neuron_without_positive_curvature_has_no_kappa_and_an_inactive_one_has_none_at_all():
    rows = torch.randn(9, 2, dtype=torch.float64)
    factors = neuron_factors(observed(rows, torch.stack([-torch.ones(9), torch.zeros(9)]).double()))
    assert np.isnan(factors["kappa_hessian"]).all()
    assert not np.isnan(factors["kappa_hidden"][0])
    assert np.isnan(factors["kappa_hidden"][1])
    assert factors["s_zero"].tolist() == [0, 9]


def test_a_definite_neuron_is_resolved_beyond_the_zero_tolerance_of_its_matrix():
    # Orthogonal features: κ of the Hessian is 1e16, and of H_e 1e8.
    rows = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat(5, 1) * 1e-8
    factors = neuron_factors(observed(rows, torch.ones(1, 10, dtype=torch.float64)))
    assert factors["kappa_hessian"][0] == pytest.approx(1e16, rel=1e-6)
    assert factors["slack"][0] == pytest.approx(1, rel=1e-6)


def test_a_change_of_the_inputs_leaves_s_and_folds_the_rest():
    example = case(nn.Sequential(nn.Linear(3, 4)), classes(3, 4, sizes=(30, 7)), cross_entropy)
    seen = observe(example, "0")
    mean, scale = seen.rows.mean(dim=0), seen.rows.std(dim=0)
    factors = neuron_factors(seen, lambda rows: (rows - mean) / scale)
    fold = np.eye(4)
    fold[0, 1:], fold[range(1, 4), range(1, 4)] = -mean / scale, 1 / scale
    for i, dense in enumerate(neuron_blocks(example, "0")):
        kappa = np.linalg.cond(fold.T @ dense @ fold)
        assert factors["kappa_hessian"][i] == pytest.approx(kappa, rel=1e-9)


def batchnorm_case(mode):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model(torch.randn(50, 3))
    found = case(model, classes(3, 2), cross_entropy)
    found.mode = mode
    return found


def test_batch_normalisation_in_train_mode_couples_samples_below_it_only():
    assert "depends on other samples" in refused(batchnorm_case("train"), "0")
    above = observe(batchnorm_case("train"), "3")
    for ours, dense in zip(
        assembled(above), neuron_blocks(batchnorm_case("train"), "3"), strict=True
    ):
        assert np.abs(ours - dense).max() <= 1e-13 * np.abs(dense).max()
    observe(batchnorm_case("eval"), "0")


def test_a_loss_that_compares_samples_is_refused():
    example = case(net(nn.Tanh, 3, 2), classes(3, 2), lambda m, b: m(b[0]).var(dim=0).sum())
    assert "depends on other samples" in refused(example, "0")


class Used(nn.Module):
    """The layer is used in one of the ways that break the theorem."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.head = how, nn.Linear(3, 3), nn.Linear(3, 2)
        if how == "tied":
            self.other = nn.Linear(3, 3)
            self.other.weight = self.layer.weight

    def forward(self, x):
        match self.how:
            case "twice":
                x = torch.tanh(self.layer(x))
            case "positions":
                return self.head(torch.tanh(self.layer(x[:, None].expand(-1, 4, -1))).sum(dim=1))
            case "flat positions":
                wide = torch.cat([x[:, None], 2 * x[:, None]], dim=1).flatten(0, 1)
                hidden = torch.tanh(self.layer(wide))
                return self.head(hidden.unflatten(0, (-1, 2)).sum(dim=1))
            case "never":
                return self.head(x @ self.layer.weight.T)
            case "tied":
                x = torch.tanh(self.other(x))
        return self.head(torch.tanh(self.layer(x)))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("twice", "several times"),
        ("positions", "positions of a sample"),
        ("flat positions", "positions of a sample"),
        ("never", "never called"),
        ("tied", "tied"),
    ],
)
def test_layers_that_the_theorem_is_not_about_are_refused_with_the_reason(how, why):
    assert why in refused(case(Used(how), classes(3, 2), cross_entropy), "layer")


def penalised(model, batch):
    return cross_entropy(model, batch) + 0.1 * model.layer.weight.square().sum()


def test_weights_that_act_outside_of_their_forward_are_refused():
    assert "outside" in refused(case(Used("once"), classes(3, 2), penalised), "layer")
    physics = sample_networks.make("pinn")
    assert "outside" in refused(physics, "0")


class Final(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("derivative is not implemented")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return Final.apply(2 * ctx.saved_tensors[0] * gradient)


def once(model, batch):
    return Once.apply(model(batch[0])).mean()


def test_a_loss_without_a_second_derivative_is_refused_with_torchs_reason():
    example = case(net(nn.Tanh, 3, 2), classes(3, 2), once)
    assert "no second derivative in its outputs: derivative is not" in refused(example, "0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_either_dtype_the_checks_pass_and_rounding_is_that_of_the_dtype(dtype):
    example = case(net(nn.ReLU, 3, 6, 5, 2), classes(3, 2), cross_entropy)
    with lent(example.task, dtype=dtype) as (objective, _):
        layer = find_layers(objective.model)["2"]
        factors = neuron_factors(observe_neurons(objective, layer))
    exact = neuron_factors(observe(example, "2"))
    for name in ("s_positive", "s_negative", "s_zero"):
        assert np.array_equal(factors[name], exact[name])
    assert factors["kappa_s"] == pytest.approx(exact["kappa_s"], rel=1e-2, nan_ok=True)


def test_a_convolution_is_refused():
    images = sample_networks.make("batchnorm eval")
    assert "convolution" in refused(images, "0")


@pytest.mark.parametrize("part", [lambda output: output, lambda output: output.detach()])
def test_a_loss_that_is_linear_in_the_neuron_or_without_it_has_no_curvature(part):
    example = case(net(nn.Tanh, 3, 2), classes(3, 2), lambda m, b: part(m(b[0])).mean())
    seen = observe(example, "0")
    assert seen.curvature.shape == (2, 13)
    assert not seen.curvature.any()


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        ("MOST_FEATURES", 2),
        ("MOST_NEURONS", 1),
        ("MOST_NUMBERS", 60),
        ("MOST_WORK", 3000),
    ],
)
def test_large_layers_are_refused_before_any_work(limit, most, monkeypatch):
    monkeypatch.setattr(neurons, limit, most)
    with lent(case(net(nn.Tanh, 3, 2), classes(3, 2), cross_entropy).task) as (objective, _):
        layer = find_layers(objective.model)["0"]
        with pytest.raises(NotApplicable, match=f"more than the {most} up to which"):
            observe_neurons(objective, layer)
        assert neuron_curvature(objective, layer).shape == (2, 13)


def together(monkeypatch, numbers):
    """Differentiate as many neurons together as have so many numbers; how many went together."""
    monkeypatch.setattr(neuron_passes, "MANY", 0)
    monkeypatch.setattr(neuron_passes, "TOGETHER", {"cpu": numbers})
    lengths, derivatives = [], neuron_passes._derivatives

    def spied(gradient, offset, directions):
        lengths.append(len(directions))
        return derivatives(gradient, offset, directions)

    monkeypatch.setattr(neuron_passes, "_derivatives", spied)
    return lengths


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
def test_neurons_differentiated_together_have_the_curvature_of_each_alone(activation, monkeypatch):
    example = case(net(activation, 3, 5, 6, 2), classes(3, 2), cross_entropy)
    alone = observe(example, "2").curvature
    lengths = together(monkeypatch, 4 * 9 * 6)  # six numbers are the widest, nine samples first
    assert torch.allclose(observe(example, "2").curvature, alone, rtol=1e-12, atol=1e-18)
    assert lengths == [4, 2, 6]
    for ours, dense in zip(alone.numpy(), neuron_blocks(example, "2"), strict=True):
        assert ours.sum() == pytest.approx(dense[0, 0], rel=1e-12, abs=1e-18)


class Unbatched(torch.autograd.Function):
    """The identity; its derivative looks at the numbers it is given."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient if math.isfinite(gradient.sum().item()) else None


class Wrong(torch.autograd.Function):
    """The identity; its derivative is twice too large where several are taken together."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        several = torch._C._functorch.is_legacy_batchedtensor(gradient)
        several = several or torch._C._functorch.is_batchedtensor(gradient)
        return 2 * gradient if several else gradient.clone()


@pytest.mark.parametrize("function", [Unbatched, Wrong])
def test_neurons_go_one_by_one_where_they_cannot_be_differentiated_together(function, monkeypatch):
    def loss(model, batch):
        hidden = function.apply(model[0](batch[0]))
        return F.cross_entropy(model[2](torch.tanh(hidden)), batch[1])

    plain = case(net(nn.Tanh, 3, 4, 2), classes(3, 2), cross_entropy)
    alone = observe(plain, "0").curvature
    lengths = together(monkeypatch, 1000)
    odd = case(net(nn.Tanh, 3, 4, 2), classes(3, 2), loss)
    assert torch.allclose(observe(odd, "0").curvature, alone, rtol=1e-12, atol=1e-18)
    assert lengths == [4] + [1] * 8


def test_neurons_that_take_too_long_are_given_up_but_for_a_variant_that_needs_them(monkeypatch):
    monkeypatch.setattr(neurons, "SECONDS", 0.0)
    with lent(case(net(nn.Tanh, 3, 2), classes(3, 2), cross_entropy).task) as (objective, _):
        layer = find_layers(objective.model)["0"]
        with pytest.raises(NotApplicable, match=r"about 0 s one by one, more than the 0 s"):
            observe_neurons(objective, layer)
        assert neuron_curvature(objective, layer).shape == (2, 13)


def test_the_time_of_all_neurons_is_told_from_the_pace_after_the_first(monkeypatch):
    # 15 s go into the first ten of a thousand; then 1 ms each leaves 16 s, and 25 ms 40.
    times = iter([100.0, 115.0, 115.01, 115.5])
    monkeypatch.setattr(neuron_passes, "perf_counter", lambda: next(times))
    passes = Passes(1000, 0, 20.0, next(times))
    passes.done(10)
    passes.done(10)
    with pytest.raises(NotApplicable, match="about 40 s one by one, more than the 20 s"):
        passes.done(10)


@pytest.mark.parametrize(("big", "known"), [(1e7, True), (1e13, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_that_rounding_of_changed_inputs_blurs_are_not_told(big, known, sign):
    torch.manual_seed(3)
    base = torch.randn(40, 2, dtype=torch.float64)
    rows = torch.stack([base[:, 0], base[:, 0] + 1e-2 * base[:, 1]], dim=1) + big
    curvature = torch.ones(1, 40, dtype=torch.float64)
    curvature[0, 0] = sign
    mean = rows.numpy().astype(np.longdouble).mean(axis=0)
    centred = torch.from_numpy((rows.numpy() - mean).astype(float))
    middle = torch.from_numpy(mean.astype(float))
    found = neuron_factors(observed(rows, curvature), lambda given: given - middle)
    raw = neuron_factors(observed(centred, curvature))
    assert not np.isnan(raw["kappa_hessian"]).any()
    for name in ("kappa_hessian", "kappa_hidden", "bound", "slack"):
        if known:
            assert found[name] == pytest.approx(raw[name], rel=1e-3, nan_ok=True), name
        else:
            assert np.isnan(found[name]).all(), name
    assert found["kappa_s"] == raw["kappa_s"]
    assert found["s_positive"] == raw["s_positive"]


@pytest.mark.parametrize(("big", "sign"), [(6e10, 1), (1e9, -1)])
def test_the_hessian_is_blurred_before_h_e_is(big, sign):
    torch.manual_seed(3)
    base = torch.randn(40, 2, dtype=torch.float64)
    rows = torch.stack([base[:, 0], base[:, 0] + 1e-2 * base[:, 1]], dim=1) + big
    curvature = torch.ones(1, 40, dtype=torch.float64)
    curvature[0, 0] = sign
    found = neuron_factors(observed(rows, curvature), lambda given: given - big)
    assert np.isfinite(found["kappa_hidden"]).all()
    assert np.isnan([found["kappa_hessian"], found["bound"], found["slack"]]).all()


def test_the_model_is_left_as_it_was():
    example = case(net(nn.Tanh, 3, 2), classes(3, 2), cross_entropy)
    with lent(example.task) as (objective, _):
        layer = find_layers(objective.model)["0"]
        neuron_curvature(objective, layer)
        module = layer.module
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())


def test_explaining_layers_joins_h_e_with_its_neurons_and_observes_them_once(monkeypatch):
    example = case(net(nn.Tanh, 3, 4, 2), classes(3, 2), cross_entropy)
    seen = []
    monkeypatch.setattr(
        neurons,
        "observe_neurons",
        lambda objective, layer: seen.append(layer.name) or observe_neurons(objective, layer),
    )
    known = {}
    with lent(example.task) as (objective, _):
        layers = find_layers(objective.model)
        raw = explain_layers(objective, layers.values(), observed=known)
        changed = explain_layers(
            objective, [layers["0"]], {"0": lambda rows: rows * 3}, observed=known
        )
    assert seen == ["0", "2"]
    assert [result.layer for result in raw] == ["0", "2"]
    assert set(raw[0].neurons) == {
        *("kappa_hessian", "kappa_hidden", "kappa_s", "bound", "slack"),
        *("s_positive", "s_negative", "s_zero"),
    }
    assert [len(result.neurons["kappa_s"]) for result in raw] == [4, 2]
    assert np.array_equal(changed[0].neurons["kappa_s"], raw[0].neurons["kappa_s"])
    assert changed[0].hidden["row_norm"][1:] == pytest.approx(3 * raw[0].hidden["row_norm"][1:])
    assert (changed[0].neurons["kappa_hidden"] != raw[0].neurons["kappa_hidden"]).all()


def test_a_layer_without_neurons_keeps_its_h_e_and_the_reason():
    known = {}
    with lent(case(Used("twice"), classes(3, 2), cross_entropy).task) as (objective, _):
        layers = find_layers(objective.model)
        found = explain_layers(objective, layers.values(), observed=known)
    assert [(result.layer, bool(result.neurons)) for result in found] == [
        ("layer", False),
        ("head", True),
    ]
    assert "several times" in known["layer"]
