from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hessdiag.curvature.engines import make_engine
from hessdiag.errors import TaskError

EPS = torch.finfo(torch.float64).eps
CASES = [
    "tanh", "relu", "batchnorm eval", "batchnorm train", "groupnorm", "instancenorm",
    "tied transformer", "encoder layer", "lstm", "gru", "checkpoint", "partial", "outputs",
    "spectral norm", "old spectral norm", "compiled", "compiled inside", "data parallel",
]  # fmt: skip


def assembled(objective, parameters, engine="kept"):
    product = make_engine(objective, parameters, curvature="ggn", engine=engine)
    n = sum(p.numel() for p in parameters)
    return torch.stack([product(row) for row in torch.eye(n, dtype=torch.float64)], dim=1)


def check_against_oracle(case, networks):
    with networks.lent(case.task) as (objective, named):
        found = assembled(objective, [named[name] for name in case.trainable])
    exact = networks.dense_ggn(case)
    assert float(exact.norm()) > 0
    assert float((found - exact).norm()) < 1e3 * len(exact) * EPS * float(exact.norm())


@pytest.mark.parametrize("name", CASES)
def test_every_column_is_that_of_the_dense_gauss_newton_matrix(name, networks):
    check_against_oracle(networks.make(name), networks)


def weight_norms(old):
    if old:
        with pytest.warns(FutureWarning, match="weight_norm"):
            return nn.utils.weight_norm(nn.Linear(3, 4))
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))


@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_goes_through_where_its_hessian_is_wrong(networks, old):
    torch.manual_seed(3)
    case = networks.regression(nn.Sequential(weight_norms(old), nn.Tanh(), nn.Linear(4, 2)))
    case.trainable = [name for name, _ in case.model.named_parameters()]
    check_against_oracle(case, networks)


@pytest.mark.parametrize("name", ["tanh", "outputs"])
def test_kept_and_recomputed_graphs_give_one_matrix(name, networks):
    with networks.lent(networks.make(name).task) as (objective, named):
        kept, again = (
            assembled(objective, list(named.values()), engine) for engine in ("kept", "recompute")
        )
    assert float((kept - again).norm()) <= 1e-14 * float(kept.norm())


def test_it_is_the_hessian_where_the_model_is_linear(networks):
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    task = networks.Task(nn.Linear(3, 3), [(x, y)], networks.cross_entropy)
    with networks.lent(task) as (objective, named):
        ggn = assembled(objective, list(named.values()))
        product = make_engine(objective, list(named.values()), curvature="hessian")
        hessian = torch.stack([product(row) for row in torch.eye(12, dtype=torch.float64)])
    assert float((ggn - hessian).norm()) < 1e-13 * float(hessian.norm())


def test_it_has_no_negative_eigenvalue_where_the_hessian_has(networks):
    with networks.lent(networks.make("tanh").task) as (objective, named):
        ggn = assembled(objective, list(named.values()))
    values = torch.linalg.eigvalsh(ggn)
    assert float(values[0]) > -100 * EPS * float(values[-1])


def zero(networks, model, loss, data=None):
    task = networks.Task(model, data or [(torch.randn(4, 3), torch.randn(4, 2))], loss)
    with networks.lent(task) as (objective, named):
        return assembled(objective, list(named.values()))


def test_a_loss_that_is_linear_in_the_outputs_gives_zero(networks):
    assert not zero(networks, networks.mlp(), lambda m, b: m(b[0]).mean()).any()


def test_inputs_that_require_gradients_do_no_harm(networks):
    data = [(torch.randn(4, 3, requires_grad=True), torch.randn(4, 2))]
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    model.forward = lambda x: model["used"](x)
    with networks.lent(networks.Task(model, data, networks.mse)) as (objective, named):
        used = assembled(objective, [named["used.weight"]])
        unused = assembled(objective, [named["unused.weight"]])
    assert used.any()
    assert not unused.any()


def penalty(model, batch):
    return networks_mse(model, batch) + 1e-3 * sum(p.square().sum() for p in model.parameters())


def networks_mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def feedback(model, batch):
    return F.mse_loss(model(torch.cat([model(batch[0]), batch[1][:, :1]], dim=1)), batch[1])


def slope(model, batch):
    x = batch[0].clone().requires_grad_(True)
    (by_input,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return by_input.square().mean()


class OwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, y):
        output = self.layer(x)
        return {"loss": F.mse_loss(output, y), "logits": output}


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (penalty, "uses parameters besides them"),
        (lambda m, b: F.mse_loss(m[-1](m[:-1](b[0])), b[1]), "never calls model"),
        (lambda m, b: F.mse_loss(m.forward(b[0]), b[1]), "never calls model"),
        (feedback, "feeds the model's output back"),
        (slope, "differentiates that output by the input"),
    ],
)
def test_a_loss_that_cannot_be_split_is_refused_with_the_reason(networks, loss, reason):
    with pytest.raises(TaskError, match=reason) as caught:
        zero(networks, networks.mlp(), loss)
    assert "--curvature hessian" in str(caught.value)


def test_a_model_that_returns_its_own_loss_is_refused(networks):
    with pytest.raises(TaskError, match="returns the loss itself"):
        zero(networks, OwnLoss(), lambda m, b: m(*b)["loss"])
    assert zero(networks, OwnLoss(), lambda m, b: F.mse_loss(m(*b)["logits"], b[1])).any()


def test_a_single_number_as_output_is_fine_when_the_loss_curves_it(networks):
    model = nn.Sequential(nn.Linear(3, 1), networks.Calls(torch.sum))
    assert zero(networks, model, lambda m, b: (m(b[0]) - 1).square()).any()


def test_the_users_model_has_no_hook_left(networks):
    model = networks.mlp()
    with pytest.raises(TaskError):
        zero(networks, model, penalty)
    assert not model._forward_hooks
