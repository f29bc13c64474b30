"""Names of a file become names of the model, or are listed; the model is only read."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from hessdiag.checkpoint import Checkpoint, match_weights
from hessdiag.errors import CheckpointError


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def checkpoint(state) -> Checkpoint:
    return Checkpoint(Path("m.pt"), "state dict", dict(state))


def saved() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {
        name: torch.randn(value.shape) if value.is_floating_point() else value
        for name, value in network().state_dict().items()
    }


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class Wrapped(nn.Module):
    """A network whose own attribute is called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = network()


@pytest.mark.parametrize(
    ("prefix", "notice"),
    [
        ("module.", ["removed 'module.' from the names in the file"]),
        ("_orig_mod.", ["removed '_orig_mod.' from the names in the file"]),
        ("module._orig_mod.", ["removed 'module.' and '_orig_mod.' from the names in the file"]),
        ("_orig_mod.module.", ["removed 'module.' and '_orig_mod.' from the names in the file"]),
        ("module.module.", ["removed 'module.' from the names in the file"]),
        ("", []),
    ],
)
def test_wrappers_are_removed_from_every_name_with_a_notice(prefix, notice):
    matched = match_weights(checkpoint({prefix + k: v for k, v in saved().items()}), network())
    assert list(matched.weights) == list(saved())
    assert all(torch.equal(matched.weights[k], v) for k, v in saved().items())
    assert matched.notices == notice


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.module.module."])
def test_a_network_with_its_own_attribute_module_keeps_it(prefix):
    state = {f"{prefix}module.{k}": v for k, v in saved().items()}
    matched = match_weights(checkpoint(state), Wrapped())
    assert all(torch.equal(matched.weights[f"module.{k}"], v) for k, v in saved().items())


def test_compiled_submodules_match_plain_names_and_back():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = network()
        compiled[0] = torch.compile(compiled[0])
    assert "0._orig_mod.weight" in compiled.state_dict()
    plain_to_compiled = match_weights(checkpoint(saved()), compiled).weights
    assert torch.equal(plain_to_compiled["0._orig_mod.weight"], saved()["0.weight"])
    assert list(plain_to_compiled) == list(compiled.state_dict())
    back = match_weights(checkpoint(plain_to_compiled), network()).weights
    assert torch.equal(back["0.weight"], saved()["0.weight"])


def test_a_prefix_on_some_names_only_is_not_removed():
    state = saved()
    state["module.0.weight"] = state.pop("0.weight")
    with pytest.raises(CheckpointError, match=r"missing in the file \(1\): 0\.weight"):
        match_weights(checkpoint(state), network())


def test_what_does_not_fit_is_listed_with_counts_and_the_nearest_name():
    state = saved()
    state["2.wieght"] = state.pop("2.weight")
    state["0.bias"] = torch.ones(7)
    with pytest.raises(CheckpointError) as caught:
        match_weights(checkpoint(state), network())
    for part in (
        "missing in the file (1): 2.weight",
        "unknown to the model (1): 2.wieght",
        "another shape (1): 0.bias (file 7, model 4)",
        "the model's 2.weight may be 2.wieght in the file",
    ):
        assert part in str(caught.value)


def test_long_lists_are_cut():
    state = saved() | {f"x{i}": torch.ones(1) for i in range(40)}
    with pytest.raises(CheckpointError, match=r"unknown to the model \(40\).* x11, …"):
        match_weights(checkpoint(state), network())


def test_a_missing_batch_counter_is_the_models_own():
    state = saved()
    del state["1.num_batches_tracked"]
    assert match_weights(checkpoint(state), network()).weights["1.num_batches_tracked"] == 0


@pytest.mark.parametrize("present", ["embed.weight", "head.weight"])
def test_a_tied_tensor_may_be_there_under_one_name_only(present):
    value = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    matched = match_weights(checkpoint({present: value}), Tied())
    assert list(matched.weights) == ["embed.weight", "head.weight"]
    assert all(torch.equal(tensor, value) for tensor in matched.weights.values())


def test_tied_names_with_different_values_are_refused():
    state = {"embed.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)}
    with pytest.raises(CheckpointError, match=r"different values.*untie"):
        match_weights(checkpoint(state), Tied())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_named(bad):
    state = saved()
    state["2.bias"][1] = bad
    with pytest.raises(CheckpointError, match=r"NaN or infinity .*2\.bias \(1 of 2\)"):
        match_weights(checkpoint(state), network())


def test_an_attention_mask_of_minus_infinity_is_no_broken_weight():
    model = nn.Linear(2, 2)
    mask = torch.full((3, 3), float("-inf")).triu(1)
    model.register_buffer("mask", mask)
    state = model.state_dict()
    assert torch.equal(match_weights(checkpoint(state), model).weights["mask"], mask)
    with pytest.raises(CheckpointError, match="mask"):
        match_weights(checkpoint({**state, "mask": mask.T}), model)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to(torch.complex64),
        lambda t: t.int(),
        lambda t: t.to_sparse(),
    ],
    ids=["complex", "integer", "sparse"],
)
def test_tensors_of_another_kind_are_refused(change):
    state = saved()
    state["0.weight"] = change(state["0.weight"])
    with pytest.raises(
        CheckpointError, match=r"another kind .*0\.weight \(file \w+.*, model float"
    ):
        match_weights(checkpoint(state), network())


def test_narrow_floats_are_taken_as_they_are():
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in saved().items()}
    assert match_weights(checkpoint(state), network()).weights["0.weight"].dtype == torch.bfloat16


def test_the_model_is_not_changed():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    match_weights(checkpoint({f"module.{k}": v for k, v in saved().items()}), model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_packed_numbers_are_another_kind_than_the_models():
    model = nn.Linear(2, 1)
    packed = torch.zeros(1, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    stored = {"weight": packed, "bias": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"another kind .*weight \(file float4_e2m1fn_x2"):
        match_weights(Checkpoint(Path("m.safetensors"), "safetensors", stored), model)
