"""Optimizer state is on the right parameter, or nowhere; a true reason is given."""

import copy
import random

import pytest
import torch
from torch import nn

from hessdiag.checkpoint import map_optimizer
from hessdiag.errors import TaskError


class Net(nn.Module):
    """Two layers of one shape, so that no check of shapes can tell their tensors apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x):
        return self.norm(self.b(self.a(x).tanh()))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def groups(model, *, named=True, shuffled=True):
    """Weights with decay and the rest without, each in an order of its own."""
    decay = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim < 2]
    if shuffled:
        decay = [decay[i] for i in (1, 0)]
        rest = [rest[i] for i in (2, 0, 3, 1)]
    made = [{"params": rest, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.1}]
    if not named:
        for group in made:
            group["params"] = [p for _, p in group["params"]]
    return made


def trained(model, optimizer):
    """Two steps, and the truth: the state that the optimizer holds for each parameter object."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=generator)).pow(3).sum().backward()
        optimizer.step()
    truth = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
    return copy.deepcopy(optimizer.state_dict()), truth


def check(found, truth):
    assert found.unmappable is None
    assert {n for n, held in found.state.items() if held} == set(truth)
    for name, held in truth.items():
        assert set(found.state[name]) == set(held)
        for key, value in held.items():
            assert torch.equal(torch.as_tensor(found.state[name][key]), value)


def test_names_in_the_groups_decide_in_any_order():
    model = net()
    raw, truth = trained(model, torch.optim.AdamW(groups(model)))
    found = map_optimizer(raw, net(), None)
    check(found, truth)
    assert found.mapped_by == "names"
    assert found.class_name == "AdamW"
    assert found.group_of == {n: int(p.ndim > 1) for n, p in model.named_parameters()}
    assert [group["weight_decay"] for group in found.groups] == [0.0, 0.1]
    assert "params" not in found.groups[0]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod."])
def test_wrappers_in_the_names_are_removed(prefix):
    model = net()
    raw, truth = trained(model, torch.optim.Adam(groups(model)))
    for group in raw["param_groups"]:
        group["param_names"] = [prefix + name for name in group["param_names"]]
    found = map_optimizer(raw, net(), None)
    check(found, truth)
    assert found.class_name == "Adam"


def test_several_groups_without_names_are_refused_though_all_shapes_fit():
    model = net()
    raw, _ = trained(model, torch.optim.AdamW(groups(model, named=False)))
    found = map_optimizer(raw, net(), None)
    assert found.state == found.group_of == {}
    assert found.mapped_by is None
    assert "2 parameter groups and no parameter names" in found.unmappable
    assert len(found.groups) == 2


def test_the_tasks_own_optimizer_maps_several_groups():
    model = net()
    raw, truth = trained(model, torch.optim.AdamW(groups(model, named=False)))
    found = map_optimizer(raw, net(), lambda m: torch.optim.AdamW(groups(m, named=False)))
    check(found, truth)
    assert found.mapped_by == "optimizer"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m: torch.optim.AdamW(m.parameters()), "groups of .6. parameters"),
        (lambda m: torch.optim.AdamW(groups(m, named=False)[::-1]), "of .2, 4. parameters"),
        (lambda m: torch.optim.SGD(groups(m, named=False)), "is SGD and the state that of AdamW"),
    ],
)
def test_a_task_optimizer_that_is_not_the_files_is_refused(make, reason):
    model = net()
    raw, _ = trained(model, torch.optim.AdamW(groups(model, named=False)))
    found = map_optimizer(raw, net(), make)
    assert found.state == {}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.unmappable)


def test_groups_of_equal_size_in_another_order_are_told_by_their_decay():
    def build(model, first, second):
        return torch.optim.SGD(
            [
                {"params": getattr(model, first).parameters(), "weight_decay": float(first == "a")},
                {
                    "params": getattr(model, second).parameters(),
                    "weight_decay": float(second == "a"),
                },
            ],
            momentum=0.9,
            lr=0.1,
        )

    model = net()
    raw, truth = trained(model, build(model, "a", "b"))
    check(map_optimizer(raw, net(), lambda m: build(m, "a", "b")), truth)
    swapped = map_optimizer(raw, net(), lambda m: build(m, "b", "a"))
    assert "another order" in swapped.unmappable


def test_names_counted_from_a_submodule_need_the_tasks_optimizer():
    """Counted from a submodule, 0.0.weight is another tensor's name, of the same shape."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3)))
    inner = nn.Sequential(model[0], model[1], nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))

    def make(m):
        return torch.optim.SGD(m[2].named_parameters(prefix="0"), momentum=0.9)

    raw, truth = trained(inner, make(inner))
    found = map_optimizer(raw, inner, make)
    check(found, truth)
    assert set(found.state) == {"2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias"}
    refused = map_optimizer(raw, inner, None)
    assert "parameter names are not the model's: 0.1.weight" in refused.unmappable


class Twin(nn.Module):
    """Its part ``sub`` has parameters of the names and shapes of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.sub = nn.Linear(3, 3), nn.ModuleDict({"a": nn.Linear(3, 3)})

    def forward(self, x):
        return self.a(self.sub["a"](x))


def test_names_that_fit_the_network_and_a_part_of_it_are_refused():
    model = Twin()
    raw, _ = trained(model, torch.optim.Adam(model.sub.named_parameters()))
    refused = map_optimizer(raw, model, None)
    assert "fit the network and its part 'sub' alike" in refused.unmappable

    def make(m):
        return torch.optim.Adam(m.sub.named_parameters())

    raw, truth = trained(model, make(model))
    found = map_optimizer(raw, model, make)
    check(found, truth)
    assert set(found.state) == {"sub.a.weight", "sub.a.bias"}
    whole, truth = trained(model, torch.optim.Adam(model.named_parameters()))
    check(map_optimizer(whole, model, None), truth)


def test_a_single_group_maps_with_checked_shapes():
    model = net()
    raw, truth = trained(model, torch.optim.Adam(model.parameters()))
    found = map_optimizer(raw, net(), None)
    check(found, truth)
    assert found.mapped_by == "single group"

    raw["state"][2]["exp_avg"] = torch.ones(4, 4)
    refused = map_optimizer(raw, net(), None)
    assert refused.unmappable == "exp_avg of b.weight has shape (4, 4), the parameter (3, 3)"
    assert refused.state == {}


@pytest.mark.parametrize("only_trainable", [True, False])
def test_frozen_parameters_are_counted_as_the_optimizer_counted_them(only_trainable):
    model, fresh = net(), net()
    for m in (model, fresh):
        m.a.weight.requires_grad_(False)
    chosen = [p for p in model.parameters() if p.requires_grad or not only_trainable]
    raw, truth = trained(model, torch.optim.Adam(chosen))
    found = map_optimizer(raw, fresh, None)
    check(found, truth)
    assert ("a.weight" in found.state) is (not only_trainable)


def test_a_tied_parameter_has_its_first_name():
    model = net()
    model.b.weight = model.a.weight
    fresh = net()
    fresh.b.weight = fresh.a.weight
    raw, truth = trained(model, torch.optim.Adam(model.parameters()))
    check(map_optimizer(raw, fresh, None), truth)
    raw["param_groups"][0]["param_names"] = [
        "b.weight" if n == "a.weight" else n for n, _ in model.named_parameters()
    ]
    found = map_optimizer(raw, fresh, None)
    check(found, truth)
    assert found.mapped_by == "names"


def test_another_number_of_parameters_is_refused():
    raw, _ = trained(net(), torch.optim.Adam(list(net().parameters())))
    raw["param_groups"][0]["params"] = [0, 1]
    assert "for 2 parameters and the model has 6" in map_optimizer(raw, net(), None).unmappable


def test_an_optimizer_that_has_not_stepped_maps_to_empty_states():
    raw = torch.optim.SGD(net().parameters()).state_dict()
    found = map_optimizer(raw, net(), None)
    assert found.unmappable is None
    assert list(found.state.values()) == [{}] * 6


@pytest.mark.parametrize("raw", [{}, {"state": {}, "param_groups": []}, {"state": 3}])
def test_what_is_no_optimizer_state_is_unmappable(raw):
    assert "not a state_dict()" in map_optimizer(raw, net(), None).unmappable


CLASSES = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Adadelta"]


@pytest.mark.parametrize("name", [*CLASSES, "ASGD", "Rprop", "Adafactor"])
def test_the_class_is_told_from_what_torch_stores(name):
    model = net()
    raw, _ = trained(model, getattr(torch.optim, name)(model.parameters(), lr=0.01))
    assert map_optimizer(raw, net(), None).class_name == name


def test_adam_of_an_old_release_is_not_guessed():
    model = net()
    raw, _ = trained(model, torch.optim.Adam(model.parameters()))
    del raw["param_groups"][0]["decoupled_weight_decay"]
    assert map_optimizer(raw, net(), None).class_name is None
    own = map_optimizer(raw, net(), lambda m: torch.optim.AdamW(m.parameters()))
    assert own.class_name == "AdamW"


def test_building_the_optimizer_leaves_model_and_random_numbers_alone():
    model = net()
    raw, _ = trained(net(), torch.optim.Adam(net().parameters()))
    model.a.weight.grad = torch.ones(3, 3)
    before = torch.get_rng_state(), random.getstate()

    def make(m):
        torch.rand(3)
        random.shuffle([1, 2, 3])
        m.eval()
        m.zero_grad()
        m.a.requires_grad_(False)
        return torch.optim.Adam(m.parameters())

    map_optimizer(raw, model, make)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.a.weight.grad, torch.ones(3, 3))


def test_an_optimizer_function_that_does_not_work_is_the_tasks_error():
    raw = torch.optim.SGD(net().parameters()).state_dict()

    def spoil(m):
        with torch.no_grad():
            m.a.weight.zero_()
        return torch.optim.SGD(m.parameters())

    for make, message in (
        (lambda m: 1 / 0, "raised ZeroDivisionError"),
        (lambda m: None, "must return a torch.optim.Optimizer"),
        (spoil, "changes the model's weights"),
    ):
        with pytest.raises(TaskError, match=message):
            map_optimizer(raw, net(), make)


@pytest.mark.parametrize("names", [None, 3, "0.weight"])
def test_parameter_names_that_are_no_list_are_as_good_as_none(names):
    model = net()
    raw = torch.optim.Adam(model.parameters()).state_dict()
    raw["param_groups"][0]["param_names"] = names
    assert map_optimizer(raw, model).mapped_by == "single group"
