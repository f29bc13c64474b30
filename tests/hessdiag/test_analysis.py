"""``analyze`` end to end: quadratics with known Hessians, and networks against dense ones."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hessdiag.network
import quadratics
from hessdiag import Task, analyze, open_run
from hessdiag.demos import DEMOS
from hessdiag.errors import InputError, OptionError, StoreError, TaskError
from hessdiag.quantity import Quantity
from hessdiag.run import HORIZONS
from hessdiag.store import validate_run
from hessdiag_probes.errors import Breakdown

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def classes(count, rows, seed=0):
    return torch.randint(0, count, (rows,), generator=torch.Generator().manual_seed(seed))


def seeded(build):
    """A network whose weights do not depend on what ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


@pytest.fixture
def tanh_task() -> Task:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    return Task(
        net,
        [(normal(12, 4), classes(3, 12)), (normal(7, 4, seed=1), classes(3, 7, 1))],
        nn.CrossEntropyLoss(),
    )


def raw(run, block):
    return run[block].variants["raw"]


def dense(task: Task) -> Tensor:
    """The Hessian of a task of pairs by torch's own dense route, parameters in order."""
    net = task.model.double()
    shapes = {name: p.shape for name, p in net.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split(sizes)
        named = {n: p.view(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        total = sum(
            len(x) * task.loss(torch.func.functional_call(net, named, (x,)), y)
            for x, y in task.data
        )
        return total / sum(len(x) for x, _ in task.data)

    start = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    return torch.autograd.functional.hessian(loss, start)


# Quadratics


@settings(max_examples=60, deadline=None, derandomize=True)
@given(kind=st.sampled_from(quadratics.KINDS), seed=st.integers(0, 10**6))
def test_the_truth_lies_inside_every_interval_through_the_whole_pipeline(kind, seed):
    matrix, zeros = quadratics.random_matrix(kind, seed)
    found = quadratics.analyse(matrix)
    truth = quadratics.eigenvalues(matrix, zeros)
    assert quadratics.broken_promises(found.values, truth) == []
    assert sum(found[name].value for name in ("n_positive", "n_negative", "n_zero")) == len(matrix)
    at = quadratics.default_position(len(matrix))
    assert found["gradient_norm"] == pytest.approx(float((matrix @ at).norm()), rel=1e-9)


@pytest.mark.parametrize("decades", [12, 20])
def test_a_huge_positive_range_goes_through_the_pipeline_exactly(decades):
    matrix = quadratics.graded(torch.linspace(0.5, 2.0, 10), decades / 2)
    truth = quadratics.eigenvalues(matrix)
    kappa = quadratics.analyse(matrix)["kappa"]
    assert kappa.status == "exact"
    assert abs(kappa.value / (truth[-1] / truth[0]) - 1) < 1e-10
    assert quadratics.contains(kappa, truth[-1] / truth[0])


def test_a_matrix_in_the_closure_is_the_same_as_in_a_buffer():
    matrix = quadratics.turned(torch.tensor([-1.0, 0.5, 2.0], dtype=DOUBLE))
    model = nn.Module()
    model.p = nn.Parameter(quadratics.default_position(3))
    task = Task(model, [torch.zeros(1, 1)], lambda m, _batch: 0.5 * m.p @ matrix @ m.p)
    one, other = raw(analyze(task, blocks="whole"), "whole"), quadratics.analyse(matrix)
    for name in ("kappa", "lambda_max", "lambda_min", "n_positive", "trace"):
        assert one[name].value == pytest.approx(other[name].value, rel=1e-13), name


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize("limit", [None, 0])
def test_the_scale_of_the_loss_changes_no_relative_field(scale, limit):
    matrix = quadratics.turned(torch.tensor([-1.0, 0.0, 1e-6, 0.5, 2.0], dtype=DOUBLE))
    one = quadratics.analyse(matrix, exact_limit=limit)
    other = quadratics.analyse(matrix, scale=scale, exact_limit=limit)
    for name in ("kappa", "kappa_abs", "n_positive", "n_negative", "n_zero", "negative_depth"):
        assert one[name].status == other[name].status, name
        if one[name].value is not None:
            assert other[name].value == pytest.approx(one[name].value, rel=1e-6, abs=1e-12), name
    for name in ("lambda_max", "lambda_min", "trace"):
        if one[name].value is not None:
            assert other[name].value == pytest.approx(scale * one[name].value, rel=1e-9), name
    assert (one["inactive"], one["ambiguous"]) == (other["inactive"], other["ambiguous"])
    for horizon in HORIZONS:
        left, right = one["forecast_positive"][horizon], other["forecast_positive"][horizon]
        assert left.status == right.status
        if left.value is not None:
            assert right.value == pytest.approx(scale * left.value, rel=1e-9)


# Weight decay, damping, options


def test_weight_decay_adds_to_curvature_and_gradient_but_not_to_the_loss():
    matrix = quadratics.turned(torch.tensor([-0.5, 0.0, 1.0, 3.0], dtype=DOUBLE))
    matrix[:, 1] = matrix[1] = 0.0
    at = quadratics.default_position(4)
    plain, decayed = quadratics.analyse(matrix), quadratics.analyse(matrix, weight_decay=0.7)
    np.testing.assert_allclose(
        decayed.spectrum["eigenvalue"], plain.spectrum["eigenvalue"] + 0.7, atol=1e-14
    )
    shifted = matrix + 0.7 * torch.eye(4, dtype=DOUBLE)
    np.testing.assert_allclose(decayed.rows["norm"], shifted.norm(dim=1), rtol=1e-13)
    np.testing.assert_allclose(decayed.rows["diagonal"], shifted.diagonal(), rtol=1e-13)
    gradient = (matrix @ at + 0.7 * at).norm()
    assert decayed["gradient_norm"] == pytest.approx(float(gradient), rel=1e-13)
    assert decayed["loss"] == plain["loss"]
    assert decayed["inactive"] == plain["inactive"] == 1


def test_the_forecast_of_a_decayed_loss_is_what_descent_on_it_gains():
    matrix = quadratics.turned(torch.tensor([0.1, 1.0, 3.0], dtype=DOUBLE))
    shifted, at = matrix + 0.7 * torch.eye(3, dtype=DOUBLE), quadratics.default_position(3)
    found = quadratics.analyse(matrix, weight_decay=0.7)["forecast_total"]
    for steps in (1, 10, 100):
        now = at.clone()
        for _ in range(steps):
            now = now - shifted @ now / 3.7
        gained = 0.5 * float(at @ shifted @ at - now @ shifted @ now)
        assert found[str(steps)].value == pytest.approx(gained, rel=1e-11), steps


def test_damping_is_absolute_and_touches_one_field():
    matrix = quadratics.turned(torch.tensor([-3.0, 0.5, 2.0], dtype=DOUBLE))
    plain, damped = quadratics.analyse(matrix), quadratics.analyse(matrix, damping=0.5)
    assert plain["kappa_damped"] == Quantity.absent()
    assert damped["kappa_damped"].value == pytest.approx(3.5, rel=1e-13)
    assert damped["kappa"] == plain["kappa"]


def test_steps_bound_the_products_for_the_ends_above_the_exact_limit():
    matrix = quadratics.turned(torch.linspace(1.0, 30.0, 30, dtype=DOUBLE))
    for steps in (1, 5, 12):
        found = quadratics.analyse(matrix, exact_limit=0, steps=steps)
        assert found["products"] == steps + 20 + 20  # forecast, probes
        assert len(found.spectrum["ritz_value"]) == steps
    assert quadratics.analyse(matrix, exact_limit=0, steps=5, probes=7)["products"] == 5 + 20 + 7


def test_the_exact_limit_is_the_largest_block_that_is_solved():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=DOUBLE))
    assert quadratics.analyse(matrix, exact_limit=3)["method"] == "exact"
    assert quadratics.analyse(matrix, exact_limit=2)["method"] == "lanczos"


def test_above_the_exact_limit_every_field_is_certified_or_says_that_it_is_not():
    matrix = quadratics.turned(torch.linspace(-10.0, 50.0, 120, dtype=DOUBLE))
    found = quadratics.analyse(matrix, exact_limit=0)
    assert found["lambda_max"].low <= 50 + 1e-12 <= found["lambda_max"].high + 2e-12
    assert found["lambda_min"].low - 1e-12 <= -10 <= found["lambda_min"].high + 1e-12
    assert (found["kappa"].status, found["kappa"].high) == ("lower-bound", None)
    for name in ("trace", "frobenius", "stable_rank", "negative_depth"):
        assert found[name].status == "interval", name
    for name in ("n_positive", "n_zero", "negative_mass"):
        assert found[name] == Quantity.unresolved(), name
    assert {q.status for q in found["kappa_quantile"].values()} == {"unresolved"}
    assert {q.status for q in found["forecast_positive"].values()} == {"estimate"}
    assert any("--density" in note for note in found["notes"])


def test_options_of_larger_blocks_reach_them():
    matrix = quadratics.turned(torch.linspace(1.0, 30.0, 30, dtype=DOUBLE))
    power = quadratics.analyse(matrix, exact_limit=0, eigensolver="power")
    assert (power["method"], len(power.spectrum["ritz_value"])) == ("power", 2)
    loose = quadratics.analyse(matrix, exact_limit=0, tolerance=0.5, probes=0)
    tight = quadratics.analyse(matrix, exact_limit=0, tolerance=1e-6, probes=0)
    assert loose["products"] < tight["products"]
    dense = quadratics.analyse(matrix, exact_limit=0, density=True)
    assert dense["kappa_quantile"]["0.5"].status == "estimate"
    assert {"density", "density_grid", "density_resolution"} <= set(dense.spectrum)


def test_power_iteration_stands_in_where_the_krylov_basis_does_not_fit():
    matrix = quadratics.turned(torch.linspace(1.0, 30.0, 30, dtype=DOUBLE))
    vector = 30 * 8
    found = quadratics.analyse(matrix, exact_limit=0, memory_budget=19 * vector)
    assert found["method"] == "power"
    assert any("Krylov basis" in note for note in found["notes"])
    assert (
        quadratics.analyse(matrix, exact_limit=0, memory_budget=50 * vector)["method"] == "lanczos"
    )


def test_a_memory_budget_that_changes_numbers_is_another_analysis(tmp_path):
    task = quadratics.quadratic_task(torch.diag(torch.linspace(1, 30, 30, dtype=DOUBLE)))
    options = {"blocks": "whole", "exact_limit": 0, "output": tmp_path / "run.h5"}
    analyze(task, **options)
    analyze(task, memory_budget="1G", **options)
    with pytest.raises(StoreError, match="another analysis: memory differs"):
        analyze(task, memory_budget=1000, **options)


def test_a_run_with_a_density_is_stored_and_resumed(tmp_path):
    task = quadratics.quadratic_task(torch.diag(torch.linspace(1, 30, 30, dtype=DOUBLE)))
    options = {
        "blocks": "whole,parameter",
        "exact_limit": 0,
        "density": True,
        "variants": "raw,jacobi",
    }
    path = tmp_path / "run.h5"
    whole = analyze(task, output=path, **options)
    assert validate_run(path) == []
    stored = open_run(path)["whole"].variants["raw"]
    made = whole["whole"].variants["raw"]
    assert set(stored.spectrum) == set(made.spectrum)
    assert stored.spectrum["density_width"] == made.spectrum["density_width"]
    again = tmp_path / "again.h5"
    done = []

    def interrupt(event):
        done.append(event.block)
        if event.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(task, output=again, report=interrupt, **options)
    assert again.with_name("again.h5.parts").is_dir()
    resumed = analyze(task, output=again, **options)
    for name in ("density", "density_grid", "density_resolution"):
        np.testing.assert_array_equal(
            resumed["whole"].variants["raw"].spectrum[name], made.spectrum[name]
        )


def test_weight_decay_on_a_convex_gauss_newton_closes_kappa():
    torch.manual_seed(0)
    inputs, targets = torch.randn(60, 8), torch.randint(0, 3, (60,))
    task = Task(nn.Linear(8, 3), [(inputs, targets)], nn.CrossEntropyLoss())
    options = {"curvature": "ggn", "weight_decay": 1e-3, "blocks": "whole"}
    truth = analyze(task, **options)["whole"].variants["raw"]["kappa"].value
    found = analyze(task, exact_limit=0, **options)["whole"].variants["raw"]
    assert found["kappa"].status == "interval"
    assert found["kappa"].low <= truth <= found["kappa"].high
    assert found["lambda_min"].low >= 1e-3
    bent = Task(task.model, task.data, lambda m, b: (m(b[0]).sigmoid() ** 2).mean())
    unknown = analyze(bent, exact_limit=0, **options)["whole"].variants["raw"]
    assert unknown["kappa"].status == "lower-bound"
    assert any("convex" in note for note in unknown["notes"])


def test_the_bus_network_is_never_given_more_than_its_condition_number():
    path = Path(__file__).parents[3] / "shared" / "data" / "1138_bus.mtx"
    if not path.exists():
        pytest.skip("needs ../shared/data/1138_bus.mtx")
    from scipy.io import mmread

    matrix = torch.from_numpy(mmread(path).toarray())
    for steps in (20, 120):
        found = quadratics.analyse(matrix, exact_limit=0, steps=steps)
        assert found["inactive"] == 0
        assert found["kappa"].status == "lower-bound"
        assert 1 < found["kappa"].low <= 8.572646e6
        assert found["lambda_min"].high >= 3.5168600e-3
        assert found["lambda_max"].low <= 30148.794422 * (1 + 1e-9)
    assert found["lambda_max"].low == pytest.approx(30148.794422, rel=1e-8)


# Blocks


def test_blocks_cut_from_whole_equal_those_assembled_alone(tanh_task):
    cut = analyze(tanh_task)
    alone = analyze(tanh_task, blocks="0,2")
    assert [b.name for b in cut.blocks] == ["0", "2", "whole"]
    matrix = dense(tanh_task)
    for name, part in (("0", slice(0, 25)), ("2", slice(25, 43))):
        truth = torch.linalg.eigvalsh(matrix[part, part]).numpy()
        for run in (cut, alone):
            found = raw(run, name).spectrum["eigenvalue"]
            np.testing.assert_allclose(found, truth, rtol=0, atol=1e-12 * abs(truth).max())
        assert (raw(cut, name)["products"], raw(alone, name)["products"]) == (0, len(truth))
    whole = torch.linalg.eigvalsh(matrix).numpy()
    np.testing.assert_allclose(
        raw(cut, "whole").spectrum["eigenvalue"], whole, rtol=0, atol=1e-12 * abs(whole).max()
    )


def test_the_order_of_blocks_and_of_threads_changes_nothing_beyond_rounding(tanh_task):
    first = analyze(tanh_task, blocks="0,2,whole")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        second = analyze(tanh_task, blocks="whole,2,0")
    finally:
        torch.set_num_threads(threads)
    for name in ("0", "2", "whole"):
        one, other = raw(first, name), raw(second, name)
        norm = abs(one.spectrum["eigenvalue"]).max()
        np.testing.assert_allclose(
            one.spectrum["eigenvalue"], other.spectrum["eigenvalue"], rtol=0, atol=1e-12 * norm
        )
        for field in ("n_positive", "n_negative", "n_zero"):
            assert one[field].value == other[field].value, (name, field)


@pytest.mark.parametrize("order", [["0", "2"], ["2", "0"]])
def test_random_vectors_belong_to_a_block_not_to_its_place(tanh_task, order):
    run = analyze(tanh_task, blocks=order, exact_limit=0, steps=4)
    wanted = {"0": analyze(tanh_task, blocks="0", exact_limit=0, steps=4)}
    np.testing.assert_array_equal(
        raw(run, "0").spectrum["ritz_value"], raw(wanted["0"], "0").spectrum["ritz_value"]
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), np.linalg.LinAlgError("boom"), Breakdown("boom")]
)
def test_a_block_that_fails_is_a_row_with_its_reason_and_the_others_survive(
    tanh_task, monkeypatch, error
):
    solve = hessdiag.opened.solve_exact

    def failing(matrix, problem):
        if problem.name == "0":
            raise error
        return solve(matrix, problem)

    monkeypatch.setattr(hessdiag.opened, "solve_exact", failing)
    run = analyze(tanh_task)
    assert "boom" in raw(run, "0")["skipped"]
    assert raw(run, "0")["kappa"] == Quantity.absent()
    assert raw(run, "0")["loss"] is None
    assert run.provenance.environment["failed"] == ["0", "0 [bnp]"]
    assert run["0"].variants["bnp"]["skipped"] == raw(run, "0")["skipped"]
    for name in ("2", "whole"):
        assert raw(run, name)["kappa"].status == "exact"
    json.loads(run.to_json())


def test_a_block_without_memory_says_what_to_lower(tanh_task, monkeypatch):
    def failing(*_):
        raise MemoryError

    for name in ("solve_exact", "solve_matrix_free"):  # nor for bounds in its place
        monkeypatch.setattr(hessdiag.opened, name, failing)
    run = analyze(tanh_task, blocks="2")
    assert "--exact-limit" in raw(run, "2")["skipped"]


def test_the_model_is_untouched_bit_for_bit(tanh_task):
    before = {name: tensor.clone() for name, tensor in tanh_task.model.state_dict().items()}
    tanh_task.model.train()
    state = torch.random.get_rng_state()
    analyze(tanh_task, weight_decay=0.1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert tanh_task.model.training
    for name, tensor in tanh_task.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None and p.requires_grad for p in tanh_task.model.parameters())


# Zero Hessians and rows of nothing but rounding


@pytest.mark.parametrize("limit", [None, 0])
def test_a_linear_loss_has_a_zero_row_for_every_block(limit):
    net = seeded(lambda: nn.Linear(4, 3))
    data = [(normal(10, 4), normal(10, 3, seed=1))]
    run = analyze(Task(net, data, lambda m, b: (m(b[0]) * b[1].sin()).mean()), exact_limit=limit)
    for block in run.blocks:
        found = block.variants["raw"]
        assert found["kappa"] == found["kappa_abs"] == Quantity.zero()
        assert found["inactive"] == found["size"] == found["n_zero"].value
        assert found["gradient_norm"] > 0
    json.loads(run.to_json())


@pytest.mark.parametrize("limit", [None, 0])
def test_dead_units_and_dead_pixels_are_counted_inactive(limit):
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    net[0].bias.data[:2] = -100.0
    pixels = normal(30, 6)
    pixels[:, [1, 4]] = 0.0
    run = analyze(Task(net, [(pixels, classes(3, 30))], nn.CrossEntropyLoss()), exact_limit=limit)
    assert raw(run, "0")["inactive"] == 2 * 7 + 3 * 2
    assert raw(run, "2")["inactive"] == 2 * 3
    assert raw(run, "whole")["inactive"] == 26


@pytest.mark.parametrize("limit", [None, 0])
def test_unused_embedding_rows_are_counted_inactive(limit):
    net = seeded(
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Tanh(), nn.Linear(4, 3))
    )
    tokens = classes(6, 40).unsqueeze(1)
    assert len(tokens.unique()) == 6
    run = analyze(
        Task(net, [(tokens, classes(3, 40, 1))], nn.CrossEntropyLoss()),
        blocks="0",
        exact_limit=limit,
    )
    assert raw(run, "0")["inactive"] == 3 * 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x, x, x)[0].mean(1))


@pytest.mark.parametrize("limit", [None, 0])
def test_the_key_bias_of_attention_is_rounding_noise_and_counted_inactive(limit):
    task = Task(seeded(Attention), [(normal(20, 4, 6), classes(3, 20))], nn.CrossEntropyLoss())
    run = analyze(task, blocks=["layer", "bias=attend.in_proj_bias"], exact_limit=limit)
    assert raw(run, "attend")["inactive"] == raw(run, "bias")["inactive"] == 6
    if limit is None:
        assert raw(run, "bias")["ambiguous"] is False
        assert raw(run, "whole")["ambiguous"] is False


@pytest.mark.parametrize("limit", [None, 0])
def test_a_convolution_bias_before_batch_normalisation_in_train_mode_is_inactive(limit):
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)
        )
    )
    task = Task(net, [(normal(20, 1, 5, 5), classes(3, 20))], nn.CrossEntropyLoss(), mode="train")
    run = analyze(task, blocks=["0", "bias=0.bias"], exact_limit=limit)
    assert raw(run, "0")["inactive"] == 3
    assert raw(run, "bias")["kappa"] == Quantity.zero()
    assert raw(run, "bias")["inactive"] == 3


# Narrower arithmetic


class HiddenFloat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).float()


def test_hidden_float32_is_never_exact_and_its_intervals_hold():
    task = Task(seeded(HiddenFloat), [(normal(30, 6), classes(3, 30))], nn.CrossEntropyLoss())
    run = analyze(task, blocks="whole")
    plain = Task(task.model.layer, task.data, nn.CrossEntropyLoss())
    truth = torch.linalg.eigvalsh(dense(plain))
    found = raw(run, "whole")
    assert "exact" not in json.dumps(run.to_dict()["blocks"]).replace('"method": "exact"', "")
    assert any("float32" in warning for warning in run.provenance.warnings)
    positive = truth[truth > 1e-6]
    for name, value in {
        "lambda_max": truth[-1],
        "lambda_min": truth[0],
        "kappa": positive[-1] / positive[0],
        "trace": truth.sum(),
        "frobenius": truth.norm(),
    }.items():
        assert quadratics.contains(found[name], mp.mpf(float(value))), name
    assert found["lambda_max"].high - found["lambda_max"].low > 1e-8


def test_float32_claims_no_huge_kappa_and_its_intervals_hold(tanh_task):
    graded = normal(50, 6) * torch.logspace(-6, 0, 6, dtype=DOUBLE)
    linear = seeded(lambda: nn.Linear(6, 2))
    task = Task(linear, [(graded, normal(50, 2, seed=1))], nn.MSELoss())
    exact = raw(analyze(task), "weight")["kappa"]
    assert exact.status == "exact"
    assert exact.value > 1e11
    narrow = raw(analyze(task, dtype="float32"), "weight")
    assert narrow["dtype"] == "float32"
    assert narrow["kappa"].status == "lower-bound"
    assert narrow["kappa"].low < 1e6
    wide, rounded = analyze(tanh_task), analyze(tanh_task, dtype="float32")
    for name in ("0", "2", "whole"):
        for field in ("lambda_max", "lambda_min", "trace", "frobenius"):
            assert quadratics.contains(
                raw(rounded, name)[field], mp.mpf(raw(wide, name)[field].value)
            ), (name, field)


# Data


def test_digits_in_ragged_batches_are_the_digits_in_one_batch():
    task = DEMOS["mlp"]()
    options = {"blocks": "2", "max_examples": 1000}
    ragged = raw(analyze(task, batch_size=96, **options), "2")
    single = raw(analyze(task, batch_size=1000, **options), "2")
    one, other = ragged.spectrum["eigenvalue"], single.spectrum["eigenvalue"]
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-10 * abs(other).max())
    assert ragged["loss"] == pytest.approx(single["loss"], rel=1e-12)
    assert ragged["gradient_norm"] == pytest.approx(single["gradient_norm"], rel=1e-10)
    for name in ("n_positive", "n_negative", "n_zero"):
        assert ragged[name].value == single[name].value
    assert ragged["kappa_quantile"]["0.5"].value == pytest.approx(
        single["kappa_quantile"]["0.5"].value, rel=1e-9
    )


def test_half_ratio_compares_the_halves_of_the_drawn_rows():
    rows = normal(10, 3) * torch.tensor([1.0, 2.0]).repeat(5)[:, None]
    net = seeded(lambda: nn.Linear(3, 1, bias=False))
    task = Task(net, [(rows, torch.zeros(10, 1))], nn.MSELoss())
    assert raw(analyze(task, blocks="whole"), "whole")["half_ratio"] == Quantity.absent()
    found = raw(analyze(task, blocks="whole", max_examples=10), "whole")["half_ratio"]
    tops = [float(torch.linalg.eigvalsh(part.T @ part)[-1]) for part in (rows[::2], rows[1::2])]
    assert found.status == "estimate"
    assert found.value == pytest.approx(tops[0] / tops[1], rel=1e-10)
    decayed = analyze(task, blocks="whole", max_examples=10, weight_decay=100.0)
    moved = (tops[0] * 2 / 5 + 100) / (tops[1] * 2 / 5 + 100)
    assert raw(decayed, "whole")["half_ratio"].value == pytest.approx(moved, rel=1e-10)


def test_the_halves_of_a_zero_hessian_have_no_ratio():
    net = seeded(lambda: nn.Linear(3, 1))
    task = Task(net, [normal(10, 3)], lambda model, batch: model(batch).mean())
    assert raw(analyze(task, max_examples=8), "whole")["half_ratio"] == Quantity.zero()


def test_max_examples_draws_a_subset_by_the_seed():
    task = Task(seeded(lambda: nn.Linear(3, 1)), [(normal(20, 3), normal(20, 1))], nn.MSELoss())
    losses = {
        seed: raw(analyze(task, blocks="whole", max_examples=5, seed=seed), "whole")["loss"]
        for seed in (0, 1)
    }
    again = raw(analyze(task, blocks="whole", max_examples=5, seed=0), "whole")["loss"]
    assert losses[0] == again != losses[1]
    full = raw(analyze(task, blocks="whole"), "whole")["loss"]
    assert raw(analyze(task, blocks="whole", max_examples=20), "whole")["loss"] == full


# The document


@pytest.mark.parametrize("limit", [None, 0])
def test_no_number_of_the_document_is_anything_but_finite(tanh_task, limit):
    document = analyze(tanh_task, exact_limit=limit, damping=1e-3, max_examples=15).to_dict()

    def walk(value):
        if isinstance(value, dict):
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, list):
            for item in value:
                yield from walk(item)
        elif isinstance(value, float):
            yield value

    numbers = list(walk(document))
    assert len(numbers) > 50
    assert all(math.isfinite(number) for number in numbers)
    json.dumps(document, allow_nan=False)


def test_a_row_says_what_it_cost_and_how_it_was_made(tanh_task):
    run = analyze(tanh_task, variants="raw,jacobi")
    whole = raw(run, "whole")
    assert (whole["method"], whole["products"], whole["dtype"]) == ("exact", 43, "float64")
    assert whole["same_function"] is True
    rows = {"0", "2", "whole"}
    rows |= {f"{name} [jacobi]" for name in rows}
    assert set(run.provenance.environment["seconds"]) == rows
    assert run.provenance.environment["engine"]["0"] == "cut from whole"
    assert {"symmetry", "difference", "repeatability"} <= set(run.provenance.environment["checks"])


def test_the_progress_reaches_every_block_and_its_last_product(tanh_task):
    events = []
    analyze(tanh_task, blocks="0,2", report=events.append)
    last = {event.block: event for event in events if event.block}
    assert {name: (event.done, event.total) for name, event in last.items()} == {
        "0": (25, 25),
        "2": (18, 18),
    }


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(tanh_task, broken):
    tanh_task.model[2].bias.data[0] = broken
    with pytest.raises(InputError, match=r"2\.bias"):
        analyze(tanh_task)


def test_only_a_task_can_be_analysed():
    with pytest.raises(OptionError, match=r"hessdiag\.Task"):
        analyze(nn.Linear(2, 2))


def test_a_well_fitted_classifier_has_no_spurious_eigenvalue():
    # 1 - p is 1e-7 here: what float64 loses inside the softmax is noise, not curvature.
    x = normal(40, 3)
    y = (x[:, 0] > 0).long()
    x[:, 0] = x[:, 0].sign() * (1 + 0.1 * x[:, 0].abs())
    model = seeded(lambda: nn.Linear(3, 2)).double()
    with torch.no_grad():
        model.weight.mul_(0.1)
        model.weight[:, 0] = torch.tensor([-7.5, 7.5], dtype=DOUBLE)
    run = analyze(Task(model, [(x, y)], nn.CrossEntropyLoss()), blocks=["w=weight", "b=bias"])
    for name, positive in (("w", 3), ("b", 1)):
        found = raw(run, name)
        assert found["n_positive"].value == positive
        assert found["n_negative"].value == 0
    assert raw(run, "b")["kappa"].value == pytest.approx(1.0, abs=1e-6)


def test_a_layer_called_whole_is_told_from_the_whole_network():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = nn.Linear(6, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, inputs):
            return self.head(torch.tanh(self.whole(inputs)))

    run = analyze(Task(seeded(Net), [(normal(20, 6), classes(3, 20))], nn.CrossEntropyLoss()))
    assert [block.name for block in run.blocks] == ["layer whole", "head", "whole"]
    assert [raw(run, block.name)["size"] for block in run.blocks] == [28, 15, 43]


def test_what_the_users_data_raise_is_one_task_error():
    class Broken:
        def __iter__(self):
            yield normal(4, 6), classes(3, 4)
            raise KeyError("row 5")

    task = Task(nn.Linear(6, 3), Broken(), nn.CrossEntropyLoss())
    with pytest.raises(TaskError, match="reading the task's data raised KeyError"):
        analyze(task)
    pairs = [(normal(4, 6), classes(3, 4))]
    task = Task(nn.Linear(6, 3), pairs, nn.CrossEntropyLoss(), batch_size=len_of_none)
    with pytest.raises(TaskError, match="counting the units of a batch raised TypeError"):
        analyze(task)


def len_of_none(_batch):
    return len(None)


@pytest.mark.parametrize("scale", [1e-170, 1e-300, 1e160])
@pytest.mark.parametrize("exact_limit", [None, 0])
def test_a_loss_whose_squares_leave_float64_is_refused_and_never_called_zero(scale, exact_limit):
    matrix = scale * torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=DOUBLE))
    run = analyze(quadratics.quadratic_task(matrix), exact_limit=exact_limit)
    for block in run.blocks:
        assert "multiply the loss by a constant" in raw(run, block.name)["skipped"]


def test_a_loss_of_absolute_values_is_analysed():
    # Its second derivative holds tensors without storage, which crashed the interpreter.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    data = [(torch.randn(12, 3).double(), torch.randn(12, 1).double())]
    task = Task(model, data, nn.L1Loss())
    run = analyze(task)
    truth = np.linalg.eigvalsh(dense(task))
    found = run["whole"].variants["raw"].spectrum["eigenvalue"]
    assert np.abs(found - truth).max() <= 1e-12 * np.abs(truth).max()


def test_a_loss_that_calls_exit_is_an_error_and_no_success():
    task = Task(nn.Linear(2, 1), [torch.randn(3, 2)], lambda model, batch: sys.exit(0))
    with pytest.raises(TaskError, match="raised SystemExit"):
        analyze(task)
