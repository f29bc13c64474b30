from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hessdiag.curvature.objective import flatten, moved, unflatten
from hessdiag.errors import InputError, TaskError

EPS = torch.finfo(torch.float64).eps


def value_and_gradient(task, networks):
    with networks.lent(task) as (objective, named):
        parameters = list(named.values())
        return objective.value(), objective.gradient(parameters)


def test_the_loss_is_the_mean_over_all_rows_of_ragged_batches(networks):
    case = networks.make("tanh")
    value, gradient = value_and_gradient(case.task, networks)
    model = case.model.double()
    x, y = (torch.cat(column).double() for column in zip(*case.data, strict=True))
    loss = F.mse_loss(model(x), y)
    loss.backward()
    exact = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert value == pytest.approx(loss.item(), rel=1e-14)
    assert float((gradient - exact).norm()) < 100 * EPS * float(exact.norm())


def test_the_loss_is_the_mean_over_all_counted_tokens(networks):
    case = networks.make("tied transformer")
    value, _ = value_and_gradient(case.task, networks)
    model = case.model.double()
    tokens, labels = (torch.cat([b[key] for b in case.data]) for key in ("tokens", "labels"))
    each = F.cross_entropy(
        model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    )
    assert value == pytest.approx((each.sum() / (labels != -100).sum()).item(), rel=1e-14)


def test_every_networks_gradient_is_that_of_its_value(case, networks):
    with networks.lent(case.task) as (objective, named):
        parameters = [named[name] for name in case.trainable]
        gradient = objective.gradient(parameters)
        v = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0)).double()
        step = 1e-5 * v
        with moved(parameters, step):
            ahead = objective.value()
        with moved(parameters, -step):
            behind = objective.value()
    found = (ahead - behind) / 2e-5
    assert found == pytest.approx(float(gradient @ v), abs=1e-6 * float(gradient.norm() * v.norm()))


def test_only_loss_modules_of_the_mean_kind_and_functions_reach_one_value(networks):
    case = networks.make("tanh")
    for loss in (nn.MSELoss(), networks.mse):
        value, _ = value_and_gradient(networks.Task(case.model, case.data, loss), networks)
        assert value == pytest.approx(value_and_gradient(case.task, networks)[0], rel=1e-15)


class Oops(Exception):
    pass


def raises(model, batch):
    raise Oops("the file is gone")


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (lambda m, b: m(b[0]), TaskError, "must return one real number.*shape \\(5, 2\\)"),
        (lambda m, b: None, TaskError, "must return a tensor with one number"),
        (lambda m, b: 1.0, TaskError, "must return a tensor with one number"),
        (lambda m, b: m(b[0]).sum().long(), TaskError, "one real number"),
        (raises, TaskError, "the task's loss raised Oops: the file is gone"),
        (lambda m: 0.0, TaskError, "(?s)positional argument.*called as loss\\(model, batch\\)"),
        (lambda m, b: b["x"], TaskError, "raised TypeError"),
        (lambda m, b: m(b[0]).sum() * torch.nan, InputError, "the loss of batch 0 is nan"),
        (lambda m, b: (m(b[0]) * 0).sum().log(), InputError, "the loss of batch 0 is -inf"),
    ],
)
def test_a_bad_loss_is_one_clear_error(networks, loss, kind, message):
    task = networks.Task(networks.mlp(), networks.pairs(3), loss)
    with networks.lent(task) as (objective, _), pytest.raises(kind, match=message):
        objective.value()


def test_tensors_that_did_not_follow_to_float64_are_explained(networks):
    weight = torch.ones(2, 3)
    task = networks.Task(networks.mlp(), networks.pairs(3), lambda m, b: (m(b[0]) @ weight).mean())
    with networks.lent(task) as (objective, _), pytest.raises(TaskError, match="--dtype float32"):
        objective.value()
    with networks.lent(task, torch.float32) as (objective, _):
        assert objective.value()


def test_an_interrupt_is_no_task_error(networks):
    def interrupted(model, batch):
        raise KeyboardInterrupt

    task = networks.Task(networks.mlp(), networks.pairs(3), interrupted)
    with networks.lent(task) as (objective, _), pytest.raises(KeyboardInterrupt):
        objective.value()


def test_a_batch_with_a_nan_is_named(networks):
    data = networks.pairs(3)
    data[1][0][0, 0] = torch.nan
    task = networks.Task(networks.mlp(), data, networks.mse)
    with (
        networks.lent(task) as (objective, _),
        pytest.raises(InputError, match="the loss of batch 1 is nan"),
    ):
        objective.value()


def test_flattening_and_back_is_the_identity():
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((2, 3), (), (4,))]
    vector = flatten(parameters)
    assert vector.shape == (11,)
    for piece, parameter in zip(unflatten(vector, parameters), parameters, strict=True):
        assert torch.equal(piece, parameter)


def test_moved_parameters_return_to_the_same_storage_after_an_error():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    pointers = [p.data_ptr() for p in parameters]
    inside = []
    with pytest.raises(Oops), moved(parameters, torch.arange(5.0)):
        inside.append(parameters[1].tolist()) or raises(None, None)
    assert inside == [[3.0, 4.0, 5.0]]
    assert [p.data_ptr() for p in parameters] == pointers
    assert all(torch.equal(p, torch.ones_like(p)) for p in parameters)
