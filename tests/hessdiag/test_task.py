"""A task says what is wrong with it, and what each batch's mean loss was taken over."""

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from hessdiag.errors import TaskError
from hessdiag.task import Task, as_loss, units

X = torch.arange(12.0).reshape(4, 3)


def loss(model, batch):
    return model(batch).pow(2).mean()


def make(**changes: Any) -> Task:
    return Task(**{"model": nn.Linear(3, 2), "data": [X], "loss": loss} | changes)


class Batch(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Record:
    name: str
    x: torch.Tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": nn.Linear}, "must be a torch.nn.Module, not a type; call it"),
        ({"model": nn.LazyLinear(3)}, "without a shape yet .weight, bias"),
        ({"model": nn.ReLU()}, "has no parameters"),
        ({"data": X}, r"data=\[batch\]"),
        ({"data": {"x": X}}, r"data=\[batch\]"),
        ({"data": (x for x in [X])}, "read only once"),
        ({"data": 3}, "iterable of batches"),
        ({"loss": nn.MSELoss}, r"make one: MSELoss\(\)"),
        ({"loss": nn.MSELoss(reduction="sum")}, 'needs reduction="mean"'),
        ({"loss": "mse"}, "function of model and batch"),
        ({"optimizer": torch.optim.Adam}, "lambda model: torch.optim.Adam"),
        ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters())}, "lambda model"),
        ({"batch_size": 32}, "a function of a batch"),
        ({"mode": "test"}, '"eval" or "train"'),
        ({"name": 3}, "must be a string"),
    ],
)
def test_a_wrong_field_is_named_with_its_remedy(changes, message):
    with pytest.raises(TaskError, match=message):
        make(**changes)


def test_a_loss_module_becomes_a_function_of_model_and_batch():
    model, target = nn.Linear(3, 2).double(), torch.tensor([0, 1, 1, 0])
    module = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    task = make(model=model, loss=module, data=[(X.double(), target)])
    value = as_loss(task)(model, (X.double(), target))
    want = nn.functional.cross_entropy(
        model(X.double()), target, weight=torch.tensor([1.0, 3.0], dtype=torch.float64)
    )
    assert value.dtype == torch.float64
    assert torch.equal(value, want)
    assert module.weight.dtype == torch.float32


@pytest.mark.parametrize("batch", [X, {"x": X}, (X, X, X)])
def test_a_loss_module_refuses_a_batch_that_is_no_pair(batch):
    with pytest.raises(TaskError, match=r"MSELoss.*pairs.*function of model and batch"):
        as_loss(make(loss=nn.MSELoss()))(nn.Linear(3, 2), batch)


@pytest.mark.parametrize(
    ("value", "message"),
    [(3.0, "not a float"), (X, "shape"), (torch.tensor(1), "real number")],
)
def test_a_loss_that_is_not_one_real_number_is_refused(value, message):
    with pytest.raises(TaskError, match=message):
        as_loss(make(loss=lambda m, b: value))(nn.Linear(3, 2), X)


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, X),
        [X],
        {"x": X, "y": X[:1]},
        UserDict(x=X),
        Batch(X, X),
        Record("r", X),
        {"a": [{"b": (torch.tensor(3.0), X)}]},
    ],
    ids=lambda b: type(b).__name__,
)
def test_rows_are_counted_in_every_kind_of_batch(batch):
    assert units(make())(batch) == 4


def test_a_batch_without_any_tensor_asks_for_batch_size():
    with pytest.raises(TaskError, match="batch_size="):
        units(make())({"x": "text"})
    assert units(make())(None) == 1


LABELS = torch.tensor([[0, 1, -100], [2, -100, -100]])


@pytest.mark.parametrize("module", [nn.CrossEntropyLoss, nn.NLLLoss])
@pytest.mark.parametrize("ignore", [-100, 1])
def test_class_losses_weigh_by_what_torch_divides_by(module, ignore):
    weight = torch.tensor([1.0, 2.0, 5.0])
    count = units(make(loss=module(ignore_index=ignore)))
    weighted = units(make(loss=module(ignore_index=ignore, weight=weight)))
    target = LABELS.flatten() if ignore == -100 else LABELS.flatten().clamp(min=0)
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    for counter, w in ((count, None), (weighted, weight)):
        mean, total = (
            nn.functional.nll_loss(logits, target, weight=w, ignore_index=ignore, reduction=r)
            for r in ("mean", "sum")
        )
        assert counter((X, target)) == pytest.approx(float(total / mean), rel=1e-6)


def test_class_probabilities_weigh_by_positions():
    probabilities = torch.full((2, 3, 5), 1 / 3)
    assert units(make(loss=nn.CrossEntropyLoss()))((X, probabilities)) == 10


@pytest.mark.parametrize(
    "batch",
    [(X, LABELS), {"x": X, "labels": LABELS}, UserDict(targets=LABELS, x=X), {"y": LABELS}],
)
def test_a_loss_function_weighs_by_targets_that_are_not_ignored(batch):
    assert units(make())(batch) == 3


def test_padding_in_one_batch_only_does_not_change_the_unit_of_the_others():
    """Four tokens in a full batch and two in a padded one: 2 to 1, not rows (2) to tokens (2)."""
    full, padded = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, -100], [1, -100]])
    count = units(make())
    assert count((X[:2], full)) == 2 * count((X[:2], padded))


def test_declared_sizes_come_first_and_must_be_finite():
    assert units(make(batch_size=lambda b: torch.tensor(7)))(X) == 7
    for wrong in (-1, float("nan"), float("inf"), "3", None, X):
        with pytest.raises(TaskError, match="finite number of at least 0"):
            units(make(batch_size=lambda b, wrong=wrong: wrong))(X)


def test_a_loss_without_a_value_is_refused():
    with pytest.raises(TaskError, match="loss is on the meta device"):
        as_loss(make(loss=lambda m, b: torch.tensor(1.0, device="meta")))(nn.Linear(3, 2), X)
