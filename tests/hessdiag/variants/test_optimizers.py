"""M is what torch's ``step()`` multiplied the gradient by, on every parameter."""

import copy

import pytest
import torch

from hessdiag.checkpoint import map_optimizer
from hessdiag.variants.moments import RULES
from hessdiag.variants.optimizers import named_optimizer, optimizer_coordinates
from hessdiag.variants.registry import MAKERS, OPTIMIZERS
from optimizer_scenes import (
    MAKE,
    close,
    feed,
    flat,
    held_by,
    m_of,
    net,
    scene_of,
    step_from_zero,
    update_of,
    wild,
)

optim = torch.optim
STATES = ["adam", "adamw", "amsgrad", "nadam", "radam", "adamax", "adagrad", "rmsprop"]


@pytest.mark.parametrize("steps", [1, 4, 5, 9])  # RAdam adapts from its sixth step on
@pytest.mark.parametrize("name", MAKE)
def test_m_is_what_the_last_step_used(name, steps):
    model = net()
    optimizer = MAKE[name](model.parameters())
    draw = wild()
    feed(optimizer, draw, steps)
    directions = step_from_zero(optimizer, draw)
    built = optimizer_coordinates(scene_of(model, held_by(optimizer, model)))
    if name.startswith("radam") and steps < 5:
        assert "does not adapt" in built.notes[0]
        assert torch.equal(m_of(built), torch.ones(24))
    rate = float(optimizer.param_groups[0]["lr"])
    close(-rate * m_of(built) * flat(model, directions), update_of(model))
    assert (built.source, built.zero_state) == ("state", 0)
    assert built.optimizer_class == type(optimizer).__name__


def test_momentum_of_rmsprop_stays_out_of_m():
    model = net()
    optimizer = optim.RMSprop(model.parameters(), momentum=0.9, centered=True, eps=1e-3)
    draw = wild()
    feed(optimizer, draw, 5)
    before = {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()}
    feed(optimizer, draw, 1)
    new = {p: optimizer.state[p]["momentum_buffer"] - 0.9 * before[p] for p in model.parameters()}
    m = m_of(optimizer_coordinates(scene_of(model, held_by(optimizer, model))))
    gradient = flat(model, {p: p.grad for p in new})
    torch.testing.assert_close(m * gradient, flat(model, new), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["adamw", "radam", "adagrad, decaying", "rmsprop", "adamax"])
def test_a_block_over_groups_has_each_groups_rate_and_hyperparameters(name):
    model = net()
    second = {"lr": 0.5, "eps": 1e-2}
    second |= {"alpha": 0.6} if name == "rmsprop" else {}
    second |= {"betas": (0.5, 0.6)} if "ad" in name and "grad" not in name else {}
    optimizer = MAKE[name](
        [
            {"params": list(model.a.named_parameters(prefix="a"))},
            {"params": list(model.b.named_parameters(prefix="b")), **second},
        ]
    )
    draw = wild()
    feed(optimizer, draw, 9)
    directions = step_from_zero(optimizer, draw, plain=name == "radam")
    held = held_by(optimizer, model)
    assert held.mapped_by == "names"
    built = optimizer_coordinates(scene_of(model, held))
    close(-m_of(built) * flat(model, directions), update_of(model))
    alone = optimizer_coordinates(scene_of(model, held, names=["b.weight", "b.bias"]))
    close(0.5 * m_of(alone), m_of(built)[12:])


def test_tensors_that_took_fewer_steps_keep_their_own_correction_and_rectification():
    model = net()
    draw = wild()

    def late(parameter, step):
        skipped = parameter is model.b.weight and step is not None and step < 12
        return None if skipped else draw(parameter)

    for make in (
        lambda p: optim.RAdam(p, lr=0.02),
        lambda p: optim.Adagrad(p, lr=0.02, lr_decay=0.3),
        lambda p: optim.Adam(p, lr=0.02),
    ):
        optimizer = make(model.parameters())
        feed(optimizer, late, 20)
        directions = step_from_zero(optimizer, late, plain=True)
        m = m_of(optimizer_coordinates(scene_of(model, held_by(optimizer, model))))
        close(-0.02 * m * flat(model, directions), update_of(model))


@pytest.mark.parametrize("as_what", [float, int, lambda step: torch.tensor(float(step))])
def test_steps_may_be_numbers_or_tensors(as_what):
    model = net()
    optimizer = MAKE["adam"](model.parameters())
    feed(optimizer, wild(), 4)
    raw = copy.deepcopy(optimizer.state_dict())
    wanted = m_of(optimizer_coordinates(scene_of(model, map_optimizer(raw, model))))
    for state in raw["state"].values():
        state["step"] = as_what(4)
    close(m_of(optimizer_coordinates(scene_of(model, map_optimizer(raw, model)))), wanted)


def test_a_state_in_single_precision_is_widened_before_its_root():
    model = net().float()
    optimizer = MAKE["adam"](model.parameters())
    feed(optimizer, wild(), 4)
    held = held_by(optimizer, model)
    built = optimizer_coordinates(scene_of(model, held))
    assert built.coordinates.scale.dtype == torch.float32
    model.double()
    m = m_of(optimizer_coordinates(scene_of(model, held)))
    square = flat(model, {p: optimizer.state[p]["exp_avg_sq"] for p in optimizer.state})
    close(m, 1 / ((square.double() / (1 - 0.999**4)).sqrt() + 1e-8))


@pytest.mark.parametrize(
    ("name", "decoupled"),
    [
        ("adam", False),
        ("adam, coupled decay", False),
        ("adamw", True),
        ("amsgrad, decoupled", True),
        ("radam", False),
        ("radam, decoupled", True),
        ("nadam", False),
        ("nadam, decoupled", True),
        ("rmsprop", False),
    ],
)
def test_weight_decay_is_decoupled_where_the_optimizer_decouples_it(name, decoupled):
    model = net()
    optimizer = MAKE[name](model.parameters())
    feed(optimizer, wild(), 2)
    held = held_by(optimizer, model)
    assert optimizer_coordinates(scene_of(model, held)).decoupled is decoupled


def test_one_group_of_adam_may_decouple_its_decay():
    model = net()
    optimizer = optim.Adam(
        [
            {"params": list(model.a.named_parameters(prefix="a"))},
            {"params": list(model.b.named_parameters(prefix="b")), "decoupled_weight_decay": True},
        ]
    )
    feed(optimizer, wild(), 2)
    held = held_by(optimizer, model)
    found = [
        optimizer_coordinates(scene_of(model, held, names=names)).decoupled
        for names in (["a.weight"], ["b.weight"], None)
    ]
    assert found == [False, True, False]


@pytest.mark.parametrize(("name", "decoupled"), [("amsgrad", False), ("amsgrad, decoupled", True)])
def test_amsgrad_decouples_as_its_groups_do(name, decoupled):
    model = net()
    optimizer = MAKE[name](model.parameters())
    feed(optimizer, wild(), 2)
    built = named_optimizer("amsgrad")(scene_of(model, held_by(optimizer, model)))
    assert (built.source, built.decoupled) == ("state", decoupled)


def test_adam_that_was_told_to_decouple_is_adamw():
    model = net()

    def make(m):
        return optim.Adam(m.parameters(), decoupled_weight_decay=True)

    optimizer = make(model)
    feed(optimizer, wild(), 2)
    built = optimizer_coordinates(scene_of(model, held_by(optimizer, model, make)))
    assert built.decoupled is True
    assert built.optimizer_class == "AdamW"
    other = held_by(optimizer, model, lambda m: optim.Adam(m.parameters()))
    assert other.unmappable == "the task's optimizer is Adam and the state that of AdamW"


@pytest.mark.parametrize("name", STATES)
def test_a_name_takes_the_state_of_its_own_class(name):
    model = net()
    optimizer = MAKE[name](model.parameters())
    feed(optimizer, wild(), 9)
    held = held_by(optimizer, model)
    named = named_optimizer(name)(scene_of(model, held))
    assert named.source == "state"
    assert torch.equal(m_of(named), m_of(optimizer_coordinates(scene_of(model, held))))


def test_adam_and_adamw_share_their_second_moments():
    model = net()
    optimizer = MAKE["amsgrad"](model.parameters())
    feed(optimizer, wild(), 9)
    held = held_by(optimizer, model)
    adam, adamw = (named_optimizer(n)(scene_of(model, held)) for n in ("adam", "adamw"))
    assert (adam.source, adam.decoupled, adam.optimizer_class) == ("state", False, "Adam")
    assert (adamw.source, adamw.decoupled, adamw.optimizer_class) == ("state", True, "AdamW")
    square = flat(model, {p: optimizer.state[p]["exp_avg_sq"] for p in model.parameters()})
    for built in (adam, adamw):
        close(m_of(built), 1 / ((square / (1 - 0.5**9)).sqrt() + 1e-8))


def test_adam_of_an_old_release_needs_no_class():
    model = net()
    optimizer = MAKE["adam"](model.parameters())
    feed(optimizer, wild(), 3)
    wanted = m_of(optimizer_coordinates(scene_of(model, held_by(optimizer, model))))
    raw = copy.deepcopy(optimizer.state_dict())
    del raw["param_groups"][0]["decoupled_weight_decay"]
    held = map_optimizer(raw, model)
    assert held.class_name is None
    built = optimizer_coordinates(scene_of(model, held))
    assert torch.equal(m_of(built), wanted)
    assert (built.optimizer_class, built.decoupled) == ("Adam or AdamW", None)
    assert named_optimizer("adamw")(scene_of(model, held)).source == "state"


@pytest.mark.parametrize(
    ("name", "largest"),
    [("adam", 1e8), ("nadam", 1e3), ("adamax", 1e3), ("adagrad", 1e3), ("rmsprop", 1e3)],
)
def test_a_second_moment_of_zero_is_counted_and_noted_unless_its_row_is_dead(name, largest):
    model = net()
    optimizer = MAKE[name](model.parameters())
    draw = wild()

    def holes(parameter, step):
        gradient = draw(parameter, step)
        if parameter is model.b.bias:
            gradient[1] = 0
        return gradient

    feed(optimizer, holes, 4)
    held = held_by(optimizer, model)
    place = 12 + 9 + 1
    live = optimizer_coordinates(scene_of(model, held))
    assert live.zero_state == 1
    assert "second moment 0, so that eps alone sets M: 1 live" in " ".join(live.notes)
    close(m_of(live)[place], torch.tensor(largest, dtype=torch.float64))
    dead = optimizer_coordinates(scene_of(model, held, dead=[place]))
    assert (dead.zero_state, dead.notes) == (1, ())
    assert m_of(dead)[place] == 1
    others = torch.arange(24) != place
    assert torch.equal(m_of(dead)[others], m_of(live)[others])


def test_adamaxs_zero_state_is_found_through_the_rounding_of_its_eps():
    model = net().float()
    optimizer = MAKE["adamax"](model.parameters())
    feed(optimizer, lambda p, _: torch.zeros_like(p), 4)
    built = optimizer_coordinates(scene_of(model, held_by(optimizer, model)))
    assert built.zero_state == 24


def test_radams_zero_state_has_its_own_eps():
    model = net()
    optimizer = MAKE["radam"](model.parameters())
    feed(optimizer, lambda p, _: torch.zeros_like(p), 9)
    m = m_of(optimizer_coordinates(scene_of(model, held_by(optimizer, model))))
    close(m, torch.full_like(m, (1 - 0.999**9) ** 0.5 / 1e-3))


def test_there_is_a_maker_for_every_optimizer_of_the_grammar():
    assert set(RULES) == set(OPTIMIZERS) == set(STATES)
    assert MAKERS["optimizer"] is optimizer_coordinates
