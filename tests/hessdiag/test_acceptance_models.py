"""Checkpoints, batches, options and odd models against the same dense matrices."""

import copy
import json
from collections import UserDict, namedtuple
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import dense_oracle
from hessdiag import Task, analyze
from hessdiag.errors import TaskError

TOKENS = "transformer, tied, padded"
Pair = namedtuple("Pair", "input_ids labels")


@cache
def reference(name):
    return analyze(dense_oracle.case(name).task())


def assert_same_spectra(run, other):
    assert [block.name for block in run.blocks] == [block.name for block in other.blocks]
    for mine, yours in zip(run.blocks, other.blocks, strict=True):
        raw = yours.variants["raw"]
        if raw["skipped"] is not None:
            continue
        a, b = mine.variants["raw"].spectrum["eigenvalue"], raw.spectrum["eigenvalue"]
        assert np.abs(a - b).max() <= 1e-10 * np.abs(b).max()


def test_a_compiled_model_and_a_checkpoint_saved_from_it_give_the_model_s_numbers(tmp_path):
    case = dense_oracle.case("mlp tanh")
    compiled = torch.compile(case.model)
    run = analyze(case.task(model=compiled, loss=nn.CrossEntropyLoss()))
    assert_same_spectra(run, reference("mlp tanh"))
    torch.save(compiled.state_dict(), tmp_path / "compiled.pt")
    run = analyze(case.task(model=dense_oracle.tanh_net()), checkpoint=tmp_path / "compiled.pt")
    assert_same_spectra(run, reference("mlp tanh"))


def test_a_float32_checkpoint_is_analysed_in_float64(tmp_path):
    case = dense_oracle.case("mlp tanh")
    torch.save(case.model.state_dict(), tmp_path / "model.pt")
    other = case.task(model=dense_oracle.tanh_net().to(torch.bfloat16))
    assert_same_spectra(analyze(other, checkpoint=tmp_path / "model.pt"), reference("mlp tanh"))


@pytest.mark.parametrize("kind", ["dict", "UserDict", "NamedTuple", "--batch-size 2"])
def test_every_kind_of_batch_gives_the_same_numbers(kind):
    case = dense_oracle.case(TOKENS)
    pack = {
        "dict": lambda tokens, labels: {"input_ids": tokens, "labels": labels},
        "UserDict": lambda tokens, labels: UserDict(input_ids=tokens, labels=labels),
        "NamedTuple": Pair,
    }.get(kind, lambda *batch: batch)

    def loss(model, batch):
        keyed = isinstance(batch, dict | UserDict)
        return case.loss(model, (batch["input_ids"], batch["labels"]) if keyed else batch)

    task = case.task(data=[pack(*batch) for batch in case.batches], loss=loss)
    options = {"batch_size": 2} if kind.startswith("--") else {}
    assert_same_spectra(analyze(task, **options), reference(TOKENS))


def test_a_subset_of_digits_has_the_same_numbers_in_batches_of_96_as_in_one():
    from sklearn.datasets import load_digits

    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10))
    task = Task(model, [(images.float() / 16, labels)], nn.CrossEntropyLoss())
    many = analyze(task, max_examples=1000, batch_size=96, blocks="2")
    one = analyze(task, max_examples=1000, blocks="2")
    assert_same_spectra(many, one)
    for field in ("trace", "frobenius", "kappa", "lambda_max", "half_ratio"):
        a, b = many["2"].variants["raw"][field], one["2"].variants["raw"][field]
        assert a.value == pytest.approx(b.value, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "blocks"), [("mlp", "2"), ("convnet", "bn*,head"), ("transformer", "*norm*,norm")]
)
def test_a_trained_demo_on_1000_digits_does_not_depend_on_the_batches(name, blocks, tmp_path):
    from hessdiag.demos import demo_task, train

    train(name, tmp_path)
    options = {"checkpoint": tmp_path / "model.pt", "max_examples": 1000, "blocks": blocks}
    many = analyze(demo_task(name), batch_size=96, **options)
    assert_same_spectra(many, analyze(demo_task(name), **options))


@pytest.mark.parametrize("name", ["mlp relu", TOKENS])
def test_gauss_newton_is_the_mean_of_j_lambda_j(name):
    case = dense_oracle.case(name)
    model = copy.deepcopy(case.model).double()
    parameters = list(model.parameters())
    matrix = 0.0
    for inputs, targets in case.batches:
        outputs = model(dense_oracle.widened(inputs))
        outputs = outputs.reshape(-1, outputs.shape[-1])[targets.reshape(-1) != -100]
        for z in outputs:
            rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in z]
            jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
            p = z.detach().softmax(0)
            matrix += jacobian.T @ (p.diag() - p.outer(p)) @ jacobian / sum(case.weights)
    value, gradient, _, index = case.dense()
    run = analyze(case.task(), curvature="ggn")
    assert run.to_dict()["curvature"] == "ggn"
    found = dense_oracle.against(run, value, gradient, matrix.numpy(), index)
    for row, arrays, truth in found.values():
        assert np.abs(arrays.spectrum["eigenvalue"] - truth.values).max() <= 1e-9 * truth.norm
        assert row["n_negative"]["value"] == 0


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


SIZES = {"scale": 4, "first": 24, "second": 16, "unused": 8, "last": 12, "whole": 64}


def odd_case():
    torch.manual_seed(2)
    batches = dense_oracle.ragged(torch.randn(23, 5), torch.randint(0, 3, (23,)))
    return dense_oracle.Case(Odd(), batches, dense_oracle.entropy, [9, 9, 5])


def test_unused_frozen_and_tied_parameters_are_reported_and_the_rest_is_right():
    case = odd_case()
    run = analyze(case.task())
    reasons = {block.name: block.variants["raw"]["skipped"] for block in run.blocks}
    assert "frozen" in reasons.pop("frozen")
    assert "second.weight" in reasons.pop("again")
    assert set(reasons.values()) == {None}
    found = dense_oracle.against(run, *case.dense())
    assert {name: row["size"] for name, (row, _, _) in found.items()} == SIZES
    unused = found.pop("unused")[0]
    assert (unused["kappa"]["status"], unused["kappa"]["value"]) == ("zero", None)
    assert (unused["inactive"], unused["n_zero"]["value"]) == (8, 8)
    assert found["whole"][0]["inactive"] == 8
    for row, arrays, truth in found.values():
        assert np.abs(arrays.spectrum["eigenvalue"] - truth.values).max() <= 1e-9 * truth.norm
        assert row["n_positive"]["value"] == truth.positive.size


def test_weight_decay_moves_the_spectrum_rows_and_gradient_but_neither_loss_nor_inactive():
    case, decay = odd_case(), 0.03
    value, gradient, matrix, index = case.dense()
    trained = [p.detach().double().flatten() for p in case.model.parameters() if p.requires_grad]
    gradient = gradient + decay * torch.cat(trained).numpy()
    run = analyze(case.task(), weight_decay=decay)
    found = dense_oracle.against(run, value, gradient, matrix + decay * np.eye(len(matrix)), index)
    assert [row["inactive"] for row, _, _ in found.values()] == [0, 0, 0, 8, 0, 8]
    for row, arrays, truth in found.values():
        assert row["loss"] == pytest.approx(value, rel=1e-12)
        assert row["gradient_norm"] == pytest.approx(np.linalg.norm(truth.gradient), rel=1e-9)
        assert np.abs(arrays.spectrum["eigenvalue"] - truth.values).max() <= 1e-9 * truth.norm
        assert arrays.rows["norm"] == pytest.approx(np.linalg.norm(truth.matrix, axis=1), rel=1e-9)
        for horizon, (positive, *_) in truth.forecasts():
            assert dense_oracle.holds(
                row["forecast"][horizon]["positive"], positive, 1e-7 * positive
            )


def test_damping_gives_the_absolute_damped_condition_number():
    case = dense_oracle.case("mlp tanh")
    run = analyze(case.task(), damping=0.01)
    for row, _, truth in dense_oracle.against(run, *case.dense()).values():
        sizes = np.abs(truth.values)
        right = (sizes.max() + 0.01) / (sizes.min() + 0.01)
        assert row["kappa_damped"]["value"] == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"exact_limit": 0}, {"curvature": "ggn"}])
def test_a_linear_loss_has_a_zero_hessian_and_no_condition_number(options):
    torch.manual_seed(0)
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
    case = dense_oracle.case(name)
    run = analyze(case.task(), exact_limit=0, steps=steps)
    for row, arrays, truth in dense_oracle.against(run, *case.dense()).values():
        assert row["method"] == "lanczos"
        assert row["products"] <= steps + 20 + 20
        for path, (right, error) in truth.scalars().items():
            quantity = dense_oracle.entry(row, path)
            assert quantity["status"] not in {"exact", "zero"}
            assert dense_oracle.holds(quantity, right, error), path
        ritz, bound = (arrays.spectrum[key] for key in ("ritz_value", "ritz_bound"))
        distance = np.abs(ritz[:, None] - truth.values[None]).min(axis=1)
        assert (distance <= bound + truth.slack).all()


class Borrowed:
    """A model in an unusual state, and whether it still is in it bit for bit."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        self.model[3].bias.requires_grad_(requires_grad=False)
        self.model[2].eval()
        self.batch = torch.randn(12, 5), torch.randint(0, 3, (12,))
        dense_oracle.entropy(self.model, self.batch).backward()
        self.tensors = {
            name: (tensor, tensor.data_ptr(), tensor.detach().clone())
            for name, tensor in self.every()
        }
        self.flags, self.rng = self.switches(), torch.get_rng_state()

    def every(self):
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                yield f"{name}.grad", parameter.grad

    def switches(self):
        trained = [p.requires_grad for p in self.model.parameters()]
        return trained, [m.training for m in self.model.modules()], torch.get_default_dtype()

    def assert_untouched(self):
        now = dict(self.every())
        assert set(now) == set(self.tensors)
        for name, (tensor, pointer, values) in self.tensors.items():
            assert now[name] is tensor
            assert tensor.data_ptr() == pointer
            assert tensor.dtype == values.dtype
            assert torch.equal(tensor, values), name
        assert self.switches() == self.flags
        assert torch.equal(torch.get_rng_state(), self.rng)


def test_the_model_is_bit_for_bit_what_it_was():
    borrowed = Borrowed()
    analyze(Task(borrowed.model, [borrowed.batch], dense_oracle.entropy, mode="train"))
    borrowed.assert_untouched()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_bit_for_bit_what_it_was_also_after_an_exception(error):
    borrowed, calls = Borrowed(), []

    def loss(model, batch):
        calls.append(torch.rand(1))  # draws from the global generator, too
        if len(calls) > 8:
            raise error("the user's loss broke")
        return dense_oracle.entropy(model, batch)

    with pytest.raises((TaskError, KeyboardInterrupt)):
        analyze(Task(borrowed.model, [borrowed.batch], loss, mode="train"))
    assert len(calls) > 8
    borrowed.assert_untouched()
