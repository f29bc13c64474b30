"""Which training step a run belongs to, and several runs as one document."""

import json

import pytest

from hessdiag.series import named_step, runs_json, step_of
from sample_runs import run, small_run


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-200.pt", 200),
        ("step-000100.pt", 100),
        ("global_step1500", 1500),
        ("epoch=3-step=400.ckpt", 400),
        ("ckpt-3-step-400.pt", 400),
        ("checkpoint-500", 500),
        ("ckpt_12.safetensors", 12),
        ("model_iter_7.pt", 7),
        ("mnist-0200.pt", None),
        ("seed-1.pt", None),
        ("0200.pt", 200),
        ("epoch-3.pt", None),
        ("model-v2.pt", None),
        ("resnet20.pt", None),
        ("run-1-of-2.pt", None),
        ("lr-0.01.pt", None),
        ("model.pt", None),
        ("", None),
    ],
)
def test_a_name_tells_its_step_where_it_has_one(name, step):
    assert named_step(name) == step


def test_what_the_checkpoint_says_comes_before_its_name():
    assert step_of(run((), step=7, checkpoint="step-200.pt")) == 7
    assert step_of(run((), step=0, checkpoint="step-200.pt")) == 0
    assert step_of(run((), step=None, checkpoint="step-200.pt")) == 200
    assert step_of(run((), checkpoint=None)) is None


def test_the_document_holds_each_runs_own_with_its_step_in_order():
    runs = [run((), checkpoint="step-9.pt"), small_run()]
    found = json.loads(runs_json(runs), parse_constant=pytest.fail)
    assert (found["format"], found["version"]) == ("hessdiag-runs", "1.0.0")
    assert [each.pop("step") for each in found["runs"]] == [9, None]
    assert found["runs"] == [json.loads(each.to_json()) for each in runs]
