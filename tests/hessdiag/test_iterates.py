from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hessdiag.errors import CheckpointError, InputError, OptionError, UnsafeCheckpoint
from hessdiag.iterates import digest, find_iterates


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def weights(value):
    return {name: torch.full_like(t, value) for name, t in network().state_dict().items()}


@pytest.fixture
def folder(tmp_path):
    for step in (100, 20, 3):
        torch.save({"model": weights(step), "step": step}, tmp_path / f"it-{step}.pt")
    return tmp_path


def test_iterates_come_by_their_steps_not_by_their_names(folder):
    found = find_iterates(f"{folder}/*.pt")
    assert [iterate.step for iterate in found] == [3, 20, 100]
    assert [iterate.path.name for iterate in found] == ["it-3.pt", "it-20.pt", "it-100.pt"]


def test_the_step_in_the_file_goes_before_the_number_in_the_name(tmp_path):
    torch.save({"model": weights(1.0), "step": 7}, tmp_path / "step-000900.pt")
    torch.save({"model": weights(1.0), "global_step": 8}, tmp_path / "step-000100.pt")
    assert [i.step for i in find_iterates(f"{tmp_path}/*")] == [7, 8]


def test_without_a_step_the_last_number_of_the_name_counts_and_a_word_goes_before(tmp_path):
    for name in ("net2-epoch-10.pt", "net2-epoch-9.pt", "step-11-seed-0.pt"):
        torch.save(weights(1.0), tmp_path / name)
    assert [i.step for i in find_iterates(f"{tmp_path}/*.pt")] == [9, 10, 11]


def test_every_format_of_checkpoints_will_do(tmp_path):
    torch.save(weights(1.0), tmp_path / "a1.pt")
    torch.save(weights(2.0), tmp_path / "a2.pth", _use_new_zipfile_serialization=False)
    save_file(weights(3.0), tmp_path / "a3.safetensors")
    wrapped = {f"module.{name}": t for name, t in weights(4.0).items()}
    torch.save({"state_dict": wrapped}, tmp_path / "a4.ckpt")
    model = network()
    values = [i.load(model)["0.bias"] for i in find_iterates(f"{tmp_path}/*")]
    assert [float(v[0]) for v in values] == [1.0, 2.0, 3.0, 4.0]


def test_parameters_come_under_first_names_in_the_type_of_the_model(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).double()
    model[2].weight = model[0].weight
    torch.save(model.float().state_dict(), tmp_path / "1.pt")
    before = {name: t.clone() for name, t in model.double().state_dict().items()}
    loaded = find_iterates(f"{tmp_path}/1.pt")[0].load(model)
    assert list(loaded) == [name for name, _ in model.named_parameters()]
    assert "2.weight" not in loaded
    assert "1.running_mean" not in loaded
    assert {t.dtype for t in loaded.values()} == {torch.float64}
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_file_is_read_when_it_is_asked_for(folder):
    found = find_iterates(f"{folder}/*.pt")
    found[0].path.unlink()
    assert float(found[1].load(network())["0.bias"][0]) == 20
    with pytest.raises(CheckpointError, match=r"it-3\.pt does not exist"):
        found[0].load(network())


ODD = {
    "missing in the file \\(2\\): 2.weight, 2.bias": lambda w: [w.pop("2.weight"), w.pop("2.bias")],
    "unknown to the model \\(1\\): extra": lambda w: w.update(extra=torch.ones(1)),
    "of another shape \\(1\\): 0.weight \\(file 5×2, model 3×2\\)": lambda w: w.update(
        {"0.weight": torch.ones(5, 2)}
    ),
    "NaN or infinity \\(1 tensors\\): 2.bias": lambda w: w["2.bias"].fill_(float("nan")),
}


@pytest.mark.parametrize("told", ODD)
def test_another_architecture_is_refused_by_file_and_tensor(told, folder):
    odd = weights(1.0)
    ODD[told](odd)
    torch.save(odd, folder / "odd-50.pt")
    with pytest.raises(InputError, match=rf"(?s)odd-50\.pt.*{told}"):
        find_iterates(f"{folder}/*.pt", network())
    found = find_iterates(f"{folder}/*.pt")
    with pytest.raises(InputError, match=rf"(?s)odd-50\.pt.*{told}"):
        [iterate.load(network()) for iterate in found]


def test_no_match_a_folder_and_a_bad_pattern_are_refused_with_a_remedy(folder, monkeypatch):
    with pytest.raises(OptionError, match=r"no file matches --iterates '.*none-\*\.pt'.*quotes"):
        find_iterates(f"{folder}/none-*.pt")
    with pytest.raises(OptionError, match=r"is a folder; .*\*\.pt"):
        find_iterates(str(folder))
    with pytest.raises(OptionError, match=r"no pattern|no file"):
        find_iterates("a\0b*")


def test_an_order_that_cannot_be_told_is_refused(tmp_path):
    torch.save(weights(1.0), tmp_path / "final.pt")
    with pytest.raises(OptionError, match=r"final\.pt holds no step and has no number"):
        find_iterates(f"{tmp_path}/*.pt")
    torch.save({"model": weights(1.0), "step": 5}, tmp_path / "final.pt")
    torch.save(weights(2.0), tmp_path / "run-5.pt")
    with pytest.raises(OptionError, match=r"final\.pt and .*run-5\.pt are both of step 5"):
        find_iterates(f"{tmp_path}/*.pt")


def test_one_checkpoint_under_two_names_counts_once(folder):
    torch.save({"model": weights(100), "step": 100}, folder / "model.pt")
    assert [i.step for i in find_iterates(f"{folder}/*.pt")] == [3, 20, 100]


def test_a_path_with_brackets_is_meant_as_it_is(tmp_path):
    torch.save(weights(1.0), tmp_path / "step[1].pt")
    assert find_iterates(f"{tmp_path}/step[1].pt")[0].step == 1


def test_no_iterate_runs_code_unless_it_is_trusted(tmp_path):
    torch.save(network(), tmp_path / "module-1.pt")
    with pytest.raises(UnsafeCheckpoint, match="module-1"):
        find_iterates(f"{tmp_path}/*.pt")
    (found,) = find_iterates(f"{tmp_path}/*.pt", trust=True)
    assert set(found.load(network())) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    with pytest.raises(UnsafeCheckpoint, match="module-1"):
        replace(found, trust=False).load(network())


def test_the_digest_tells_tensors_steps_and_order_apart(folder):
    first = find_iterates(f"{folder}/*.pt")
    assert digest(first) == digest(find_iterates(f"{folder}/it-*"))
    assert len({digest(first), digest(first[:2]), digest(first[::-1])}) == 3
    torch.save({"model": weights(20), "step": 21}, folder / "it-20.pt")
    moved = digest(find_iterates(f"{folder}/*.pt"))
    other = weights(20)
    other["2.bias"] += 1e-6
    torch.save({"model": other, "step": 20}, folder / "it-20.pt")
    assert len({digest(first), moved, digest(find_iterates(f"{folder}/*.pt"))}) == 3


def test_the_folder_may_be_renamed_without_changing_the_digest(folder, tmp_path):
    before = digest(find_iterates(f"{folder}/*.pt"))
    for path in list(folder.glob("*.pt")):
        path.rename(path.with_name(f"renamed-{path.name}"))
    assert digest(find_iterates(f"{folder}/*.pt")) == before
