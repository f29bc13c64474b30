"""Small tasks, their dense float64 Hessians, and what the specification says follows from them.

Shares no code with hessdiag: a copy of the model is differentiated twice, entry by entry, NumPy's
``eigh`` gives the spectrum, and the formulas of the contract are written out once more.
"""

import copy
import json
import math
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessdiag import Task

EPS = np.finfo(float).eps
HORIZONS = (1, 10, 100, 1000)


def dense(model, batches, loss, weights, mode="eval"):
    """Loss, gradient and Hessian of the weighted mean, and where each parameter's entries stand."""
    model = copy.deepcopy(model).double().train(mode == "train")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    size = sum(p.numel() for p in parameters)
    value, gradient, matrix = 0.0, torch.zeros(size).double(), torch.zeros(size, size).double()

    def flat(tensor, **kw):
        kw |= {"allow_unused": True, "materialize_grads": True}
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(tensor, parameters, **kw)])

    with sdpa_kernel([SDPBackend.MATH]):
        for batch, weight in zip(batches, np.asarray(weights) / sum(weights), strict=True):
            here = loss(model, widened(batch))
            for name, buffer in model.named_buffers():
                buffer.data.copy_(buffers[name])
            slope = flat(here, create_graph=True)
            value += weight * here.item()
            gradient += weight * slope.detach()
            for row in range(size if slope.requires_grad else 0):
                if slope[row].requires_grad:
                    matrix[row] += weight * flat(slope[row], retain_graph=True)
    ends = np.cumsum([p.numel() for p in parameters])
    index = {n: np.arange(e - p.numel(), e) for (n, p), e in zip(named.items(), ends, strict=True)}
    return value, gradient.numpy(), ((matrix + matrix.T) / 2).numpy(), index


def widened(batch):
    if isinstance(batch, torch.Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict | UserDict):
        return {key: widened(value) for key, value in batch.items()}
    if hasattr(batch, "_fields"):
        return type(batch)(*map(widened, batch))
    return type(batch)(map(widened, batch))


@dataclass
class Truth:
    """The block's matrix and what the specification says follows from it."""

    matrix: np.ndarray
    gradient: np.ndarray
    loss: float

    def __post_init__(self):
        self.values, self.vectors = np.linalg.eigh(self.matrix)
        self.n = self.values.size
        self.norm = np.abs(self.values).max()
        self.tau = 10 * max(self.n, 10) * EPS * self.norm
        self.positive = np.sort(self.values[self.values > self.tau])
        self.negative = self.values[self.values < -self.tau]
        self.slack = 10 * self.n * EPS * self.norm  # of an eigenvalue, here and there

    def scalars(self):
        """Name -> (truth, error of this oracle)."""
        values, n, norm, slack = self.values, self.n, self.norm, self.slack
        nonzero = np.abs(values)[np.abs(values) > self.tau]
        mass = np.abs(values).sum()
        out = {
            "lambda_max": (values[-1], slack),
            "lambda_min": (values[0], slack),
            "n_positive": (self.positive.size, 0),
            "n_negative": (self.negative.size, 0),
            "n_zero": (n - self.positive.size - self.negative.size, 0),
            "trace": (np.trace(self.matrix), n * slack),
            "frobenius": (np.linalg.norm(self.matrix), n * slack),
            "stable_rank": (np.linalg.norm(self.matrix) ** 2 / norm**2, n * slack / norm),
            "kappa_abs": ratio(norm, nonzero.min(), slack),
            "negative/count": (self.negative.size / n, EPS),
            "negative/mass": (-self.negative.sum() / mass, n * slack / norm),
            "negative/depth": (-self.negative.min(initial=0) / norm, n * slack / norm),
        }
        if self.positive.size:
            kappa, error = ratio(values[-1], self.positive[0], slack)
            out["kappa"] = (kappa, error)
            out["lambda_min_positive"] = (self.positive[0], slack)
            out["gd_rate"] = ((kappa - 1) / (kappa + 1), error / kappa**2 + EPS)
            decade = 0.0 if kappa == 1 else math.log(10) / (2 * math.atanh(1 / kappa))
            out["gd_iterations_per_decade"] = (decade, 1.2 * error + 1e-9 * decade)
            for q in ("0.5", "0.9"):
                k = math.ceil(float(q) * self.positive.size)
                out[f"kappa_quantile/{q}"] = ratio(values[-1], self.positive[::-1][k - 1], slack)
        for power in range(1, 12):
            threshold = 10.0**-power * norm
            if threshold < self.tau or np.abs(np.abs(values) - threshold).min() < 10 * slack:
                continue
            key = f"profile/1e-{power:02d}"
            out[f"{key}/n_positive"] = (np.sum(values > threshold), 0)
            out[f"{key}/n_negative"] = (np.sum(values < -threshold), 0)
            if (values > threshold).any():
                out[f"{key}/kappa"] = ratio(values[-1], values[values > threshold].min(), slack)
        return out

    def forecasts(self):
        """Horizon -> positive, null, negative parts by summing the steps of gradient descent."""
        energy = (self.vectors.T @ self.gradient) ** 2
        step, gain, done = 1 / self.norm, np.zeros(self.n), 0
        values = self.values
        inside = (values > self.tau, np.abs(values) <= self.tau, values < -self.tau)
        for horizon in HORIZONS:
            with np.errstate(over="ignore"):
                for t in range(done, horizon):
                    # What step t takes off, a (1 − a l / 2) (1 − a l)^{2t}: no division by l.
                    gain += step * (1 - step * values / 2) * (1 - step * values) ** (2 * t)
                parts = [float((energy[part] * gain[part]).sum()) for part in inside]
            done = horizon
            yield str(horizon), parts


def ratio(top, bottom, slack):
    return top / bottom, top / bottom * (slack / top + slack / bottom) + 1e-12


def tanh_net():
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


def relu_net():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def convnet():
    net = nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3)),
        *(nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)),
    )
    net.train()(torch.randn(23, 1, 6, 6))
    return net


class Tokens(nn.Module):
    """A causal transformer layer with LayerNorm, a root parameter and tied embeddings."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.position = nn.Parameter(0.3 * torch.randn(5, 4))
        self.before, self.after = nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.position
        q, k, v = self.qkv(self.before(x)).chunk(3, -1)
        return self.head(self.after(x + self.out(F.scaled_dot_product_attention(q, k, v))))


class Quadratic(nn.Module):
    """½ pᵀAp with prescribed eigenvalues."""

    def __init__(self, eigenvalues):
        super().__init__()
        values = torch.tensor(eigenvalues, dtype=torch.float64)
        q = torch.linalg.qr(torch.randn(values.numel(), values.numel(), dtype=torch.float64))[0]
        self.register_buffer("a", (q * values) @ q.T)
        self.p = nn.Parameter(torch.randn(values.numel(), dtype=torch.float64))

    def forward(self, _batch):
        return self.p @ self.a @ self.p / 2


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def squares(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def token_loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def physics(model, points):
    """A PINN's loss: u'' + sin z at the points and u(0), without targets."""
    z = points.clone().requires_grad_()
    slope = torch.autograd.grad(model(z).sum(), z, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), z, create_graph=True)[0]
    return ((bend + torch.sin(z)) ** 2).mean() + model(torch.zeros_like(z[:1])).square().mean()


def ragged(*tensors):
    """Batches of 9, 9 and the rest."""
    return list(zip(*(t.split(9) for t in tensors), strict=True))


def sentences():
    tokens, labels = torch.randint(0, 5, (8, 5)), torch.randint(0, 6, (8, 5))
    labels[0, 2:] = labels[4, 1:] = labels[7, :4] = -100
    return [(tokens[s], labels[s]) for s in (slice(3), slice(3, 6), slice(6, 8))]


@dataclass
class Case:
    """What a task is made of, and what each batch weighs, counted by hand."""

    model: nn.Module
    batches: list
    loss: Callable
    weights: list
    mode: str = "eval"

    def task(self, **changed):
        return Task(
            **{"model": self.model, "data": self.batches, "loss": self.loss} | changed,
            mode=self.mode,
        )

    def dense(self):
        return dense(self.model, self.batches, self.loss, self.weights, self.mode)


def case(name):
    torch.manual_seed(5)
    x, y, images = torch.randn(23, 5), torch.randint(0, 3, (23,)), torch.randn(23, 1, 6, 6)
    rows = [9, 9, 5]
    match name:
        case "mlp tanh":
            return Case(tanh_net(), ragged(x, y), entropy, rows)
        case "mlp relu":
            return Case(relu_net(), ragged(x, y), entropy, rows)
        case "convnet, BatchNorm eval":
            return Case(convnet(), ragged(images, y), entropy, rows)
        case "convnet, BatchNorm train":
            return Case(convnet(), ragged(images, y), entropy, rows, "train")
        case "transformer, tied, padded":
            batches = sentences()
            counted = [int((labels != -100).sum()) for _, labels in batches]
            return Case(Tokens(), batches, token_loss, counted)
        case "TransformerEncoderLayer":
            layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
            net = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))
            return Case(net, ragged(torch.randn(14, 3, 4), y[:14]), entropy, [9, 5])
        case "singular":
            x[:, 4] = x[:, 0] + x[:, 1]
            return Case(nn.Linear(5, 2), ragged(x, x[:, :2].sin()), squares, rows)
        case "PINN":
            net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
            return Case(net, list(torch.rand(14, 1).split(9)), physics, [9, 5])
        case "indefinite":
            return Case(Quadratic([3, 1, 0.5, 1e-3, -0.1, -2]), [x], lambda m, b: m(b), [1])
        case "indefinite, 1e12":
            spectrum = [10.0**-k for k in range(0, 13, 2)] + [-(10.0**-k) for k in range(1, 12, 3)]
            return Case(Quadratic(spectrum), [x], lambda m, b: m(b), [1])


CASES = (
    *("mlp tanh", "mlp relu", "convnet, BatchNorm eval", "convnet, BatchNorm train"),
    *("transformer, tied, padded", "TransformerEncoderLayer", "singular", "PINN"),
    *("indefinite", "indefinite, 1e12"),
)


def against(run, value, gradient, matrix, index):
    """By block that was analysed: its JSON, its arrays and the truth."""
    found = {}
    for block in json.loads(run.to_json())["blocks"]:
        if block["variants"]["raw"]["skipped"] is None:
            at = np.concatenate([index[name] for name in block["parameters"]])
            truth = Truth(matrix[np.ix_(at, at)], gradient[at], value)
            arrays = run[block["name"]].variants["raw"]
            found[block["name"]] = (block["variants"]["raw"], arrays, truth)
    return found


def entry(document, path):
    for key in path.split("/"):
        document = document[key]
    return document


def holds(quantity, truth, error):
    low, high = quantity["low"], quantity["high"]
    return (low is None or low - error <= truth) and (high is None or truth <= high + error)
