"""Small networks, the data they see, and their dense curvature by an independent route."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hessdiag.curvature.loan import bare, exact_arithmetic, loan
from hessdiag.curvature.objective import Objective
from hessdiag.data import load_batches
from hessdiag.names import named_parameters
from hessdiag.task import Task, as_loss, units

EPS = torch.finfo(torch.float64).eps
IGNORED = -100


@dataclass
class Case:
    """A task, and how much of the dataset mean each batch is, counted by hand."""

    model: nn.Module
    data: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    weights: list[float]
    mode: str = "eval"
    plain: nn.Module | None = None  # the same function without wrappers, for the oracle
    ggn: bool = True  # the loss is one of the model's outputs
    trainable: list[str] = field(default_factory=list)

    @property
    def task(self) -> Task:
        return Task(self.model, self.data, self.loss, mode=self.mode)


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp(activation=nn.Tanh):
    return nn.Sequential(
        nn.Linear(3, 4), activation(), nn.Linear(4, 3), activation(), nn.Linear(3, 2)
    )


def pairs(*shape, out=2, sizes=(5, 3)):
    return [(torch.randn(n, *shape), torch.randn(n, out)) for n in sizes]


def regression(model, data=None, **more):
    data = data or pairs(3)
    return Case(model, data, mse, [float(len(x)) for x, _ in data], **more)


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def convnet(norm):
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), norm, nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)
    )


def images(norm, mode="eval"):
    return regression(convnet(norm), pairs(1, 6, 6, sizes=(4, 6)), mode=mode)


def warm_batchnorm():
    norm = nn.BatchNorm2d(2)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


class TinyTransformer(nn.Module):
    """LayerNorm, attention, and an embedding that is also the readout."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.norm(x)
        return self.head(x + self.attention(y, y, y, need_weights=False)[0])


def token_loss(model, batch):
    return F.cross_entropy(
        model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED
    )


def token_case():
    data, counted = [], []
    for rows, ignored in ((3, 7), (2, 1)):
        tokens = torch.randint(0, 4, (rows, 4))  # token 4 never occurs
        labels = torch.randint(0, 5, (rows, 4))
        labels.flatten()[:ignored] = IGNORED
        data.append({"tokens": tokens, "labels": labels})
        counted.append(float(4 * rows - ignored))
    return Case(TinyTransformer(), data, token_loss, counted)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self, body, reentrant=False, on=True):
        super().__init__()
        self.body, self.head = body, nn.Linear(2, 2)
        self.reentrant, self.on = reentrant, on

    def forward(self, x):
        if self.on:
            return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))
        return self.head(self.body(x))


class Partial(nn.Module):
    """One frozen, one unused and one tied parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)

    def forward(self, x):
        return self.frozen(torch.tanh(self.second(torch.tanh(self.first(x)))))


def pinn_loss(model, points):
    points = points.clone().requires_grad_(True)
    value = model(points)
    (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    return (slope - value).square().mean()


def pinn_leaf_loss(model, points):
    value = model(points)
    (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    return (slope - value).square().mean()


def pinn(loss, requires_grad):
    data = [torch.rand(n, 1, requires_grad=requires_grad) for n in (5, 2)]
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    return Case(model, data, loss, [5.0, 2.0], ggn=False)


class Outputs(nn.Module):
    """Several outputs, in a dict with something that is no tensor."""

    def __init__(self):
        super().__init__()
        self.body, self.mean, self.scale = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return {"mean": self.mean(hidden), "rest": (self.scale(hidden), "text"), "n": 3}


def gaussian_loss(model, batch):
    output = model(batch[0])
    scale = output["rest"][0]
    return ((output["mean"] - batch[1]).square() * scale.exp() - scale).mean()


def old_spectral_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(nn.Linear(3, 4))


def compiled_inside(on):
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    return nn.Sequential(torch.compile(body, backend="eager") if on else body, nn.Linear(4, 2))


def twins(build):
    """Two copies of one network with the same weights."""
    first, second = build(True), build(False)
    named = dict(named_parameters(first))
    with torch.no_grad():
        for name, parameter in named_parameters(second):
            parameter.copy_(named[name])
    return {"model": first, "plain": second}


def with_twin(build):
    both = twins(build)
    return regression(both["model"], plain=both["plain"])


def wrapped(wrap):
    inner = mlp()
    return regression(wrap(inner), plain=inner)


BUILD: dict[str, Callable[[], Case]] = {
    "tanh": lambda: regression(mlp()),
    "relu": lambda: regression(mlp(nn.ReLU)),
    "batchnorm eval": lambda: images(warm_batchnorm()),
    "batchnorm train": lambda: images(nn.BatchNorm2d(2), mode="train"),
    "groupnorm": lambda: images(nn.GroupNorm(1, 2)),
    "instancenorm": lambda: images(nn.InstanceNorm2d(2, affine=True)),
    "tied transformer": token_case,
    "encoder layer": lambda: regression(
        nn.Sequential(
            nn.TransformerEncoderLayer(2, 1, 3, batch_first=True, dropout=0.1), nn.Flatten()
        ),
        pairs(3, 2, out=6),
    ),
    "lstm": lambda: regression(Recurrent(nn.LSTM), pairs(4, 2)),
    "gru": lambda: regression(Recurrent(nn.GRU), pairs(4, 2)),
    "checkpoint": lambda: with_twin(
        lambda on: Checkpointed(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), on=on)
    ),
    "partial": lambda: regression(Partial()),
    "pinn": lambda: pinn(pinn_loss, requires_grad=False),
    "pinn on leaves": lambda: pinn(pinn_leaf_loss, requires_grad=True),
    "outputs": lambda: Case(Outputs(), pairs(3), gaussian_loss, [5.0, 3.0]),
    "spectral norm": lambda: regression(
        nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)
        )
    ),
    "old spectral norm": lambda: regression(
        nn.Sequential(old_spectral_norm(), nn.Tanh(), nn.Linear(4, 2))
    ),
    "compiled": lambda: wrapped(lambda m: torch.compile(m, backend="eager")),
    "compiled inside": lambda: with_twin(compiled_inside),
    "data parallel": lambda: wrapped(nn.DataParallel),
    "linear loss": lambda: Case(
        nn.Linear(3, 2), pairs(3), lambda m, b: m(b[0]).mean(), [5.0, 3.0], ggn=False
    ),
}
CASES = list(BUILD)
GGN_CASES = [name for name in CASES if name not in ("pinn", "pinn on leaves", "linear loss")]


def make(name: str) -> Case:
    """The case of that name, the same numbers every time."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        case = BUILD[name]()
    model = bare(case.model)
    case.trainable = [n for n, p in named_parameters(model) if p.requires_grad]
    return case


@contextmanager
def lent(task: Task, dtype=torch.float64, **options) -> Iterator[tuple[Objective, dict]]:
    """The task as the pipeline sees it: the objective, and the trainable parameters by name."""
    model = bare(task.model)
    trainable = {n: p for n, p in named_parameters(model) if p.requires_grad}
    device = torch.device("cpu")
    with (
        loan([model], mode=task.mode, dtype=dtype, device=device),
        exact_arithmetic([model], dtype),
    ):
        batches = load_batches(task.data, units(task), dtype=dtype, device=device, **options)
        yield Objective(model, as_loss(task), batches), trainable


def _double(value):
    if isinstance(value, Tensor):
        wide = value.detach().double() if value.is_floating_point() else value
        return wide.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    return tuple(_double(item) for item in value) if isinstance(value, tuple) else value


class _Called(nn.Module):
    """The oracle's model with given parameters, called like any other."""

    def __init__(self, model, tensors):
        super().__init__()
        self.call = lambda *args: functional_call(model, tensors, args, tie_weights=True)

    def forward(self, *args):
        return self.call(*args)


@contextmanager
def _alone(case: Case) -> Iterator[tuple[nn.Module, list[Any], list[str]]]:
    model = (case.plain or case.model).double()
    model.train(case.mode == "train")
    with sdpa_kernel([SDPBackend.MATH]):
        yield model, [_double(batch) for batch in case.data], case.trainable


def dense_hessian(case: Case) -> Tensor:
    """By reverse over reverse, n times; changes the case's model to float64."""
    with _alone(case) as (model, data, names):
        given = dict(model.named_parameters())
        shapes = [given[name].shape for name in names]

        def dataset_loss(flat: Tensor) -> Tensor:
            pieces = flat.split([shape.numel() for shape in shapes])
            tensors = {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)}
            called = _Called(model, tensors)
            total = sum(
                w * case.loss(called, batch) for w, batch in zip(case.weights, data, strict=True)
            )
            return total / sum(case.weights)

        flat = torch.cat([given[name].detach().reshape(-1) for name in names])
        return torch.autograd.functional.hessian(dataset_loss, flat)


def dense_ggn(case: Case) -> Tensor:
    """``Σ w Jᵀ Λ J`` with the Jacobian of all outputs and the loss's Hessian in them."""
    with _alone(case) as (model, data, names):
        given = dict(model.named_parameters())
        shapes = [given[name].shape for name in names]
        flat = torch.cat([given[name].detach().reshape(-1) for name in names])
        total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
        for weight, batch in zip(case.weights, data, strict=True):
            total += weight * _ggn_of_batch(case, model, batch, names, shapes, flat)
        return total / sum(case.weights)


def _ggn_of_batch(case, model, batch, names, shapes, flat):
    structure: list[Any] = []

    def outputs(vector):
        pieces = vector.split([shape.numel() for shape in shapes])
        tensors = {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)}
        key = "tokens" if isinstance(batch, dict) else 0
        result = functional_call(model, tensors, (batch[key],), tie_weights=True)
        leaves, spec = torch.utils._pytree.tree_flatten(result)
        structure[:] = [leaves, spec]
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return torch.cat([leaf.reshape(-1) for leaf in found])

    jacobian = torch.autograd.functional.jacobian(outputs, flat)
    value = outputs(flat).detach()
    leaves, spec = structure

    def loss_of(vector):
        start, rebuilt = 0, []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                rebuilt.append(vector[start : start + leaf.numel()].view(leaf.shape))
                start += leaf.numel()
            else:
                rebuilt.append(leaf)
        result = torch.utils._pytree.tree_unflatten(rebuilt, spec)
        return case.loss(Calls(lambda *_: result), batch)

    curved = torch.autograd.functional.hessian(loss_of, value)
    return jacobian.T @ curved @ jacobian
