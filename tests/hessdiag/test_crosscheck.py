"""PyHessian beside our certified numbers: each value, its cost and how far it is off."""

import copy
import sys

import pytest
import torch
from torch import nn

from hessdiag.agreement import Deviation, deviation_of
from hessdiag.crosscheck import CountedProducts, borrowed, crosscheck
from hessdiag.data import leaves
from hessdiag.errors import InputError, MissingExtra
from hessdiag.quantity import Quantity
from hessdiag.task import Task

METHODS = {
    "lambda_max": [
        *("PyHessian, eigenvalues()", "hessdiag, power iteration", "hessdiag, Lanczos"),
        "hessdiag, all eigenvalues",
    ],
    "trace": ["PyHessian, trace()", "hessdiag, Lanczos and probes", "hessdiag, all eigenvalues"],
}


class Parabola(nn.Module):
    """½ Σ lᵢ pᵢ² + 1, whose Hessian is diagonal."""

    def __init__(self, *eigenvalues):
        super().__init__()
        self.register_buffer("l", torch.tensor(eigenvalues, dtype=torch.float64))
        self.p = nn.Parameter(torch.ones(len(eigenvalues), dtype=torch.float64))

    def forward(self, _batch):
        return (self.l * self.p.square()).sum() / 2 + 1


def parabola(*eigenvalues):
    return Task(Parabola(*eigenvalues), [torch.zeros(2, 1)], lambda m, b: m(b))


def by_method(found, quantity):
    return {entry.method: entry for entry in found.entries if entry.quantity == quantity}


def pyhessian_product(objective, parameters):
    """PyHessian's product with a vector, over its loader."""
    from pyhessian import hessian

    with borrowed(objective, parameters, 0) as (model, data):
        subject = hessian(model, lambda loss, _: loss, dataloader=data, cuda=False)
        vectors = [torch.cos(torch.arange(p.numel()).to(p)).view(p.shape) for p in parameters]
        _, image = subject.dataloader_hv_product(vectors)
        flat = [torch.cat([part.reshape(-1) for part in parts]) for parts in (vectors, image)]
    held = [*parameters, *(leaf for batch in objective.batches.items for leaf in leaves(batch))]
    assert all(tensor.grad is None for tensor in held)
    return flat[0].detach(), flat[1].detach()


@pytest.mark.parametrize(
    "name", ["tanh", "batchnorm train", "encoder layer", "pinn", "pinn on leaves", "lstm"]
)
def test_pyhessian_is_given_the_task_s_own_loss_whatever_its_batches_are(name, networks):
    case = networks.make(name)
    with networks.lent(case.task) as (objective, trainable):
        vector, image = pyhessian_product(objective, list(trainable.values()))
    matrix = networks.dense_hessian(networks.make(name))
    assert torch.allclose(image, matrix @ vector, rtol=0, atol=1e-12 * float(matrix.norm()) * 10)


def test_pyhessian_weighs_padded_tokens_by_rows_and_that_is_its_error(networks):
    case, by_rows = networks.make("tied transformer"), networks.make("tied transformer")
    by_rows.weights = [3.0, 2.0]  # 5 and 7 of the targets are counted
    with networks.lent(case.task) as (objective, trainable):
        vector, image = pyhessian_product(objective, list(trainable.values()))
    found = crosscheck(case.task)
    wrong, right = (networks.dense_hessian(c) for c in (by_rows, case))
    assert torch.allclose(image, wrong @ vector, rtol=0, atol=1e-12 * float(wrong.norm()) * 10)
    exact = by_method(found, "trace")["hessdiag, all eigenvalues"].found
    assert exact.value == pytest.approx(float(right.trace()), rel=1e-10)
    share = abs(3 / 5 - 5 / 12)
    assert any(f"shares differ by up to {share:.2g}" in note for note in found.notes)


def test_every_value_is_measured_against_the_dense_hessian(networks):
    matrix = networks.dense_hessian(networks.make("tanh"))
    truth = {
        "lambda_max": float(torch.linalg.eigvalsh(matrix)[-1]),
        "trace": float(matrix.trace()),
    }
    found = crosscheck(networks.make("tanh").task)
    assert found.options.steps == 100  # as PyHessian's maxIter
    for quantity, methods in METHODS.items():
        entries = by_method(found, quantity)
        assert list(entries) == methods
        for entry in entries.values():
            off = abs(entry.found.value - truth[quantity]) / abs(truth[quantity])
            assert entry.deviation.relative == pytest.approx(off, rel=1e-6, abs=1e-12)
            assert entry.deviation.at_least <= entry.deviation.relative + 1e-12
        exact = entries["hessdiag, all eigenvalues"]
        assert exact.found.status == "exact"
        assert exact.products == matrix.shape[0]
        assert exact.found.value == pytest.approx(truth[quantity], rel=1e-11)
    entries = by_method(found, "lambda_max")
    assert entries["hessdiag, Lanczos"].found.low <= truth["lambda_max"] * (1 + 1e-12)
    assert entries["hessdiag, Lanczos"].found.high >= truth["lambda_max"]
    assert entries["hessdiag, power iteration"].found.high is None
    assert entries["PyHessian, eigenvalues()"].deviation.relative < 0.05


def test_above_the_exact_limit_the_intervals_are_the_reference(networks):
    found = crosscheck(networks.make("tanh").task, exact_limit=0, steps=7, probes=2)
    assert [e.method for e in found.entries if e.quantity == "trace"] == METHODS["trace"][:2]
    certified = by_method(found, "trace")["hessdiag, Lanczos and probes"]
    assert certified.products == 7 + 2
    assert certified.deviation == Deviation(0.0, 0.0)
    assert by_method(found, "lambda_max")["hessdiag, Lanczos"].products == 7
    assert by_method(found, "lambda_max")["hessdiag, power iteration"].products <= 7


def test_products_are_counted_and_a_diagonal_hessian_takes_pyhessian_two():
    found = crosscheck(parabola(2.0, 2.0, 2.0))
    for quantity, value in (("lambda_max", 2.0), ("trace", 6.0)):
        first = found.entries[0 if quantity == "lambda_max" else 4]
        assert first.products == 2
        assert first.found.value == pytest.approx(value, rel=1e-5)
    count = CountedProducts(lambda vector: vector)
    assert [count(1), count(2), count.count] == [1, 2, 2]


def test_the_eigenvalue_that_power_iteration_follows_is_named_where_it_is_not_the_top():
    found = crosscheck(parabola(1.0, -4.0, 0.5))
    assert any("largest size is λ_min = -4" in note for note in found.notes)
    entries = by_method(found, "lambda_max")
    assert entries["hessdiag, all eigenvalues"].found.value == pytest.approx(1.0)
    assert entries["PyHessian, eigenvalues()"].found.value == pytest.approx(-4, rel=0.01)
    assert entries["PyHessian, eigenvalues()"].deviation.at_least > 4.9
    assert not any("λ_min" in note for note in crosscheck(parabola(4.0, -1.0)).notes)


def test_the_weights_are_the_checkpoint_s(tmp_path):
    class Cubic(nn.Module):
        """Its Hessian is the diagonal matrix of its parameters."""

        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(2))

        def forward(self, _batch):
            return self.p.pow(3).sum() / 6

    torch.save({"p": torch.tensor([3.0, 1.0])}, tmp_path / "c.pt")
    task = Task(Cubic(), [torch.zeros(1, 1)], lambda model, batch: model(batch))
    found = crosscheck(task, tmp_path / "c.pt")
    assert by_method(found, "trace")["hessdiag, all eigenvalues"].found.value == pytest.approx(4)
    assert found.checkpoint == "c.pt"
    assert task.model.p.tolist() == [1.0, 1.0]


def test_where_pyhessian_raises_its_line_says_so_and_ours_stand(networks):
    reasons = {
        "linear loss": "RuntimeError: element 0 of tensors does not require grad",
        "partial": "AssertionError: Expected output to be a torch.Tensor",  # an unused parameter
    }
    for name, why in reasons.items():
        found = crosscheck(networks.make(name).task)
        for entry in found.entries:
            assert (entry.failure is not None) == entry.method.startswith("PyHessian")
            if entry.failure is not None:
                assert entry.failure.startswith(why)
                assert entry.deviation is None
                assert entry.found.value is None
    linear = crosscheck(networks.make("linear loss").task)
    assert {e.found.value for e in linear.entries if e.failure is None} == {0.0}


def test_gauss_newton_is_ours_alone(networks):
    found = crosscheck(networks.make("tanh").task, curvature="ggn")
    ggn = networks.dense_ggn(networks.make("tanh"))
    failures = [entry.failure for entry in found.entries if entry.failure]
    assert failures == ["it has no Gauss–Newton products"] * 2
    exact = by_method(found, "trace")["hessdiag, all eigenvalues"].found
    assert exact.value == pytest.approx(float(ggn.trace()), rel=1e-10)


@pytest.mark.parametrize("name", ["batchnorm train", "partial", "pinn on leaves"])
def test_the_model_and_the_random_states_are_bit_for_bit_what_they_were(name, networks):
    task = networks.make(name).task
    for index, parameter in enumerate(task.model.parameters()):
        parameter.grad = torch.full_like(parameter, float(index))
    task.model.train()
    before = copy.deepcopy(task.model.state_dict())
    grads = [p.grad.clone() for p in task.model.parameters()]
    wanted = [p.requires_grad for p in task.model.parameters()]
    random = torch.get_rng_state()
    crosscheck(task, exact_limit=0)
    after = task.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, task.model.parameters(), strict=True))
    assert [p.requires_grad for p in task.model.parameters()] == wanted
    assert all(module.training for module in task.model.modules())
    assert torch.equal(random, torch.get_rng_state())
    assert all(batch.grad is None for batch in task.data if isinstance(batch, torch.Tensor))


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(networks):
    values = [
        [
            e.found.value
            for e in crosscheck(networks.make("tanh").task, exact_limit=0, seed=s).entries
        ]
        for s in (1, 1, 2)
    ]
    assert values[0] == values[1]
    assert values[0][0] != values[2][0]  # of PyHessian, which draws from the global generator


def test_without_pyhessian_one_error_says_what_to_install(networks, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    with pytest.raises(MissingExtra, match=r"crosscheck compares with PyHessian.*pip install"):
        crosscheck(networks.make("tanh").task)


def test_a_network_of_frozen_parameters_has_nothing_to_check(networks):
    task = networks.make("tanh").task
    task.model.requires_grad_(False)
    with pytest.raises(InputError, match=r"no trainable parameter"):
        crosscheck(task)


@pytest.mark.parametrize(
    ("value", "low", "high", "at_least"),
    [
        (2.5, 2.0, 3.0, 0.0),
        (4.0, 2.0, 3.0, 1 / 3),
        (1.0, 2.0, 3.0, 1 / 2),
        (-1.0, 2.0, 3.0, 4 / 3),
        (4.0, -1.0, 2.0, 1.0),
        (1.0, 0.0, 0.0, None),
        (0.0, 0.0, 0.0, 0.0),
        (1.0, 2.0, None, None),
    ],
)
def test_the_certain_deviation_is_that_from_the_nearest_number_of_the_interval(
    value, low, high, at_least
):
    middle = low if high is None else (low + high) / 2
    found = deviation_of(Quantity.estimate(value), Quantity(middle, low, high, "interval", 1.0))
    assert found.at_least == (None if at_least is None else pytest.approx(at_least))
    assert found.relative == (abs(value - middle) / abs(middle) if middle else None)
