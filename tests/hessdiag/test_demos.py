"""The demos: real data, the same weights every time, and files that are whole or not there."""

import errno
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from hessdiag.demos import DEMOS, demo_task, digits, train
from hessdiag.demos import files as demo_files
from hessdiag.errors import OptionError, OutOfResources, StoreError, TaskError
from hessdiag.task import as_loss, units

SIZES = {"mlp": 2410, "convnet": 868, "transformer": 842}
QUICK = 40


def load(path):
    return torch.load(path, weights_only=True)


def at(name, checkpoint):
    """The task in eval mode at a checkpoint's weights."""
    task = demo_task(name)
    task.model.load_state_dict(checkpoint["model"])
    task.model.eval()
    return task


def gradient(task):
    (batch,) = task.data
    parameters = dict(task.model.named_parameters())
    found = torch.autograd.grad(as_loss(task)(task.model, batch), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Every demo after a few steps."""
    place = tmp_path_factory.mktemp("quick")
    return {name: train(name, place / name, steps=QUICK) for name in DEMOS}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return train("mlp", tmp_path_factory.mktemp("full"))


def test_the_digits_are_those_of_scikit_learn():
    images, labels = digits()
    theirs = load_digits()
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(16 * images.double(), torch.from_numpy(theirs.images))
    assert torch.equal(labels, torch.from_numpy(theirs.target).long())


def test_digits_are_fresh_tensors_at_every_call():
    digits()[0].zero_()
    assert digits()[0].max() == 1


def test_the_attribution_names_authors_source_and_licence():
    text = (Path(demo_files.__file__).parent / "DIGITS-ATTRIBUTION.md").read_text()
    for said in ("Alpaydin", "Kaynak", "1998", "10.24432/C50P49", "CC BY 4.0", "What was changed"):
        assert said in text


@pytest.mark.parametrize("name", DEMOS)
def test_a_task_counts_all_digits_and_can_be_read_again(name):
    task = DEMOS[name]()
    assert task.name == f"demo:{name}"
    assert task.mode == "eval"
    for _ in range(2):
        assert sum(units(task)(batch) for batch in task.data) == 1797
    assert sum(p.numel() for p in task.model.parameters()) == SIZES[name]
    groups = task.optimizer(task.model).state_dict()["param_groups"]
    assert groups[0]["param_names"] == [n for n, _ in task.model.named_parameters()]


def test_the_networks_hold_what_the_demos_are_for():
    kinds = {name: [type(m) for m in DEMOS[name]().model.modules()] for name in DEMOS}
    assert kinds["convnet"].count(nn.BatchNorm2d) == 2
    assert nn.LayerNorm in kinds["transformer"]
    assert nn.MultiheadAttention in kinds["transformer"]
    assert "position" in dict(DEMOS["transformer"]().model.named_parameters(recurse=False))
    assert sum(p.numel() for p in DEMOS["mlp"]().model.get_submodule("0").parameters()) == 2080


def test_three_pixels_without_ink_make_96_inactive_weights(full):
    slope = gradient(at("mlp", load(full.path)))["0.weight"]
    assert int((slope == 0).all(dim=0).sum()) * slope.shape[0] == 96


@pytest.mark.parametrize("name", DEMOS)
def test_first_weights_are_the_same_whatever_the_global_seed_which_stays(name):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        states.append(DEMOS[name]().model.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(("asked", "hint"), [("mpl", "mlp"), ("Transfomer", "transformer")])
def test_an_unknown_demo_is_refused_with_the_nearest_name(asked, hint, tmp_path):
    with pytest.raises(TaskError, match=f"no demo called '{asked}'; did you mean {hint}?"):
        train(asked, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_name_like_no_demo_lists_them_all():
    with pytest.raises(TaskError, match="'zzz'; The built-in demos are mlp, convnet, transformer"):
        demo_task("zzz")


def test_the_full_training_ends_near_an_optimum_that_it_reports_rightly(full):
    task = at("mlp", load(full.path))
    ((inputs, labels),) = task.data
    right = (task.model(inputs).argmax(dim=1) == labels).double().mean().item()
    assert full.accuracy == right > 0.97
    loss = as_loss(task)(task.model, (inputs, labels)).item()
    assert full.loss == pytest.approx(loss, rel=1e-5)
    assert 1e-3 < loss < 0.05
    assert (full.steps, full.parameters, full.task) == (1000, 2410, "demo:mlp")


@pytest.mark.parametrize("name", DEMOS)
def test_the_reported_score_is_that_of_eval_mode(name, quick):
    task = at(name, load(quick[name].path))
    ((inputs, labels),) = task.data
    assert quick[name].loss == pytest.approx(as_loss(task)(task.model, (inputs, labels)).item())
    assert quick[name].accuracy == (task.model(inputs).argmax(1) == labels).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnet", "transformer"])
def test_the_other_demos_train_to_as_good_an_optimum(name, tmp_path):
    trained = train(name, tmp_path)
    assert trained.accuracy > 0.97
    assert 1e-3 < trained.loss < 0.05


@pytest.mark.parametrize("name", DEMOS)
def test_a_checkpoint_is_a_plain_training_dict_that_fits_its_task(name, quick):
    content = load(quick[name].path)
    assert set(content) == {"model", "optimizer", "step", "hessdiag"}
    assert content["step"] == QUICK
    assert content["hessdiag"] == {"task": f"demo:{name}"}
    task = at(name, content)
    optimizer = task.optimizer(task.model)
    optimizer.load_state_dict(content["optimizer"])
    assert optimizer.state_dict()["param_groups"][0]["param_names"]
    for parameter in task.model.parameters():
        assert optimizer.state[parameter]["exp_avg_sq"].shape == parameter.shape
        assert optimizer.state[parameter]["step"] == QUICK


@pytest.mark.parametrize("name", DEMOS)
def test_ten_iterates_are_evenly_spaced_differ_and_end_at_the_final_weights(name, quick):
    trained = quick[name]
    folder = trained.path.parent / "iterates"
    assert list(trained.iterates) == sorted(folder.iterdir())
    assert [path.name for path in trained.iterates] == [
        f"step-{step:06d}.pt" for step in range(4, QUICK + 1, 4)
    ]
    iterates = [load(path) for path in trained.iterates]
    assert [content["step"] for content in iterates] == list(range(4, QUICK + 1, 4))
    assert trained.iterates[-1].read_bytes() == trained.path.read_bytes()
    vectors = [
        nn.utils.parameters_to_vector(at(name, content).model.parameters()) for content in iterates
    ]
    distances = [(vector - vectors[-1]).norm().item() for vector in vectors]
    assert distances[-1] == 0
    assert all(early > late for early, late in pairwise(distances))


@pytest.mark.parametrize("name", DEMOS)
def test_another_run_writes_the_same_bytes_whatever_seed_and_threads(name, quick, tmp_path):
    torch.manual_seed(99)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = torch.get_rng_state()
        with torch.no_grad():
            again = train(name, tmp_path, steps=QUICK)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    first = quick[name]
    for one, other in zip(
        (first.path, *first.iterates), (again.path, *again.iterates), strict=True
    ):
        assert one.read_bytes() == other.read_bytes()


def test_running_statistics_are_those_of_the_digits_at_the_final_weights(tmp_path):
    trained = train("convnet", tmp_path, steps=200)
    task = at("convnet", load(trained.path))
    seen = {}
    for name in ("bn1", "bn2"):
        layer = task.model.get_submodule(name)
        layer.register_forward_hook(lambda _, x, __, name=name: seen.update({name: x[0]}))
    with torch.no_grad():
        task.model(next(iter(task.data))[0])
    for name, inputs in seen.items():
        layer = task.model.get_submodule(name)
        spread = inputs.var(dim=(0, 2, 3)).sqrt()
        # A tenth of a standard deviation: twice the scatter of means over 100 digits.
        assert ((layer.running_mean - inputs.mean(dim=(0, 2, 3))).abs() < 0.1 * spread).all()
        assert ((layer.running_var.sqrt() / spread - 1).abs() < 0.1).all()


def test_progress_hears_of_every_step_and_of_one_thread(tmp_path):
    heard = []
    train(
        "mlp", tmp_path, steps=12, progress=lambda *at: heard.append((*at, torch.get_num_threads()))
    )
    assert heard == [(step, 12, 1) for step in range(1, 13)]


def test_fewer_steps_than_iterates_are_refused(tmp_path):
    with pytest.raises(OptionError, match="steps is 9"):
        train("mlp", tmp_path, steps=9)


@pytest.mark.parametrize("kept", ["model.pt", "iterates/step-000300.pt"])
def test_a_checkpoint_that_is_there_stays_unless_forced(kept, tmp_path):
    (tmp_path / "iterates").mkdir()
    (tmp_path / kept).write_bytes(b"mine")
    with pytest.raises(StoreError, match=rf"{kept} would be overwritten; pass --force"):
        train("mlp", tmp_path, steps=10)
    assert (tmp_path / kept).read_bytes() == b"mine"
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_force_replaces_all_iterates_of_the_earlier_demo_and_nothing_else(tmp_path):
    train("mlp", tmp_path, steps=20)
    (tmp_path / "iterates" / "notes.txt").write_text("mine")
    trained = train("convnet", tmp_path, steps=10, force=True)
    assert load(trained.path)["hessdiag"] == {"task": "demo:convnet"}
    found = {path.name for path in (tmp_path / "iterates").iterdir()}
    assert found == {path.name for path in trained.iterates} | {"notes.txt"}


def test_a_directory_that_cannot_be_made_is_refused_before_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    heard = []
    with pytest.raises(StoreError, match=r"cannot write to .*file"):
        train("mlp", tmp_path / "file", steps=10, progress=lambda *at: heard.append(at))
    assert not heard


def test_a_write_that_fails_leaves_the_earlier_demo_and_no_debris(tmp_path, monkeypatch):
    before = train("mlp", tmp_path, steps=10).path.read_bytes()

    def full_disk(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutOfResources, match="is full"):
        train("convnet", tmp_path, steps=10, force=True)
    assert (tmp_path / "model.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))
