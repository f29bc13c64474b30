"""Blocks for the makers of M, and what torch's ``step()`` multiplies M by."""

from __future__ import annotations

import copy

import torch
from torch import nn

from hessdiag.blocks import Block
from hessdiag.checkpoint import map_optimizer
from hessdiag.curvature.objective import Objective
from hessdiag.data import Batches
from hessdiag.names import named_parameters
from hessdiag.options import Options
from hessdiag.variants.scene import Scene


class Net(nn.Module):
    """Two layers of one shape, so that no check of shapes can tell their tensors apart."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().double()


def square_loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def rows_loss(model, batch):
    """The mean over rows of a loss that is not quadratic in the residual."""
    return (model(batch[0]) - batch[1]).square().sum(dim=1).add(1).log().mean()


def objective_of(model, data, loss=rows_loss):
    rows = [len(batch[0]) for batch in data]
    shares = tuple(count / sum(rows) for count in rows)
    return Objective(model, loss, Batches(tuple(data), shares, sum(rows), ""))


def scene_of(
    model,
    held=None,
    *,
    names=None,
    dead=(),
    changed=False,
    objective=None,
    iterates=(),
    cache=None,
    **options,
):
    """A block of these parameters (all by default); ``dead`` lists places in it."""
    named = dict(named_parameters(model))
    chosen = tuple(names or named)
    size = sum(named[name].numel() for name in chosen)
    buried = torch.zeros(size, dtype=torch.bool)
    buried[list(dead)] = True
    return Scene(
        block=Block("whole" if names is None else chosen[0], chosen, size),
        named=named,
        objective=objective or objective_of(model, []),
        options=Options(**options),
        optimizer=held,
        changed=changed,
        product=lambda v: v,
        matrix=None,
        rows={},
        dead=buried,
        iterates=tuple(iterates),
        cache={} if cache is None else cache,
    )


def feed(optimizer, gradient_of, steps):
    """``steps`` steps with ``gradient_of(parameter, step)``; None leaves the parameter out."""
    for step in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = gradient_of(parameter, step)
        optimizer.step()


def wild(seed=1):
    """Gradients over eight decades, of one size for each number of the parameter."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {}

    def draw(parameter, _step=0):
        size = sizes.setdefault(
            id(parameter), 10 ** (8 * torch.rand(parameter.shape, generator=generator) - 4)
        )
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size
        return drawn.to(parameter.dtype)

    return draw


def held_by(optimizer, model, make=None):
    """The state as it comes out of a checkpoint."""
    return map_optimizer(copy.deepcopy(optimizer.state_dict()), model, make)


def step_from_zero(optimizer, gradient_of, *, plain=False):
    """One more step from p = 0, and by parameter what M was multiplied by in it.

    Afterwards each parameter is its update, without the rounding of a sum: ``-lr M direction``,
    RAdam's rectification and Adagrad's decay of the rate counted with the direction, or left to
    M if ``plain``.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.data = torch.zeros_like(parameter)
            parameter.grad = gradient_of(parameter, None)
    optimizer.step()
    return {
        parameter: _direction(type(optimizer).__name__, optimizer.state[parameter], group, plain)(
            parameter.grad
        )
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _direction(kind, state, group, plain):
    steps = float(state["step"])
    if kind == "Adagrad":
        return lambda g: g if plain else g / (1 + (steps - 1) * group["lr_decay"])
    if kind == "RMSprop":
        return lambda g: g
    beta, second = map(float, group["betas"])
    if kind == "NAdam":
        decay, product = group["momentum_decay"], float(state["mu_product"])
        now = beta * (1 - 0.5 * 0.96 ** (steps * decay))
        then = beta * (1 - 0.5 * 0.96 ** ((steps + 1) * decay))
        ahead = then / (1 - product * then) * state["exp_avg"]
        return lambda g: (1 - now) / (1 - product) * g + ahead
    momentum = state["exp_avg"] / (1 - beta**steps)
    if kind == "RAdam" and not plain:
        limit = 2 / (1 - second) - 1
        rho = limit - 2 * steps * second**steps / (1 - second**steps)
        if rho > 5:
            ratio = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
            momentum = momentum * ratio**0.5
    return lambda _: momentum


MAKE = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adam, one tensor at a time": lambda p: torch.optim.Adam(p, lr=0.02, foreach=False),
    "adam, foreach": lambda p: torch.optim.Adam(p, lr=0.02, foreach=True),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
    "adam, maximize": lambda p: torch.optim.Adam(p, lr=0.02, maximize=True),
    "adam, coupled decay": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.3),
    "adam, large eps": lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.5, 0.7), eps=1e-2),
    "adam, rate a tensor": lambda p: torch.optim.Adam(
        p, lr=torch.tensor(0.02, dtype=torch.float64), foreach=False
    ),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.9, 0.5), amsgrad=True),
    "amsgrad, decoupled": lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.9, 0.5), amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02, eps=1e-3),
    "nadam, decoupled": lambda p: torch.optim.NAdam(
        p, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.02, eps=1e-3),
    "radam, decoupled": lambda p: torch.optim.RAdam(
        p, lr=0.02, betas=(0.9, 0.9), weight_decay=0.1, decoupled_weight_decay=True
    ),
    "radam, foreach": lambda p: torch.optim.RAdam(p, lr=0.02, eps=1e-3, foreach=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02, eps=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, eps=1e-3),
    "adagrad, decaying": lambda p: torch.optim.Adagrad(
        p, lr=0.02, lr_decay=0.1, initial_accumulator_value=0.5
    ),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, eps=1e-3),
    "rmsprop, centred": lambda p: torch.optim.RMSprop(p, lr=0.02, centered=True, alpha=0.7),
}


def m_of(built):
    """The diagonal of M = P Pᵀ."""
    return built.coordinates.scale**2


def flat(model, values):
    """One vector of what each parameter has."""
    return torch.cat([values[p].reshape(-1) for p in model.parameters()])


def update_of(model):
    """After a step from zero."""
    return flat(model, {p: p.detach() for p in model.parameters()})


def close(found, wanted, rtol=1e-12):
    """Relative to each number, however small."""
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)
