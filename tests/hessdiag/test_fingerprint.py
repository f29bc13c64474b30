"""When two runs are one, and which field says that they are not."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hessdiag import Task, analyze
from hessdiag.errors import StoreError
from hessdiag.fingerprint import hash_tensors
from hessdiag.options import Options
from hessdiag.store.identity import check_same


def rows(count, seed=0):
    source = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 3, generator=source)
    return features, torch.randn(count, 2, generator=source)


@pytest.fixture
def task() -> Task:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    return Task(net, [rows(8), rows(4, 1)], nn.MSELoss())


@pytest.fixture
def finished(task, tmp_path) -> Path:
    path = tmp_path / "run.h5"
    analyze(task, output=path, blocks="2", max_examples=12)
    return path


def test_an_identical_run_is_returned_as_it_was_finished(task, finished):
    before = finished.read_bytes()
    events = []
    again = analyze(task, output=finished, blocks="2", max_examples=12, report=events.append)
    assert events == []
    assert finished.read_bytes() == before
    fresh = analyze(task, blocks="2", max_examples=12)
    one, other = (run["2"].variants["raw"] for run in (again, fresh))
    assert one["kappa"].value == pytest.approx(other["kappa"].value, rel=1e-12)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"steps": 7},
        {"exact_limit": 5},
        {"dtype": "float32"},
        {"curvature": "ggn"},
        {"batch_size": 3},
        {"max_examples": 6},
        {"weight_decay": 0.1},
        {"damping": 0.1},
        {"blocks": "0"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_changed_option_is_refused_by_its_name(task, finished, changed):
    options = {"blocks": "2", "max_examples": 12} | changed
    with pytest.raises(StoreError, match=next(iter(changed))):
        analyze(task, output=finished, **options)


@pytest.mark.parametrize(
    "neutral", [{"engine": "recompute"}, {"memory_budget": "1G"}, {"exact_limit": 4096}]
)
def test_options_that_change_no_number_do_not_part_two_runs(task, finished, neutral):
    before = finished.read_bytes()
    analyze(task, output=finished, blocks="2", max_examples=12, **neutral)
    assert finished.read_bytes() == before


def test_every_option_is_either_compared_or_known_to_be_neutral(task):
    found = analyze(task, blocks="2").provenance.fingerprint
    missing = set(Options.__dataclass_fields__) - set(found)
    assert missing == {"engine", "memory_budget", "device", "max_seconds"}
    assert found["device_type"] == "cpu"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("weights", lambda task: _moved_weight(task)),
        ("data", lambda task: replace(task, data=[rows(8), rows(4, 2)])),
        ("structure", lambda task: replace(task, model=nn.Sequential(*task.model, nn.Identity()))),
        ("mode", lambda task: replace(task, mode="train")),
        ("loss", lambda task: replace(task, loss=nn.L1Loss())),
    ],
)
def test_a_changed_task_is_refused_by_what_changed(task, finished, field, change):
    with pytest.raises(StoreError, match=rf"\b{field}\b"):
        analyze(change(task), output=finished, blocks="2", max_examples=12)


def _moved_weight(task):
    model = copy.deepcopy(task.model)
    model[0].weight.data[0, 0] += 1e-7
    return replace(task, model=model)


def test_force_overwrites_a_different_run(task, finished):
    run = analyze(task, output=finished, blocks="2", seed=1, force=True)
    assert run.provenance.fingerprint["seed"] == 1
    again = analyze(task, output=finished, blocks="2", seed=1)
    assert again.created_at == run.created_at


def test_the_same_rows_in_other_batches_are_the_same_data(task):
    features = torch.cat([batch[0] for batch in task.data])
    targets = torch.cat([batch[1] for batch in task.data])
    joined = replace(task, data=[(features, targets)])
    one, other = (analyze(t, blocks="2").provenance.fingerprint for t in (task, joined))
    assert one["data"] == other["data"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-14)


def test_the_seed_changes_no_exact_number_beyond_rounding(task):
    one, other = (analyze(task, seed=seed)["whole"].variants["raw"] for seed in (0, 1))
    for name in ("kappa", "lambda_max", "kappa_abs", "trace"):
        assert one[name].value == pytest.approx(other[name].value, rel=1e-12), name
    assert one["n_positive"].value == other["n_positive"].value


# Pieces


@pytest.mark.parametrize("drift", [0.0, 1e-13])
def test_a_loss_that_differs_by_rounding_is_the_same(drift):
    check_same({"loss": 2.0}, {"loss": 2.0 * (1 + drift)}, Path("run.h5"))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_loss_that_differs_by_more_is_another(scale):
    with pytest.raises(StoreError, match="loss differs"):
        check_same({"loss": scale}, {"loss": scale * (1 + 1e-11)}, Path("run.h5"))


def test_every_differing_field_is_named():
    stored = {"seed": 0, "data": "a", "dtype": "x"}
    with pytest.raises(StoreError, match="data, seed differ;"):
        check_same(stored, {"data": "b", "dtype": "x", "seed": 1}, Path("run.h5"))


def test_a_field_that_the_stored_run_lacks_differs():
    with pytest.raises(StoreError, match="seed differs"):
        check_same({}, {"seed": 0}, Path("run.h5"))


def test_the_hash_of_tensors_knows_names_shapes_types_and_values_but_no_order():
    base = {"a": torch.arange(4.0), "b": torch.zeros(())}
    assert hash_tensors(base) == hash_tensors(dict(reversed(base.items())))
    others = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].view(2, 2), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"] + 1, "b": base["b"]},
        {"a": base["a"]},
    ]
    hashes = {hash_tensors(tensors) for tensors in [base, *others]}
    assert len(hashes) == 1 + len(others)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(0), torch.ones(2, 2, dtype=torch.bfloat16).T, torch.tensor(True), torch.arange(3)],
)
def test_any_tensor_can_be_hashed(tensor):
    assert len(hash_tensors({"x": tensor})) == 64
