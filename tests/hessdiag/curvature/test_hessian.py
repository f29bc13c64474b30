from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hessdiag.curvature.engines import make_engine
from hessdiag.curvature.objective import only

EPS = torch.finfo(torch.float64).eps


def assembled(engine, n):
    return torch.stack([engine(row) for row in torch.eye(n, dtype=torch.float64)], dim=1)


def distance(found, exact):
    """Relative to the matrix; to the loss's scale of 1 where it is zero."""
    return float((found - exact).norm() / (exact.norm() or 1.0))


def test_every_column_of_every_network_is_that_of_the_dense_hessian(case, networks):
    with networks.lent(case.task) as (objective, named):
        parameters = [named[name] for name in case.trainable]
        engine = make_engine(objective, parameters, curvature="hessian", engine="kept")
        n = sum(p.numel() for p in parameters)
        found = assembled(engine, n)
    exact = networks.dense_hessian(case)
    assert exact.shape == (n, n)
    assert distance(found, exact) < 1e3 * n * EPS


def test_kept_and_recomputed_graphs_give_one_product(case, networks):
    with networks.lent(case.task) as (objective, named):
        parameters = [named[name] for name in case.trainable]
        kept, recomputed = (
            make_engine(objective, parameters, curvature="hessian", engine=name)
            for name in ("kept", "recompute")
        )
        n = sum(p.numel() for p in parameters)
        vector = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for _ in range(2):
            first, second = kept(vector), recomputed(vector)
            assert float((first - second).norm()) <= 1e-14 * float(first.norm())


@pytest.mark.parametrize("name", ["tanh", "tied transformer", "batchnorm eval", "partial", "lstm"])
def test_a_block_is_the_diagonal_block_of_the_whole(name, networks):
    case = networks.make(name)
    with networks.lent(case.task) as (objective, named):
        sizes = {key: named[key].numel() for key in case.trainable}
        parameters = list(named.values())
        whole = assembled(
            make_engine(objective, parameters, curvature="hessian"), sum(sizes.values())
        )
        start = 0
        for key, size in sizes.items():
            engine = make_engine(objective, [named[key]], curvature="hessian", engine="kept")
            inside = whole[start : start + size, start : start + size]
            start += size
            assert distance(assembled(engine, size), inside) < 1e3 * len(whole) * EPS


def test_a_tied_parameter_counts_once_with_its_full_second_derivative(networks):
    case = networks.make("tied transformer")
    assert case.trainable.count("embed.weight") == 1
    assert "head.weight" not in case.trainable


def test_an_unused_parameter_has_zero_rows(networks):
    case = networks.make("partial")
    with networks.lent(case.task) as (objective, named):
        parameters = [named["unused.weight"], named["first.weight"]]
        engine = make_engine(objective, parameters, curvature="hessian")
        product = engine(torch.ones(13, dtype=torch.float64))
        assert not product[:4].any()
        assert product[4:].all()
        alone = make_engine(objective, [named["unused.bias"]], curvature="hessian")
        assert not alone(torch.ones(2, dtype=torch.float64)).any()


@pytest.mark.parametrize("engine", ["kept", "recompute"])
def test_a_linear_loss_has_a_zero_hessian(networks, engine):
    case = networks.make("linear loss")
    with networks.lent(case.task) as (objective, named):
        product = make_engine(objective, list(named.values()), curvature="hessian", engine=engine)
        assert not product(torch.ones(8, dtype=torch.float64)).any()


class Touched(torch.autograd.Function):
    """The identity, which counts the times that a gradient passes."""

    count = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Touched.count += 1
        return gradient.clone()


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_product_of_the_last_layer_never_enters_the_first(networks, curvature):
    model = nn.Sequential(
        nn.Linear(3, 4), networks.Calls(Touched.apply), nn.Tanh(), nn.Linear(4, 2)
    )
    case = networks.regression(model)
    with networks.lent(case.task) as (objective, named):
        for name, passes in (("3.weight", False), ("0.weight", True)):
            Touched.count = 0
            engine = make_engine(objective, [named[name]], curvature=curvature, engine="recompute")
            engine(torch.ones(named[name].numel(), dtype=torch.float64))
            assert bool(Touched.count) == passes


def test_padded_tokens_and_ragged_batches_give_the_numbers_of_one_batch(networks):
    case = networks.make("tied transformer")
    joined = {key: torch.cat([batch[key] for batch in case.data]) for key in case.data[0]}
    products = []
    for data in (case.data, [joined]):
        task = networks.Case(case.model, data, case.loss, [], trainable=[]).task
        with networks.lent(task) as (objective, named):
            parameters = list(named.values())
            n = sum(p.numel() for p in parameters)
            engine = make_engine(objective, parameters, curvature="hessian")
            products.append(engine(torch.linspace(-1, 2, n, dtype=torch.float64)))
    assert distance(products[0], products[1]) < 1e-13


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_the_batch_size_changes_no_product(networks, size):
    case = networks.make("relu")
    products = []
    for chosen in (None, size):
        with networks.lent(case.task, batch_size=chosen) as (objective, named):
            assert chosen is None or len(objective.batches.items) == -(-8 // size)
            n = sum(p.numel() for p in named.values())
            engine = make_engine(objective, list(named.values()), curvature="hessian")
            products.append(engine(torch.linspace(-1, 2, n, dtype=torch.float64)))
    assert distance(products[1], products[0]) < 1e-13


def test_class_weights_weigh_the_batches_as_torch_does(networks):
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.1]))
    model = nn.Linear(4, 3)
    x, y = torch.randn(9, 4), torch.tensor([0, 1, 2, 2, 1, 0, 0, 2, 1])
    products = []
    for data in ([(x, y)], [(x[:4], y[:4]), (x[4:], y[4:])]):
        with networks.lent(networks.Task(model, data, loss)) as (objective, named):
            engine = make_engine(objective, list(named.values()), curvature="hessian")
            products.append(engine(torch.arange(15, dtype=torch.float64)))
    assert distance(products[1], products[0]) < 1e-13


def test_parameters_are_constants_outside_their_block(networks):
    case = networks.make("tanh")
    with networks.lent(case.task) as (_, named):
        with only([named["0.weight"]]):
            assert [n for n, p in named.items() if p.requires_grad] == ["0.weight"]
        assert not any(p.requires_grad for p in named.values())


def test_float32_products_agree_to_float32(networks):
    case = networks.make("tanh")
    with networks.lent(case.task, torch.float32) as (objective, named):
        engine = make_engine(objective, list(named.values()), curvature="hessian")
        n = sum(p.numel() for p in named.values())
        product = engine(torch.ones(n))
        assert product.dtype == torch.float32
    exact = networks.dense_hessian(case) @ torch.ones(n, dtype=torch.float64)
    assert float((product - exact).norm() / exact.norm()) < 1e-5


def test_the_loss_module_form_is_the_function_form(networks):
    case = networks.make("relu")
    products = []
    for loss in (nn.MSELoss(), lambda m, b: F.mse_loss(m(b[0]), b[1])):
        with networks.lent(networks.Task(case.model, case.data, loss)) as (objective, named):
            n = sum(p.numel() for p in named.values())
            engine = make_engine(objective, list(named.values()), curvature="hessian")
            products.append(engine(torch.ones(n, dtype=torch.float64)))
    assert torch.equal(*products)
