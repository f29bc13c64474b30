"""Replayed M is that of a torch optimizer which was given the same gradients."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import optimizer_scenes
from hessdiag.errors import TaskError
from hessdiag.variants.optimizers import named_optimizer
from hessdiag.variants.scene import NotApplicable
from optimizer_scenes import (
    feed,
    held_by,
    m_of,
    net,
    objective_of,
    rows_loss,
    scene_of,
    square_loss,
    step_from_zero,
    wild,
)
from sample_networks import lent, make

optim = torch.optim

DEFAULT = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "amsgrad": lambda p: optim.Adam(p, amsgrad=True),
    "nadam": optim.NAdam,
    "radam": optim.RAdam,
    "adamax": optim.Adamax,
    "adagrad": optim.Adagrad,
    "rmsprop": optim.RMSprop,
}


def data(*sizes, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(rows, 3, generator=generator, dtype=torch.float64) for _ in "xy")
        for rows in sizes
    ]


def lend(model):
    """As the pipeline does: gradients are off."""
    return model.requires_grad_(False)


def gradient_at(model, values, batches):
    """By autograd on a copy: the mean over all rows."""
    other = copy.deepcopy(model).requires_grad_(True)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(values.get(name, parameter))
    rows = sum(len(x) for x, _ in batches)
    loss = sum(len(batch[0]) / rows * rows_loss(other, batch) for batch in batches)
    names = [name for name, _ in other.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(other.parameters())), strict=True))


def m_by_steps(factory, model, gradients):
    """M of a real optimizer whose last step was from these gradients, by its update."""
    other = copy.deepcopy(model).requires_grad_(True)
    names = {parameter: name for name, parameter in other.named_parameters()}
    optimizer = factory(other.parameters())
    feed(optimizer, lambda p, step: gradients[step][names[p]].clone(), len(gradients) - 1)
    directions = step_from_zero(optimizer, lambda p, _: gradients[-1][names[p]].clone())
    rate = optimizer.param_groups[0]["lr"]
    return torch.cat([(-p.detach() / (rate * d)).reshape(-1) for p, d in directions.items()])


def close(found, wanted, rtol=1e-9):
    optimizer_scenes.close(found, wanted, rtol)


def points(model, count):
    generator = torch.Generator().manual_seed(8)
    return [
        {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}
        for _ in range(count)
    ]


def nan_like(batch):
    return tuple(torch.full_like(tensor, torch.nan) for tensor in batch)


def readers(values):
    return [lambda held=held: held for held in values]


@pytest.mark.parametrize("name", DEFAULT)
def test_m_along_iterates_is_the_optimizers_own_with_the_last_gradient_in_it(name):
    model, batches, trajectory = lend(net()), data(5, 2), points(net(), 9)
    truth = [gradient_at(model, values, batches) for values in trajectory]
    scene = scene_of(model, objective=objective_of(model, batches), iterates=readers(trajectory))
    built = named_optimizer(name)(scene)
    close(m_of(built), m_by_steps(DEFAULT[name], model, truth))
    assert built.source == "iterates"
    assert built.notes[0] == "M replayed from 9 gradients at the iterates"


@pytest.mark.parametrize("name", DEFAULT)
def test_without_iterates_each_minibatch_is_a_step_in_order(name):
    model, batches = lend(net()), data(4, 3, 5, 2, 6, 3, 1)
    truth = [gradient_at(model, {}, [batch]) for batch in batches]
    built = named_optimizer(name)(scene_of(model, objective=objective_of(model, batches)))
    close(m_of(built), m_by_steps(DEFAULT[name], model, truth))
    assert built.source == "minibatches"
    assert "7 gradients of the task's mini-batches" in built.notes[0]


@pytest.mark.parametrize(("rows", "slices"), [(48, 16), (20, 16), (178, 16), (5, 5), (1, 1)])
def test_a_single_batch_is_cut_into_at_most_sixteen_nearly_equal_slices(rows, slices):
    model, (batch,) = lend(net()), data(rows)
    ends = [rows * k // slices for k in range(slices + 1)]
    assert max(b - a for a, b in pairwise(ends)) - min(b - a for a, b in pairwise(ends)) <= 1
    pieces = [tuple(t[a:b] for t in batch) for a, b in pairwise(ends)]
    truth = [gradient_at(model, {}, [piece]) for piece in pieces]
    built = named_optimizer("adagrad")(scene_of(model, objective=objective_of(model, [batch])))
    close(m_of(built), m_by_steps(optim.Adagrad, model, truth))
    assert f"from {slices} gradient" in built.notes[0]
    assert ("tells little" in built.notes[0]) is (slices == 1)


def test_a_batch_that_is_no_stack_of_rows_is_used_whole():
    model, (batch,) = lend(net()), data(8)
    mixed = (*batch, torch.ones(()))
    objective = objective_of(model, [mixed])
    built = named_optimizer("rmsprop")(scene_of(model, objective=objective))
    close(m_of(built), m_by_steps(optim.RMSprop, model, [gradient_at(model, {}, [batch])]))
    assert "1 gradient of the one batch, all the data" in built.notes[0]


def test_a_slice_without_a_counted_target_is_left_out():
    model, (batch,) = lend(net()), data(16)
    batch[1][3] = 0

    def counted(model, batch):
        weight = batch[1].any(dim=1).double()
        return ((model(batch[0]) - batch[1]).square().mean(dim=1) * weight).sum() / weight.sum()

    objective = objective_of(model, [batch], counted)
    found = named_optimizer("adagrad")(scene_of(model, objective=objective))
    assert "15 gradients" in found.notes[0]
    assert bool(found.coordinates.scale.isfinite().all())


@pytest.mark.parametrize(
    ("norm", "training", "changed", "slices"),
    [
        (nn.BatchNorm1d(3), True, False, 8),
        (nn.BatchNorm1d(3), False, False, 16),
        (nn.BatchNorm1d(3, track_running_stats=False), False, False, 8),
        (nn.LayerNorm(3), True, False, 16),
        (nn.LayerNorm(3), True, True, 8),
    ],
)
def test_slices_of_a_network_that_may_normalise_over_the_batch_have_two_rows(
    norm, training, changed, slices
):
    model = lend(nn.Sequential(nn.Linear(3, 3), norm).double().train(training))
    objective = objective_of(model, data(16), square_loss)
    built = named_optimizer("adagrad")(scene_of(model, objective=objective, changed=changed))
    assert f"{slices} gradients" in built.notes[0]


def test_blocks_and_optimizers_share_one_pass():
    model = lend(net())
    calls = []

    def counted(model, batch):
        calls.append(batch)
        return rows_loss(model, batch)

    objective = objective_of(model, data(2, 3, 4), counted)
    cache = {}
    variants = ("raw", "adam", "bn+radam", "rmsprop", "adagrad", "optimizer")
    for names in (None, ["a.weight"], ["b.weight", "b.bias"]):
        for name in ("adam", "radam", "rmsprop", "adagrad"):
            scene = scene_of(
                model, names=names, objective=objective, cache=cache, variants=variants
            )
            built = named_optimizer(name)(scene)
            assert built.coordinates.size == scene.block.size
    assert len(calls) == 3
    named_optimizer("adamax")(scene_of(model, objective=objective, cache=cache))
    assert len(calls) == 6


def test_every_block_is_a_part_of_the_whole():
    model, batches = lend(net()), data(5, 2)
    objective = objective_of(model, batches)
    whole = m_of(named_optimizer("adam")(scene_of(model, objective=objective)))
    part = m_of(named_optimizer("adam")(scene_of(model, names=["b.bias"], objective=objective)))
    assert torch.equal(part, whole[-3:])


def test_the_model_is_left_as_it_was_also_after_an_error():
    model = lend(net())
    before = [(p.data_ptr(), p.detach().clone(), p._version) for p in model.parameters()]
    storages = points(model, 2)
    kept = copy.deepcopy(storages)

    def check():
        assert [(p.data_ptr(), p._version) for p in model.parameters()] == [
            (address, version) for address, _, version in before
        ]
        for parameter, (_, value, _) in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, value)
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())

    iterates = readers(storages)
    objective = objective_of(model, data(4))
    named_optimizer("adam")(scene_of(model, objective=objective, iterates=iterates))
    check()
    for held, copied in zip(storages, kept, strict=True):
        assert all(torch.equal(held[name], copied[name]) for name in held)

    def broken(model, batch):
        raise ValueError("no")

    with pytest.raises(TaskError):
        named_optimizer("adam")(
            scene_of(model, objective=objective_of(model, data(4), broken), iterates=iterates)
        )
    check()


def test_a_changed_network_takes_neither_the_iterates_nor_the_state():
    model = net()
    optimizer = optim.Adam(model.parameters())
    feed(optimizer, wild(), 3)
    held = held_by(optimizer, model)
    lend(model)
    options = {"objective": objective_of(model, data(2, 3)), "iterates": readers(points(model, 3))}
    assert named_optimizer("adam")(scene_of(model, held, **options)).source == "state"
    assert named_optimizer("adam")(scene_of(model, held, changed=True, **options)).source == (
        "minibatches"
    )
    assert named_optimizer("rmsprop")(scene_of(model, held, **options)).source == "iterates"
    assert named_optimizer("amsgrad")(scene_of(model, held, **options)).source == "iterates"


def test_the_checkpoints_hyperparameters_hold_for_its_own_class_and_no_other():
    model, batches = lend(net()), data(2, 3, 1)
    truth = [gradient_at(model, {}, [batch]) for batch in batches]
    optimizer = optim.AdamW(
        [
            {"params": list(model.a.named_parameters(prefix="a")), "lr": 0.5, "eps": 0.2},
            {"params": list(model.b.named_parameters(prefix="b")), "lr": 3.0, "betas": (0.5, 0.6)},
        ]
    )
    held = held_by(optimizer, model)  # it never stepped
    objective = objective_of(model, batches)

    def build(name):
        return m_of(named_optimizer(name)(scene_of(model, held, objective=objective)))

    eps = m_by_steps(lambda p: optim.Adam(p, eps=0.2), model, truth)[:12]
    betas = m_by_steps(lambda p: optim.Adam(p, betas=(0.5, 0.6)), model, truth)[12:]
    close(build("adam"), torch.cat([0.5 * eps, 3 * betas]))
    close(build("adamax"), m_by_steps(optim.Adamax, model, truth))


def test_a_parameter_outside_of_all_groups_has_the_default_ones():
    model, batches = lend(net()), data(2, 3, 1)
    truth = [gradient_at(model, {}, [batch]) for batch in batches]
    optimizer = optim.Adam(
        [
            {"params": list(model.a.named_parameters(prefix="a")), "lr": 0.5, "eps": 0.2},
            {"params": [("b.weight", model.b.weight)], "lr": 3.0},
        ]
    )
    held = held_by(optimizer, model)
    scene = scene_of(model, held, objective=objective_of(model, batches))
    default = m_by_steps(optim.Adam, model, truth)
    eps = m_by_steps(lambda p: optim.Adam(p, eps=0.2), model, truth)[:12]
    wanted = torch.cat([0.5 * eps, 3 * default[12:21], 1e-3 * default[21:]])
    close(m_of(named_optimizer("adam")(scene)), wanted)


def test_state_that_cannot_be_mapped_still_tells_the_hyperparameters_of_a_single_group():
    model, batches = lend(net()), data(2, 3, 1)
    truth = [gradient_at(model, {}, [batch]) for batch in batches]
    optimizer = optim.RMSprop([*model.parameters(), nn.Parameter(torch.ones(2))], alpha=0.5)
    held = held_by(optimizer, model)
    assert held.unmappable
    scene = scene_of(model, held, objective=objective_of(model, batches))
    wanted = m_by_steps(lambda p: optim.RMSprop(p, alpha=0.5), model, truth)
    close(m_of(named_optimizer("rmsprop")(scene)), wanted)


def test_damaged_hyperparameters_are_refused_before_any_gradient():
    model = lend(net())
    held = held_by(optim.Adam(model.parameters()), model)
    held.groups[0]["betas"] = None
    calls = []

    def counted(model, batch):
        calls.append(batch)
        return rows_loss(model, batch)

    objective = objective_of(model, data(3, 2), counted)
    alone = scene_of(model, held, objective=objective)
    with pytest.raises(NotApplicable, match="parameter group of Adam makes no sense"):
        named_optimizer("adam")(alone)
    assert calls == []
    both = scene_of(model, held, objective=objective, variants=("raw", "adam", "rmsprop"))
    assert named_optimizer("rmsprop")(both).source == "minibatches"
    with pytest.raises(NotApplicable, match="parameter group of Adam makes no sense"):
        named_optimizer("adam")(both)
    assert len(calls) == 2


def test_a_refusal_costs_one_pass_for_all_blocks():
    model = lend(net())
    batches = data(2, 3)
    batches[1][0][0, 0] = torch.nan
    calls = []

    def counted(model, batch):
        calls.append(batch)
        return rows_loss(model, batch)

    objective = objective_of(model, batches, counted)
    cache = {}
    for names in (["a.weight"], ["a.bias"], None):
        scene = scene_of(model, names=names, objective=objective, cache=cache)
        with pytest.raises(NotApplicable, match="the gradient of batch 1 is not finite"):
            named_optimizer("adam")(scene)
    assert len(calls) == 2


@pytest.mark.parametrize(("name", "coupled"), [("adam", True), ("adamw", False), ("rmsprop", True)])
def test_weight_decay_joins_the_gradient_where_it_is_coupled(name, coupled):
    model, trajectory = lend(net()), points(net(), 3)
    batches = data(4)
    truth = [gradient_at(model, values, batches) for values in trajectory]
    if coupled:
        truth = [
            {n: g + 0.7 * values[n] for n, g in gradient.items()}
            for gradient, values in zip(truth, trajectory, strict=True)
        ]
    scene = scene_of(
        model,
        objective=objective_of(model, batches),
        iterates=readers(trajectory),
        weight_decay=0.7,
    )
    close(m_of(named_optimizer(name)(scene)), m_by_steps(DEFAULT[name], model, truth))


def test_what_does_not_fit_is_refused_by_name():
    model = lend(net())
    good = points(model, 1)[0]
    objective = objective_of(model, data(3))
    for values, reason in (
        ({n: v for n, v in good.items() if n != "b.bias"}, r"iterate 1 does not hold b\.bias as"),
        ({**good, "a.bias": torch.ones(4)}, r"iterate 1 does not hold a\.bias as \(3,\)"),
        ({**good, "a.bias": torch.full((3,), torch.nan)}, "gradient at iterate 1 is not finite"),
    ):
        scene = scene_of(model, objective=objective, iterates=readers([good, values]))
        with pytest.raises(NotApplicable, match=reason):
            named_optimizer("adam")(scene)
    batches = data(2, 2)
    batches[1][0][0, 0] = torch.nan
    with pytest.raises(NotApplicable, match="gradient of batch 1 is not finite"):
        named_optimizer("adam")(scene_of(model, objective=objective_of(model, batches)))
    scene = scene_of(model, objective=objective_of(model, [nan_like(batches[0])]))
    with pytest.raises(NotApplicable, match="no slice of the only batch"):
        named_optimizer("adam")(scene)


def test_iterates_of_another_dtype_are_widened():
    model, trajectory = lend(net()), points(net(), 2)
    narrow = [{n: v.float() for n, v in values.items()} for values in trajectory]
    wide = [{n: v.double() for n, v in values.items()} for values in narrow]
    objective = objective_of(model, data(4))
    found = [
        m_of(named_optimizer("adam")(scene_of(model, objective=objective, iterates=readers(held))))
        for held in (narrow, wide)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "case", ["partial", "tied transformer", "batchnorm train", "pinn on leaves"]
)
def test_unusual_networks_are_replayed(case, dtype):
    with lent(make(case).task, dtype) as (objective, trainable):
        names = list(trainable)
        built = named_optimizer("adagrad")(
            scene_of(objective.model, names=names, objective=objective)
        )
        squares = sum(
            torch.cat([g.reshape(-1) for g in found.values()]).double() ** 2
            for found in per_batch(objective, names)
        )
        rounding = 1e-12 if dtype == torch.float64 else 1e-3
        close(m_of(built).double(), 1 / (squares.sqrt() + 1e-10), rounding)
        assert built.zero_state == int((squares == 0).sum())
        assert built.coordinates.scale.dtype == dtype


def per_batch(objective, names):
    """Gradients of each batch's mean by plain autograd."""
    named = dict(objective.model.named_parameters())
    chosen = [named[name] for name in names]
    found = []
    for batch in objective.batches.items:
        for parameter in chosen:
            parameter.requires_grad_(True)
        loss = objective.loss(objective.model, batch)
        parts = torch.autograd.grad(loss, chosen, allow_unused=True, materialize_grads=True)
        found.append(dict(zip(names, parts, strict=True)))
        for parameter in chosen:
            parameter.requires_grad_(False)
    return found


def test_radam_says_where_too_few_gradients_leave_it_at_the_identity():
    model = lend(net())
    built = named_optimizer("radam")(scene_of(model, objective=objective_of(model, data(2, 3))))
    assert torch.equal(m_of(built), torch.ones(24))
    assert "does not adapt" in built.notes[1]
