"""No M is better than a wrong one: state that lacks, is damaged, or may be another tensor's."""

import pytest
import torch

from hessdiag.variants.optimizers import NO_FIXED_M, optimizer_coordinates
from hessdiag.variants.scene import NotApplicable
from optimizer_scenes import (
    MAKE,
    close,
    feed,
    held_by,
    m_of,
    net,
    scene_of,
    wild,
)

optim = torch.optim


def test_dead_rows_need_no_state_and_live_ones_do():
    model = net()
    optimizer = MAKE["adam"](model.parameters())
    draw = wild()
    feed(optimizer, lambda p, step: None if p is model.a.bias else draw(p, step), 3)
    held = held_by(optimizer, model)
    with pytest.raises(NotApplicable, match=r"a\.bias has no optimizer state: it never had a grad"):
        optimizer_coordinates(scene_of(model, held, dead=[9]))
    built = optimizer_coordinates(scene_of(model, held, dead=[9, 10, 11]))
    assert torch.equal(m_of(built)[9:12], torch.ones(3))
    assert optimizer_coordinates(scene_of(model, held, names=["a.weight"])).source == "state"


def test_a_parameter_that_the_optimizer_does_not_hold_is_named():
    model = net()
    optimizer = MAKE["adam"](model.b.named_parameters(prefix="b"))
    feed(optimizer, wild(), 3)
    held = held_by(optimizer, model)
    with pytest.raises(NotApplicable, match=r"a\.weight .* not among the optimizer's parameters"):
        optimizer_coordinates(scene_of(model, held))


def test_a_rate_of_zero_takes_the_initial_one_or_is_refused():
    model = net()
    groups = [
        {"params": list(model.a.named_parameters(prefix="a")), "lr": 0.1},
        {"params": list(model.b.named_parameters(prefix="b")), "lr": 0.3},
    ]
    optimizer = optim.Adam(groups)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 3))
    for _ in range(3):
        feed(optimizer, wild(), 1)
        schedule.step()
    held = held_by(optimizer, model)
    assert [group["lr"] for group in held.groups] == [0, 0]
    built = optimizer_coordinates(scene_of(model, held))
    alone = optimizer_coordinates(scene_of(model, held, names=["b.weight", "b.bias"]))
    close(m_of(built)[12:], 0.3 * m_of(alone))
    assert "decayed to 0" in built.notes[0]
    held.groups[0]["lr"] = 0.1
    with pytest.raises(NotApplicable, match=r"the learning rate of b\.weight is 0"):
        optimizer_coordinates(scene_of(model, held))
    part = {"names": ["a.weight", "b.bias"], "dead": [9, 10, 11]}
    built = optimizer_coordinates(scene_of(model, held, **part))
    close(m_of(built)[9:], torch.ones(3, dtype=torch.float64))


def test_without_eps_a_zero_moment_is_refused_and_a_dead_one_is_not():
    model = net()
    optimizer = optim.Adam(model.parameters(), eps=0)
    feed(optimizer, lambda p, _: torch.ones_like(p), 2)
    optimizer.state[model.a.weight]["exp_avg_sq"][0, 1] = 0
    held = held_by(optimizer, model)
    with pytest.raises(NotApplicable, match=r"1 parameters of a\.weight have .* M is infinite"):
        optimizer_coordinates(scene_of(model, held))
    assert m_of(optimizer_coordinates(scene_of(model, held, dead=[1])))[1] == 1


def test_a_negative_centred_variance_is_refused_where_torch_steps_to_nan():
    model = net()
    optimizer = MAKE["rmsprop, centred"](model.parameters())
    feed(optimizer, wild(), 4)
    optimizer.state[model.b.weight]["grad_avg"][2, 1] = 1e9
    feed(optimizer, lambda p, _: torch.zeros_like(p), 1)
    assert bool(model.b.weight[2, 1].isnan())
    held = held_by(optimizer, model)
    with pytest.raises(NotApplicable, match=r"1 parameters of b\.weight .* step is NaN"):
        optimizer_coordinates(scene_of(model, held))


def test_a_number_in_place_of_a_tensor_is_refused():
    model = net()
    optimizer = MAKE["adam"](model.parameters())
    feed(optimizer, wild(), 2)
    optimizer.state[model.b.bias]["exp_avg_sq"] = torch.ones(())
    with pytest.raises(NotApplicable, match=r"the state of b\.bias has not the parameter's shape"):
        optimizer_coordinates(scene_of(model, held_by(optimizer, model)))


def test_an_m_outside_of_single_precision_is_refused_there():
    model = net()
    optimizer = optim.RMSprop(model.parameters(), eps=0)
    feed(optimizer, lambda p, _: torch.full_like(p, 1e-90), 2)
    held = held_by(optimizer, model)
    assert optimizer_coordinates(scene_of(model, held)).source == "state"
    with pytest.raises(NotApplicable, match=r"leaves the range of torch\.float32"):
        optimizer_coordinates(scene_of(model.float(), held))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_damaged_second_moment_is_refused(value):
    model = net()
    optimizer = MAKE["adamw"](model.parameters())
    feed(optimizer, wild(), 2)
    optimizer.state[model.a.weight]["exp_avg_sq"][0, 0] = value
    with pytest.raises(NotApplicable, match=r"a\.weight have a second moment that is negative or"):
        optimizer_coordinates(scene_of(model, held_by(optimizer, model)))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("betas", None, "makes no sense"),
        ("betas", (0.9,), "makes no sense"),
        ("betas", (0.9, 1.0), "no bias correction"),
        ("eps", "small", "makes no sense"),
    ],
)
def test_damaged_hyperparameters_are_refused(key, value, reason):
    model = net()
    optimizer = MAKE["adamw"](model.parameters())
    feed(optimizer, wild(), 2)
    held = held_by(optimizer, model)
    held.groups[0][key] = value
    with pytest.raises(NotApplicable, match=reason):
        optimizer_coordinates(scene_of(model, held))
    del held.groups[0][key]
    with pytest.raises(NotApplicable, match=f"lacks '{key}'"):
        optimizer_coordinates(scene_of(model, held))


def sgd(p):
    return optim.SGD(p, lr=0.1, momentum=0.9)


SKIPPED = {
    "SGD": sgd,
    "ASGD": lambda p: optim.ASGD(p),
    "Muon": lambda p: optim.Muon([q for q in p if q.ndim == 2]),
    "Adadelta": lambda p: optim.Adadelta(p),
    "Adafactor": lambda p: optim.Adafactor(p),
    "LBFGS": lambda p: optim.LBFGS(p),
    "Rprop": lambda p: optim.Rprop(p),
    "SparseAdam": lambda p: optim.SparseAdam(p),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_class_without_a_fixed_m_is_skipped_for_its_own_reason(name):
    model = net()
    optimizer = SKIPPED[name](list(model.parameters()))
    if name == "LBFGS":
        optimizer.step(lambda: _closure(model))
    else:
        sparse = name == "SparseAdam"
        draw = wild()
        feed(optimizer, lambda p, _: draw(p).to_sparse() if sparse else draw(p), 2)
    held = held_by(optimizer, model)
    with pytest.raises(NotApplicable) as refused:
        optimizer_coordinates(scene_of(model, held))
    assert str(refused.value) == NO_FIXED_M[name]
    assert str(refused.value).startswith(name)


def _closure(model):
    model.zero_grad()
    loss = model(torch.ones(2, 3, dtype=torch.float64)).square().sum()
    loss.backward()
    return loss


def test_every_other_reason_is_given_in_words():
    model = net()
    optimizer = optim.AdamW([{"params": model.a.parameters()}, {"params": model.b.parameters()}])
    feed(optimizer, wild(), 2)
    unmapped = held_by(optimizer, model)
    mapped = held_by(
        optimizer, model, lambda m: optim.AdamW([{"params": x.parameters()} for x in (m.a, m.b)])
    )

    class Mine(optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    foreign = held_by(
        optimizer, model, lambda m: Mine([{"params": x.parameters()} for x in (m.a, m.b)])
    )
    for held, changed, reason in (
        (None, False, "holds no optimizer state"),
        (unmapped, False, "cannot be given to parameters: it has 2 parameter groups"),
        (mapped, True, "belongs to the network as it was"),
        (foreign, False, "the M of Mine is not known"),
    ):
        with pytest.raises(NotApplicable, match=reason):
            optimizer_coordinates(scene_of(model, held, changed=changed))


def test_a_class_derived_from_torchs_that_steps_as_torchs_has_its_m():
    class Mine(optim.AdamW):
        pass

    model = net()
    optimizer = Mine(model.parameters())
    feed(optimizer, wild(), 2)
    held = held_by(optimizer, model, lambda m: Mine(m.parameters()))
    assert optimizer_coordinates(scene_of(model, held)).optimizer_class == "AdamW"


def test_a_foreign_class_with_a_name_of_torchs_is_not_taken_for_it():
    class AdamW(optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1.0})

        def step(self, closure=None):
            return closure

    model = net()
    optimizer = MAKE["adamw"](model.parameters())
    feed(optimizer, wild(), 2)
    held = held_by(optimizer, model, lambda m: AdamW(m.parameters()))
    with pytest.raises(NotApplicable, match=r"the M of .*\.AdamW is not known"):
        optimizer_coordinates(scene_of(model, held))


def grouped(model, order, *, named):
    """Weights with decay, biases without; ``order`` of groups and of tensors inside them."""
    decay = [(n, p) for n, p in model.named_parameters() if p.ndim > 1][:: order[1]]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim < 2][:: order[1]]
    made = [
        {"params": decay, "weight_decay": 0.1, "lr": 0.1},
        {"params": rest, "weight_decay": 0.0, "lr": 0.2},
    ][:: order[0]]
    if not named:
        for group in made:
            group["params"] = [p for _, p in group["params"]]
    return made


@pytest.mark.parametrize("order", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_groups_in_any_order_give_every_tensor_its_own_m_or_none(order):
    model = net()
    other = (-order[0], order[1])
    for named, make, mapped in (
        (True, None, True),
        (True, lambda m: optim.AdamW(grouped(m, other, named=True)), True),
        (False, None, False),
        (False, lambda m: optim.AdamW(grouped(m, order, named=False)), True),
        (False, lambda m: optim.AdamW(grouped(m, other, named=False)), False),
    ):
        optimizer = optim.AdamW(grouped(model, order, named=named))
        feed(optimizer, wild(), 3)
        held = held_by(optimizer, net(), make)
        for name, parameter in model.named_parameters():
            scene = scene_of(net(), held, names=[name])
            if mapped:
                v = optimizer.state[parameter]["exp_avg_sq"].reshape(-1) / (1 - 0.999**3)
                close(m_of(optimizer_coordinates(scene)), 1 / (v.sqrt() + 1e-8))
            else:
                with pytest.raises(NotApplicable, match="cannot be given to parameters"):
                    optimizer_coordinates(scene)


def halves(model, one, two, first=0.0, **other):
    return optim.Adam(
        [
            {"params": getattr(model, one).parameters(), "weight_decay": first},
            {"params": getattr(model, two).parameters(), **other},
        ]
    )


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"lr": 0.5}, {"lr": 1e-6}),
        ({"eps": 1e-3}, {"eps": 1e-12}),
        ({"betas": (0.9, 0.9995)}, {"betas": (0.9, 0.9)}),
        ({"weight_decay": 0.2}, {"weight_decay": 0.0, "first": 0.1}),
    ],
)
def test_groups_of_equal_shapes_in_another_order_are_told_by_any_hyperparameter(mine, theirs):
    """The task's first group holds b, the file's a; only their hyperparameters differ."""
    model = net()
    optimizer = halves(model, "a", "b", **mine)
    feed(optimizer, wild(), 2)
    held = held_by(optimizer, model, lambda m: halves(m, "b", "a", **theirs))
    assert "another order" in held.unmappable
    right = held_by(optimizer, model, lambda m: halves(m, "a", "b", **mine))
    assert right.unmappable is None


def test_a_schedule_does_not_hide_the_order_of_the_rates():
    model = net()
    optimizer = halves(model, "a", "b", lr=0.5)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 1e-9])
    feed(optimizer, wild(), 2)
    schedule.step()
    assert optimizer.param_groups[1]["lr"] < optimizer.param_groups[0]["lr"]
    assert held_by(optimizer, model, lambda m: halves(m, "a", "b", lr=0.5)).unmappable is None
    swapped = held_by(optimizer, model, lambda m: halves(m, "b", "a", lr=1e-6))
    assert "another order" in swapped.unmappable


def test_a_tied_and_a_frozen_parameter_do_not_disturb_the_others():
    model = net()
    model.b.weight = model.a.weight
    model.a.bias.requires_grad_(False)
    optimizer = MAKE["adam"](p for p in model.parameters() if p.requires_grad)
    feed(optimizer, wild(), 3)
    held = held_by(optimizer, model)
    names = ["a.weight", "b.bias"]
    built = optimizer_coordinates(scene_of(model, held, names=names))
    square = torch.cat(
        [optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in (model.a.weight, model.b.bias)]
    )
    close(m_of(built), 1 / ((square / (1 - 0.999**3)).sqrt() + 1e-8))
