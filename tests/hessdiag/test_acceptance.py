"""Every number of the JSON document against dense float64 matrices that share no code with hessdiag.

The oracle differentiates a copy of the model twice, entry by entry, and takes NumPy's ``eigh``;
the truths below are the formulas of the specification, written out once more.
"""

import copy
import json
import math
from collections import UserDict, namedtuple
from dataclasses import dataclass
from decimal import Decimal, getcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessdiag import Task, analyze

EPS = np.finfo(float).eps
HORIZONS = (1, 10, 100, 1000)
Pair = namedtuple("Pair", "input_ids labels")


# --- the oracle ---------------------------------------------------------------------------------


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
        self.l, self.u = np.linalg.eigh(self.matrix)
        self.n = self.l.size
        self.norm = np.abs(self.l).max()
        self.tau = 10 * max(self.n, 10) * EPS * self.norm
        self.positive = np.sort(self.l[self.l > self.tau])
        self.negative = self.l[self.l < -self.tau]
        self.slack = 10 * self.n * EPS * self.norm  # of an eigenvalue, here and there

    def scalars(self):
        """Name -> (truth, error of this oracle)."""
        l, n, norm, slack = self.l, self.n, self.norm, self.slack
        nonzero = np.abs(l)[np.abs(l) > self.tau]
        mass = np.abs(l).sum()
        out = {
            "lambda_max": (l[-1], slack),
            "lambda_min": (l[0], slack),
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
            kappa, error = ratio(l[-1], self.positive[0], slack)
            out["kappa"] = (kappa, error)
            out["lambda_min_positive"] = (self.positive[0], slack)
            out["gd_rate"] = ((kappa - 1) / (kappa + 1), error / kappa**2 + EPS)
            decade = 0.0 if kappa == 1 else math.log(10) / (2 * math.atanh(1 / kappa))
            out["gd_iterations_per_decade"] = (decade, 1.2 * error + 1e-9 * decade)
            for q in ("0.5", "0.9"):
                k = math.ceil(float(q) * self.positive.size)
                out[f"kappa_quantile/{q}"] = ratio(l[-1], self.positive[::-1][k - 1], slack)
        for power in range(1, 12):
            threshold = 10.0**-power * norm
            if threshold < self.tau or np.abs(np.abs(l) - threshold).min() < 10 * slack:
                continue
            key = f"profile/1e-{power:02d}"
            out[f"{key}/n_positive"] = (np.sum(l > threshold), 0)
            out[f"{key}/n_negative"] = (np.sum(l < -threshold), 0)
            if (l > threshold).any():
                out[f"{key}/kappa"] = ratio(l[-1], l[l > threshold].min(), slack)
        return out

    def forecasts(self):
        """Horizon -> positive, null, negative parts by summing the steps of gradient descent."""
        energy = (self.u.T @ self.gradient) ** 2
        step, gain, done = 1 / self.norm, np.zeros(self.n), 0
        for horizon in HORIZONS:
            for t in range(done, horizon):
                # c² (1 − a l / 2) a (1 − a l)^{2t}: what step t takes off, without a division by l.
                gain += step * (1 - step * self.l / 2) * (1 - step * self.l) ** (2 * t)
            done = horizon
            inside = (self.l > self.tau, np.abs(self.l) <= self.tau, self.l < -self.tau)
            yield str(horizon), [float((energy * gain)[part].sum()) for part in inside]


def ratio(top, bottom, slack):
    return top / bottom, top / bottom * (slack / top + slack / bottom) + 1e-12


# --- the networks -------------------------------------------------------------------------------


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
        l = torch.tensor(eigenvalues, dtype=torch.float64)
        q = torch.linalg.qr(torch.randn(l.numel(), l.numel(), dtype=torch.float64))[0]
        self.register_buffer("a", (q * l) @ q.T)
        self.p = nn.Parameter(torch.randn(l.numel(), dtype=torch.float64))

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


def case(name):
    """Model, batches, loss, what each batch weighs, mode."""
    torch.manual_seed(5)
    x, y, images = torch.randn(23, 5), torch.randint(0, 3, (23,)), torch.randn(23, 1, 6, 6)
    rows = [9, 9, 5]
    match name:
        case "mlp tanh":
            return tanh_net(), ragged(x, y), entropy, rows, "eval"
        case "mlp relu":
            return relu_net(), ragged(x, y), entropy, rows, "eval"
        case "convnet, BatchNorm eval":
            return convnet(), ragged(images, y), entropy, rows, "eval"
        case "convnet, BatchNorm train":
            return convnet(), ragged(images, y), entropy, rows, "train"
        case "transformer, tied, padded":
            batches = sentences()
            counted = [int((labels != -100).sum()) for _, labels in batches]
            return Tokens(), batches, token_loss, counted, "eval"
        case "TransformerEncoderLayer":
            layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
            net = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))
            return net, ragged(torch.randn(14, 3, 4), y[:14]), entropy, [9, 5], "eval"
        case "singular":
            x[:, 4] = x[:, 0] + x[:, 1]
            return nn.Linear(5, 2), ragged(x, x[:, :2].sin()), squares, rows, "eval"
        case "PINN":
            net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
            return net, list(torch.rand(14, 1).split(9)), physics, [9, 5], "eval"
        case "indefinite":
            return Quadratic([3, 1, 0.5, 1e-3, -0.1, -2]), [x], lambda m, b: m(b), [1], "eval"
        case "indefinite, 1e12":
            spectrum = [10.0**-k for k in range(0, 13, 2)] + [-(10.0**-k) for k in range(1, 12, 3)]
            return Quadratic(spectrum), [x], lambda m, b: m(b), [1], "eval"


CASES = (
    *("mlp tanh", "mlp relu", "convnet, BatchNorm eval", "convnet, BatchNorm train"),
    *("transformer, tied, padded", "TransformerEncoderLayer", "singular", "PINN"),
    *("indefinite", "indefinite, 1e12"),
)


@cache
def analysed(name) -> tuple[Any, dict[str, tuple[dict, Any, Truth]]]:
    """The run, and (JSON, stored arrays, truth) of each block that was analysed."""
    model, batches, loss, weights, mode = case(name)
    run = analyze(Task(model, batches, loss, mode=mode))
    return run, against(run, *dense(model, batches, loss, weights, mode))


def against(run, value, gradient, matrix, index):
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


# --- what must be shown -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_eigenvalues_lie_within_1e_9_of_the_norm(name):
    for _, arrays, truth in analysed(name)[1].values():
        distance = np.abs(arrays.spectrum["eigenvalue"] - truth.l).max()
        assert distance <= 1e-9 * truth.norm


@pytest.mark.parametrize("name", CASES)
def test_counts_add_up_and_are_exact_where_they_are_not_ambiguous(name):
    unambiguous = 0
    for found, _, truth in analysed(name)[1].values():
        counts = [found[key]["value"] for key in ("n_positive", "n_negative", "n_zero")]
        assert sum(counts) == found["size"] == truth.n
        if not found["ambiguous"]:
            unambiguous += 1
            assert counts[:2] == [truth.positive.size, truth.negative.size]
    assert unambiguous


@pytest.mark.parametrize("name", CASES)
def test_the_truth_is_inside_every_interval_and_the_value_is_it(name):
    for block, (found, _, truth) in analysed(name)[1].items():
        if found["ambiguous"]:
            assert found["kappa"]["status"] == "lower-bound"
            continue
        assert found["kappa"]["status"] == ("exact" if truth.positive.size else None)
        for path, (right, error) in truth.scalars().items():
            quantity = entry(found, path)
            assert quantity["status"] == "exact", (block, path)
            assert quantity["confidence"] == 1.0
            assert quantity["low"] <= quantity["value"] <= quantity["high"]
            assert holds(quantity, right, error), (block, path, quantity, right)
            width = quantity["high"] - quantity["low"]
            assert abs(quantity["value"] - right) <= error + width, (block, path)


@pytest.mark.parametrize("name", CASES)
def test_the_forecast_is_what_the_steps_of_gradient_descent_take_off(name):
    for block, (found, _, truth) in analysed(name)[1].items():
        for horizon, (positive, null, negative) in truth.forecasts():
            told = found["forecast"][horizon]
            total = positive + null + negative
            error = 1e-7 * abs(positive) + 1e-12 * abs(truth.loss)
            assert holds(told["positive"], positive, error), (block, horizon)
            assert abs(told["positive"]["value"] - positive) <= error + 1e-5 * positive
            if math.isfinite(negative):
                assert holds(told["negative"], negative, error + 1e-6 * abs(negative))
            unfit = (truth.loss > 0 and total > truth.loss) or negative > 0.1 * total
            if unfit or not math.isfinite(total):
                assert told["total"]["status"] == "unresolved"
            else:
                assert holds(told["total"], total, error + 1e-6 * abs(negative)), (block, horizon)


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_rows_and_diagonal_are_those_of_the_whole_data(name):
    for found, arrays, truth in analysed(name)[1].values():
        assert found["loss"] == pytest.approx(truth.loss, rel=1e-12)
        assert found["gradient_norm"] == pytest.approx(np.linalg.norm(truth.gradient), rel=1e-9)
        error, rows = 1e-12 * truth.norm, arrays.rows
        for stored, right in (
            ("norm", np.linalg.norm(truth.matrix, axis=1)),
            ("diagonal", np.diag(truth.matrix)),
        ):
            assert np.abs(rows[stored] - right).max() <= error
            assert (rows[f"{stored}_low"] <= right + error).all()
            assert (rows[f"{stored}_high"] >= right - error).all()


def test_inactive_parameters_are_the_zero_rows_also_where_rounding_hides_them():
    expected = {
        "convnet, BatchNorm train": {"0": 2, "3": 3, "whole": 5},  # biases before BatchNorm
        "transformer, tied, padded": {"qkv": 4, "whole": 4},  # key biases
        "mlp tanh": {},
    }
    for name, inactive in expected.items():
        told = {block: found["inactive"] for block, (found, _, _) in analysed(name)[1].items()}
        assert {block: count for block, count in told.items() if count} == inactive


def test_the_document_has_every_key_of_the_contract_and_no_number_that_json_cannot_hold():
    document = json.loads(analysed("mlp tanh")[0].to_json(), parse_constant=pytest.fail)
    assert {"format": "hessdiag-run", "version": "1.0.0", "curvature": "hessian"}.items() <= (
        document.items()
    )
    found = document["blocks"][0]["variants"]["raw"]
    assert list(found["forecast"]) == [str(t) for t in HORIZONS]
    assert list(found["profile"]) == [f"1e-{k:02d}" for k in range(1, 13)]
    assert list(found["kappa_quantile"]) == ["0.5", "0.9"]
    assert (found["kappa_damped"], found["half_ratio"], found["diagonal_gap"]) == (None,) * 3
    assert set(found["kappa"]) == {"value", "low", "high", "status", "confidence"}


def test_certified_positive_definite_blocks_are_exact_far_below_rounding():
    getcontext().prec = 60
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 2, generator=generator, dtype=torch.float64)
    x[:, 1] *= 1e-9
    run = analyze(Task(nn.Linear(2, 1, bias=False).double(), [(x, x[:, :1])], squares))
    columns = [[Decimal(v) for v in column] for column in x.T.tolist()]
    a, b, c = (
        sum(p * q for p, q in zip(columns[i], columns[j], strict=True)) * 2 / 23
        for i, j in ((0, 0), (0, 1), (1, 1))
    )
    top = (a + c + ((a - c) ** 2 + 4 * b * b).sqrt()) / 2
    kappa = float(top * top / (a * c - b * b))
    told = run["weight"].variants["raw"]["kappa"]
    assert kappa > 1e17
    assert told.status == "exact"
    assert told.value == pytest.approx(kappa, rel=1e-12)
    assert told.low <= kappa <= told.high


# --- other ways to the same matrix --------------------------------------------------------------


def assert_same_spectra(run, other):
    assert [block.name for block in run.blocks] == [block.name for block in other.blocks]
    for mine, yours in zip(run.blocks, other.blocks, strict=True):
        a = mine.variants["raw"].spectrum["eigenvalue"]
        b = yours.variants["raw"].spectrum["eigenvalue"]
        assert np.abs(a - b).max() <= 1e-10 * np.abs(b).max()


def test_a_compiled_model_and_a_checkpoint_saved_from_it_give_the_model_s_numbers(tmp_path):
    model, batches, loss, *_ = case("mlp tanh")
    reference = analysed("mlp tanh")[0]
    compiled = torch.compile(model)
    assert_same_spectra(analyze(Task(compiled, batches, nn.CrossEntropyLoss())), reference)
    torch.save(compiled.state_dict(), tmp_path / "compiled.pt")
    fresh = Task(tanh_net(), batches, loss)
    assert_same_spectra(analyze(fresh, checkpoint=tmp_path / "compiled.pt"), reference)


def test_a_float32_checkpoint_is_analysed_in_float64(tmp_path):
    model, batches, loss, *_ = case("mlp tanh")
    torch.save(model.float().state_dict(), tmp_path / "model.pt")
    run = analyze(Task(tanh_net().double(), batches, loss), checkpoint=tmp_path / "model.pt")
    assert_same_spectra(run, analysed("mlp tanh")[0])


@pytest.mark.parametrize("kind", ["dict", "UserDict", "NamedTuple", "--batch-size 2"])
def test_every_kind_of_batch_gives_the_same_numbers(kind):
    model, batches, _, *_ = case("transformer, tied, padded")
    pack = {
        "dict": lambda t, l: {"input_ids": t, "labels": l},
        "UserDict": lambda t, l: UserDict(input_ids=t, labels=l),
        "NamedTuple": Pair,
    }.get(kind, lambda t, l: (t, l))

    def loss(model, batch):
        keyed = isinstance(batch, dict | UserDict)
        return token_loss(model, (batch["input_ids"], batch["labels"]) if keyed else batch)

    options = {"batch_size": 2} if kind.startswith("--") else {}
    run = analyze(Task(model, [pack(*batch) for batch in batches], loss), **options)
    assert_same_spectra(run, analysed("transformer, tied, padded")[0])


def test_a_subset_of_digits_has_the_same_numbers_in_batches_of_96_as_in_one():
    from sklearn.datasets import load_digits

    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10))
    task = Task(model, [(images.float() / 16, labels)], nn.CrossEntropyLoss())
    many = analyze(task, max_examples=1000, batch_size=96, blocks="2")
    one = analyze(task, max_examples=1000, blocks="2")
    assert_same_spectra(many, one)
    for field in ("trace", "frobenius", "kappa", "lambda_max"):
        a, b = many["2"].variants["raw"][field], one["2"].variants["raw"][field]
        assert a.value == pytest.approx(b.value, rel=1e-10)
    ratio = many["2"].variants["raw"]["half_ratio"]
    assert ratio.value == pytest.approx(one["2"].variants["raw"]["half_ratio"].value, rel=1e-10)
    assert ratio.value > 0


@pytest.mark.parametrize("name", ["mlp relu", "transformer, tied, padded"])
def test_gauss_newton_is_the_mean_of_j_lambda_j(name):
    model, batches, loss, weights, _ = case(name)
    wide = copy.deepcopy(model).double()
    parameters = list(wide.parameters())
    matrix = 0.0
    for inputs, targets in batches:
        out = wide(widened(inputs))
        out = out.reshape(-1, out.shape[-1])[targets.reshape(-1) != -100]
        for row in out:
            jacobian = torch.stack(
                [
                    torch.cat([g.reshape(-1) for g in grads])
                    for z in row
                    for grads in [torch.autograd.grad(z, parameters, retain_graph=True)]
                ]
            )
            p = row.detach().softmax(0)
            matrix += jacobian.T @ (p.diag() - p.outer(p)) @ jacobian / sum(weights)
    value, gradient, _, index = dense(model, batches, loss, weights)
    run = analyze(Task(model, batches, loss), curvature="ggn")
    assert run.to_dict()["curvature"] == "ggn"
    for found, arrays, truth in against(run, value, gradient, matrix.numpy(), index).values():
        assert np.abs(arrays.spectrum["eigenvalue"] - truth.l).max() <= 1e-9 * truth.norm
        assert found["n_negative"]["value"] == 0


# --- odd models ---------------------------------------------------------------------------------


class Odd(nn.Module):
    """Unused, frozen, half-frozen, tied and root-owned parameters."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 4, bias=False)
        self.unused = nn.Linear(3, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(requires_grad=False)
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.second.weight
        self.last = nn.Linear(4, 3)
        self.last.bias.requires_grad_(requires_grad=False)

    def forward(self, x):
        x = torch.tanh(self.second(torch.tanh(self.first(x)) * self.scale))
        return self.last(torch.tanh(self.again(self.frozen(x))))


ROWS = {"scale": 4, "first": 24, "second": 16, "unused": 8, "last": 12, "whole": 64}


def odd_case():
    torch.manual_seed(2)
    x, y = torch.randn(23, 5), torch.randint(0, 3, (23,))
    return Odd(), ragged(x, y), entropy, [9, 9, 5]


def test_unused_frozen_and_tied_parameters_are_reported_and_the_rest_is_right():
    model, batches, loss, weights = odd_case()
    run = analyze(Task(model, batches, loss))
    reasons = {block.name: block.variants["raw"]["skipped"] for block in run.blocks}
    assert "frozen" in reasons.pop("frozen")
    assert "second.weight" in reasons.pop("again")
    assert set(reasons.values()) == {None}
    found = against(run, *dense(model, batches, loss, weights))
    assert {name: row["size"] for name, (row, _, _) in found.items()} == ROWS
    unused = found.pop("unused")[0]
    assert (unused["kappa"]["status"], unused["kappa"]["value"]) == ("zero", None)
    assert (unused["inactive"], unused["n_zero"]["value"]) == (8, 8)
    assert found["whole"][0]["inactive"] == 8
    for row, arrays, truth in found.values():
        assert np.abs(arrays.spectrum["eigenvalue"] - truth.l).max() <= 1e-9 * truth.norm
        assert row["n_positive"]["value"] == truth.positive.size


def test_weight_decay_moves_the_spectrum_rows_and_gradient_but_neither_loss_nor_inactive():
    model, batches, loss, weights = odd_case()
    decay = 0.03
    value, gradient, matrix, index = dense(model, batches, loss, weights)
    trained = [p.detach().double().flatten() for p in model.parameters() if p.requires_grad]
    gradient = gradient + decay * torch.cat(trained).numpy()
    run = analyze(Task(model, batches, loss), weight_decay=decay)
    found = against(run, value, gradient, matrix + decay * np.eye(len(matrix)), index)
    assert [row["inactive"] for row, _, _ in found.values()] == [0, 0, 0, 8, 0, 8]
    for row, arrays, truth in found.values():
        assert row["loss"] == pytest.approx(value, rel=1e-12)
        assert row["gradient_norm"] == pytest.approx(np.linalg.norm(truth.gradient), rel=1e-9)
        assert np.abs(arrays.spectrum["eigenvalue"] - truth.l).max() <= 1e-9 * truth.norm
        assert arrays.rows["norm"] == pytest.approx(np.linalg.norm(truth.matrix, axis=1), rel=1e-9)
        for horizon, (positive, *_) in truth.forecasts():
            told = row["forecast"][horizon]["positive"]
            assert holds(told, positive, 1e-7 * positive)


def test_damping_gives_the_absolute_damped_condition_number():
    model, batches, loss, weights, _ = case("mlp tanh")
    run = analyze(Task(model, batches, loss), damping=0.01)
    for row, _, truth in against(run, *dense(model, batches, loss, weights)).values():
        size = np.abs(truth.l)
        right = (size.max() + 0.01) / (size.min() + 0.01)
        assert row["kappa_damped"]["value"] == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"exact_limit": 0}, {"curvature": "ggn"}])
def test_a_linear_loss_has_a_zero_hessian_and_no_condition_number(options):
    batches = [(torch.randn(6, 5), torch.randn(6, 2))]
    task = Task(nn.Linear(5, 2), batches, lambda m, b: (m(b[0]) * b[1]).mean())
    for block in json.loads(analyze(task, **options).to_json())["blocks"]:
        row = block["variants"]["raw"]
        for field in ("kappa", "kappa_abs", "lambda_min_positive"):
            assert (row[field]["status"], row[field]["value"]) == ("zero", None)
        assert row["kappa_quantile"]["0.5"]["status"] == "zero"
        assert row["n_zero"]["value"] == row["size"] == row["inactive"]
        assert row["lambda_max"]["value"] == row["frobenius"]["value"] == 0


@pytest.mark.parametrize("steps", [3, 8, 40])
@pytest.mark.parametrize("name", ["mlp tanh", "indefinite, 1e12", "singular"])
def test_above_the_exact_limit_every_bound_holds_and_nothing_is_claimed_exact(name, steps):
    model, batches, loss, weights, _ = case(name)
    run = analyze(Task(model, batches, loss), exact_limit=0, steps=steps)
    for row, arrays, truth in against(run, *dense(model, batches, loss, weights)).values():
        assert row["method"] == "lanczos"
        assert row["products"] <= steps
        for path, (right, error) in truth.scalars().items():
            quantity = entry(row, path)
            assert quantity["status"] in {"lower-bound", "upper-bound", "interval", "unresolved"}
            assert holds(quantity, right, error), path
        ritz, bound = (arrays.spectrum[key] for key in ("ritz_value", "ritz_bound"))
        distance = np.abs(ritz[:, None] - truth.l[None]).min(axis=1)
        assert (distance <= bound + truth.slack).all()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_bit_for_bit_what_it_was_also_after_an_exception(fails):
    torch.manual_seed(0)
    x, y = torch.randn(12, 5), torch.randint(0, 3, (12,))
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    model[3].bias.requires_grad_(requires_grad=False)
    model[2].eval()
    entropy(model, (x, y)).backward()
    calls = []

    def loss(model, batch):
        calls.append(batch)
        if fails and len(calls) > 8:
            raise RuntimeError("the user's loss broke")
        return entropy(model, batch)

    def state():
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        return (
            {n: (t.detach().clone(), t.dtype, t.data_ptr()) for n, t in named.items()},
            grads,
            [p.requires_grad for p in model.parameters()],
            [m.training for m in model.modules()],
            (torch.get_rng_state(), torch.get_default_dtype()),
        )

    before = state()
    try:
        analyze(Task(model, [(x, y)], loss, mode="train"))
        assert not fails
    except Exception as error:
        assert fails, error
    torch.testing.assert_close(state(), before, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "convnet", "transformer"])
def test_a_trained_demo_on_1000_digits_does_not_depend_on_the_batches(name, tmp_path):
    from hessdiag.demos import demo_task, train

    train(name, tmp_path)
    options = {"checkpoint": tmp_path / "model.pt", "max_examples": 1000}
    many = analyze(demo_task(name), batch_size=96, **options)
    assert_same_spectra(many, analyze(demo_task(name), **options))
