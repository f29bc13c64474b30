"""Changes of a network: when they are made, what they say, and that they are undone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from changed_networks import changed, hessian, tanh_mlp, task
from fake_ranks import InTurn
from hessdiag import Task
from hessdiag.activations import find_layers
from hessdiag.curvature.engines import make_engine
from hessdiag.demos.tasks import demo_task
from hessdiag.distributed import Alone
from hessdiag.options import Options
from hessdiag.task import units
from hessdiag.variants.grammar import NETWORKS
from hessdiag.variants.networks import CHANGES, changed_network
from hessdiag.variants.scene import NotApplicable
from sample_networks import Partial, lent, mse, pinn_loss, token_case


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(5)


def refuses(variant, given, message, **options):
    with pytest.raises(NotApplicable, match=message), changed(variant, given, **options):
        pass


def test_every_network_of_the_grammar_can_be_made():
    assert set(CHANGES) == set(NETWORKS)


@pytest.mark.parametrize("variant", ["bn", "bn-detached"])
def test_ranks_change_a_network_as_one_process_does(variant):
    """Rows that bn joins see each other, so that no rank may have some of them."""
    given = task(tanh_mlp(), 3, sizes=(5, 4, 3))
    with lent(given) as (alone, _):
        objective = replace(alone, group=InTurn(2), units=units(given))
        right = alone.value()
        with changed_network(variant, objective, Options(), units=units(given)) as found:
            assert found.objective.value() == pytest.approx(right, rel=1e-12)
            gradient = found.objective.gradient(list(found.objective.model.parameters()))
            one = replace(found.objective, group=Alone())
            whole = one.gradient(list(one.model.parameters()))
            assert float((gradient - whole).norm()) <= 1e-12 * float(whole.norm())


def state(model):
    """All that a module holds: tensors bit by bit with their storage, hooks and attributes."""
    found = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            held = dict(value) if isinstance(value, dict) else value
            held = list(value) if isinstance(value, list) else held
            found[name, key] = held
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                bits = tensor.detach().clone()
                found[name, key, "bits"] = (tensor.data_ptr(), bits.dtype, bits.tolist())
    return found


def mixed():
    """Something for every change to do: convolutions, two kinds of norms, layers left alone."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        *(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 2)),
    )
    net.train()(torch.randn(9, 1, 6, 6))
    with torch.no_grad():
        net[5].weight.normal_()
        net[5].bias.normal_()
    return task(net, 1, 6, 6, sizes=(4, 5))


@pytest.mark.parametrize("variant", NETWORKS)
def test_everything_is_undone_bit_for_bit_also_after_an_error_inside(variant):
    given = mixed()
    original = state(given.model)
    with lent(given) as (objective, _):
        before = state(objective.model)
        with changed_network(variant, objective, Options(), units=units(given)):
            assert state(objective.model) != before
        assert state(objective.model) == before
        with (
            pytest.raises(ZeroDivisionError),
            changed_network(variant, objective, Options(), units=units(given)),
        ):
            raise ZeroDivisionError
        assert state(objective.model) == before
    assert state(given.model) == original


@pytest.mark.parametrize("variant", NETWORKS)
def test_no_storage_is_written_and_parameters_stay_the_same_objects(variant):
    given = mixed()
    with lent(given) as (objective, _):
        named = dict(objective.model.named_parameters())
        kept = {name: (p.data, p.data.clone()) for name, p in named.items()}
        with changed_network(variant, objective, Options(), units=units(given)):
            for name, parameter in dict(objective.model.named_parameters()).items():
                assert name not in named or parameter is named[name]
                assert not parameter.requires_grad
            for storage, copy in kept.values():
                assert torch.equal(storage, copy)


def half_foldable():
    """One BatchNorm can be folded away, the next cannot."""
    head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    return task(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), head), 3)


def coupled():
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    return Task(net, [torch.rand(5, 1)], pinn_loss)


@pytest.mark.parametrize(
    ("variant", "given", "options", "message"),
    [
        ("without-bn", half_foldable, {}, "BatchNorm 3.1 cannot be folded"),
        ("bn", coupled, {}, "the changed network has loss"),
        ("bn", mixed, {"memory_budget": 1}, "needs the graph of the whole data"),
    ],
)
def test_a_refusal_undoes_what_was_begun(variant, given, options, message):
    given = given()
    with lent(given) as (objective, _):
        before = state(objective.model)
        with (
            pytest.raises(NotApplicable, match=message),
            changed_network(variant, objective, Options(**options), units=units(given)),
        ):
            pass
        assert state(objective.model) == before


@pytest.mark.parametrize("demo", ["mlp", "convnet", "transformer"])
@pytest.mark.parametrize("variant", [n for n in NETWORKS if n != "without-bn"])
def test_the_demo_networks_take_every_normalisation(demo, variant):
    given = demo_task(demo)
    images, labels = (t[:60] for t in given.data[0])
    given = Task(given.model, [(images[:40], labels[:40]), (images[40:], labels[40:])], given.loss)
    hidden = {
        "mlp": {"2"},
        "convnet": {"conv2", "head"},
        "transformer": {"encoder.linear1", "encoder.linear2", "head"},
    }[demo]
    with lent(given) as (objective, _):
        before = objective.value()
    with changed(variant, given) as (found, named):
        same = variant in {"bn", "bn-detached"}
        assert found.same_function == same
        assert (abs(found.objective.value() - before) <= 1e-11 * before) == same
        if demo == "convnet" and same:  # its second convolution has no bias
            hidden = {"head"}
            assert any("conv2 (no bias" in note for note in found.notes)
        assert found.changed == hidden
        assert set(found.gone) <= set(named)
        folded = {"encoder.norm2.weight", "encoder.norm2.bias", "norm.weight", "norm.bias"}
        assert set(found.gone) == (folded if demo == "transformer" else set())


def test_a_network_whose_only_layer_sees_the_data_takes_none():
    for variant in ("bn", "bn-detached", "ln", "gn", "rms"):
        refuses(variant, task(nn.Linear(3, 2), 3), "sees the data itself")


def test_a_loss_over_another_model_is_told_so():
    given, other = task(tanh_mlp(), 3), tanh_mlp().double()
    given = Task(given.model, given.data, lambda _, batch: mse(other, batch))
    refuses("bn", given, "calls no Linear or convolution layer of the model")


def test_layers_that_cannot_compensate_are_left_alone_and_named():
    given = task(tanh_mlp(bias=False), 3)
    with changed("bn", given) as (found, _):
        assert found.changed == {"4"}
        assert found.notes == ("left alone: 2 (no bias to take up a mean)",)
    with changed("bn", task(Partial(), 3)) as (found, _):
        assert found.changed == {"frozen"}
        assert "left alone: unused (never called as a module)" in " ".join(found.notes)
        assert "second (shares its weights)" in " ".join(found.notes)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(h)))))


def test_a_layer_called_twice_is_normalised_by_sample_only():
    given = task(Twice(), 3)
    with changed("bn", given) as (found, _):
        assert found.changed == {"head"}
        assert found.notes == ("left alone: shared (called more than once in a forward pass)",)
    with changed("ln", given) as (found, _):
        net, (x, y) = found.objective.model, found.objective.batches.items[0]

        def norm(h):
            return F.layer_norm(h, (3,))

        # Plain products, for the layers themselves are hooked.
        h = F.linear(x, net.first.weight, net.first.bias).tanh()
        for _ in range(2):
            h = F.linear(norm(h), net.shared.weight, net.shared.bias).tanh()
        out = F.linear(norm(h), net.head.weight, net.head.bias)
        assert found.objective.value() == pytest.approx(F.mse_loss(out, y).item(), rel=1e-12)


class Recurrent(nn.Module):
    """A layer that sees the data first and its own output later."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.cell(torch.tanh(self.cell(x)))))


def test_a_layer_that_also_sees_the_data_is_left_alone():
    with changed("ln", task(Recurrent(), 3)) as (found, _):
        assert found.changed == {"head"}


def test_a_single_feature_has_nothing_to_be_normalised_by_in_its_sample():
    net = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2))
    refuses("ln", task(net, 3), r"can be normalised before; left alone: 2 \(a single feature\)")
    with changed("bn", task(net, 3)) as (found, _):
        assert found.changed == {"2"}


def test_points_that_require_gradients_are_no_hidden_variable():
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    points = [torch.rand(5, 1, requires_grad=True)]
    with changed("bn-detached", Task(net, points, pinn_loss)) as (found, _):
        assert found.changed == {"2"}


def test_a_tied_readout_and_attention_are_left_alone():
    case = token_case()
    refuses("bn", case.task, "can be normalised before; .*head .shares its weights")
    with changed("ln", case.task) as (found, named):
        assert found.changed == {"head"}
        block = hessian(found.objective, [named["embed.weight"]])
        assert torch.isfinite(block).all()


def test_batches_that_cannot_be_joined_leave_bn_out_and_not_bn_detached():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    rows = [
        (torch.randn(n, length, 3), torch.randn(n, length, 2)) for n, length in ((2, 4), (3, 5))
    ]
    given = Task(net, rows, mse)
    refuses("bn", given, "cannot be joined into one")
    with changed("bn-detached", given) as (found, _):
        assert len(found.objective.batches.items) == 2


def test_a_loss_that_is_no_mean_over_rows_leaves_bn_out_and_gives_both_values():
    given = task(tanh_mlp(), 3, sizes=(6, 6), loss=lambda m, b: mse(m, b) ** 2)
    refuses("bn", given, r"the data as one batch, \d\.\d+, is not its mean .*, \d\.\d+; give")


def test_padded_tokens_that_are_counted_right_can_be_joined():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5))
    tokens, labels = torch.randint(0, 5, (7, 3)), torch.randint(0, 5, (7, 3))
    labels[0, 1:] = labels[5, :] = -100
    data = [(tokens[s], labels[s]) for s in (slice(3), slice(3, 7))]

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    with lent(Task(net, data, loss)) as (objective, _):
        before = objective.value()
    with changed("bn", Task(net, data, loss)) as (found, _):
        assert found.changed == {"1", "3"}
        assert found.objective.batches.shares == (1.0,)
        assert found.objective.value() == pytest.approx(before, rel=1e-12)
        assert found.notes == ("the 2 batches are joined into one",)
    by_batch = Task(net, data, loss, batch_size=lambda _: 1)
    refuses("bn", by_batch, r"is not its mean .* \(2 units apart, 1 together\); give")


def test_batchnorm_in_train_mode_over_several_batches_leaves_bn_out():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    refuses("bn", task(net, 3, sizes=(6, 6), mode="train"), "is not its mean over the batches")


@pytest.mark.parametrize("sizes", [(12,), (6, 6)])
def test_a_graph_above_the_memory_budget_leaves_bn_out_and_says_by_how_much(sizes):
    given = task(tanh_mlp(), 3, sizes=sizes)
    refuses("bn", given, r"MiB, and has 0\.000977 MiB; raise --memory-budget", memory_budget=1024)
    with changed("bn-detached", given, memory_budget=1024):
        pass


def test_float32_is_the_same_function_to_its_own_rounding():
    given = task(tanh_mlp(), 3, sizes=(7, 5))
    with lent(given, dtype=torch.float32) as (objective, _):
        before = objective.value()
        for variant in ("bn", "bn-detached"):
            with changed_network(variant, objective, Options(), units=units(given)) as found:
                assert found.objective.value() == pytest.approx(before, rel=1e-5)
                assert all(p.dtype == torch.float32 for p in objective.model.parameters())


def test_what_other_hooks_see_is_what_the_weights_meet():
    given = task(tanh_mlp(), 3)
    with changed("bn", given) as (found, _):
        layer, seen = find_layers(found.objective.model)["2"], []
        handle = layer.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        found.objective.value()
        handle.remove()
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(4).double())


def test_gauss_newton_of_a_linear_readout_is_its_hessian_under_bn():
    with changed("bn", task(tanh_mlp(), 3), curvature="ggn") as (found, named):
        parameters = [named["4.weight"], named["4.bias"]]
        product = make_engine(found.objective, parameters, curvature="ggn", engine="recompute")
        got = torch.stack([product(row) for row in torch.eye(8).double()])
        expected = hessian(found.objective, parameters)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_a_loss_that_reads_weights_is_another_without_batchnorm():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    net.train()(torch.randn(9, 3))

    def loss(model, batch):
        return mse(model, batch) + model[0].weight.square().sum()

    refuses("without-bn", task(net, 3, loss=loss), "the changed network has loss")


def test_a_layer_left_alone_sees_another_input_where_the_function_changes_below_it():
    net = nn.Sequential(*(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)))
    with changed("ln", task(net, 3)) as (found, _):
        assert found.notes == ("left alone: 4 (a single feature)",)
        assert found.changed == {"2", "4"}


def test_points_that_require_gradients_are_leaves_when_they_are_joined():
    points = [torch.rand(n, 3, requires_grad=True) for n in (5, 4)]
    given = Task(tanh_mlp(), points, lambda model, batch: model(batch).square().mean())
    with changed("bn", given) as (found, _):
        (batch,) = found.objective.batches.items
        assert batch.is_leaf
        assert batch.requires_grad


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(input=torch.tanh(self.body(x)))


@pytest.mark.parametrize("variant", ["bn", "ln"])
def test_an_input_given_by_name_is_normalised_too(variant):
    with changed(variant, task(ByName(), 3)) as (found, _):
        assert found.changed == {"head"}
        assert torch.isfinite(torch.tensor(found.objective.value()))
