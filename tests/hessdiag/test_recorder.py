import errno
import os
import random
import re

import numpy as np
import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.errors import OptionError, OutOfResources, StoreError
from hessdiag.iterates import find_iterates
from hessdiag.store import atomic

X = torch.linspace(-1, 1, 12)[:, None]


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)
    )


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True, amsgrad=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def train(model, optimizer, steps):
    def closure():
        optimizer.zero_grad()
        loss = ((model(X) - X.sin()) ** 2).mean()
        loss.backward()
        return loss

    for _ in range(steps):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def everything(model, optimizer):
    """All numbers of a training, as bytes."""
    state = optimizer.state_dict()["state"]
    tensors = {**model.state_dict(), **{f"grad {n}": p.grad for n, p in model.named_parameters()}}
    for index, held in state.items():
        for key, value in held.items():
            listed = value if isinstance(value, list) else [value]
            tensors |= {
                f"{index} {key} {i}": torch.as_tensor(v)
                for i, v in enumerate(listed)
                if v is not None
            }
    found = {name: t.numpy().tobytes() for name, t in tensors.items()}
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: NPY002
    return found, drawn


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_bit_for_bit_the_same(name, tmp_path):
    ends = []
    for recorded in (False, True):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002  the global one is what must stay
        torch.manual_seed(1)
        if recorded:
            with hessdiag.Recorder(model, optimizer, tmp_path, every=7) as recorder:
                train(model, optimizer, 50)
            assert [p.name for p in recorder.written] == [
                f"step-{k:06d}.pt" for k in range(7, 50, 7)
            ]
        else:
            train(model, optimizer, 50)
        ends.append(everything(model, optimizer))
    assert ends[0] == ends[1]


def test_each_file_holds_the_state_after_its_step(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    with hessdiag.Recorder(model, optimizer, tmp_path / "a" / "b", every=5):
        train(model, optimizer, 10)
    end = torch.load(tmp_path / "a" / "b" / "step-000010.pt", weights_only=True)
    assert set(end) == {"model", "optimizer", "step"}
    assert end["step"] == 10
    assert float(end["optimizer"]["state"][0]["step"]) == 10
    assert all(torch.equal(end["model"][name], t) for name, t in model.state_dict().items())
    middle = torch.load(tmp_path / "a" / "b" / "step-000005.pt", weights_only=True)
    again = network()
    torch.manual_seed(3)
    assert not torch.equal(middle["model"]["0.weight"], end["model"]["0.weight"])
    assert not torch.equal(middle["model"]["0.weight"], again.state_dict()["0.weight"])


def test_the_files_are_iterates_and_nothing_else_is_left(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["sgd momentum"](model.parameters())
    with hessdiag.Recorder(model, optimizer, tmp_path, every=3):
        train(model, optimizer, 9)
    found = find_iterates(f"{tmp_path}/*.pt", model)
    assert [iterate.step for iterate in found] == [3, 6, 9]
    assert len(list(tmp_path.iterdir())) == 3
    loaded = found[-1].load(model)
    assert all(torch.equal(loaded[name], p) for name, p in model.named_parameters())


def test_it_records_from_the_start_to_the_end_and_not_after(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    recorder = hessdiag.Recorder(model, optimizer, tmp_path, every=1)
    train(model, optimizer, 2)
    recorder.close()
    recorder.close()
    train(model, optimizer, 2)
    assert (recorder.steps, len(recorder.written)) == (2, 2)
    assert not optimizer._optimizer_step_post_hooks
    with (
        pytest.raises(ZeroDivisionError),
        hessdiag.Recorder(model, optimizer, tmp_path, every=1, start=2),
    ):
        raise ZeroDivisionError
    assert not optimizer._optimizer_step_post_hooks


def test_a_training_goes_on_after_the_files_it_left(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    with hessdiag.Recorder(model, optimizer, tmp_path, every=2):
        train(model, optimizer, 4)
    with hessdiag.Recorder(model, optimizer, tmp_path, every=2, start=4):
        train(model, optimizer, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000002.pt",
        "step-000004.pt",
        "step-000006.pt",
    ]


def test_the_files_of_another_training_are_not_mixed_in(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    (tmp_path / "step-000700.pt").write_bytes(b"theirs")
    with pytest.raises(StoreError, match=r"holds step-000700\.pt.*start="):
        hessdiag.Recorder(model, optimizer, tmp_path, every=100, start=300)
    assert not optimizer._optimizer_step_post_hooks
    hessdiag.Recorder(model, optimizer, tmp_path, every=100, start=700).close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0; it must be a whole number >= 1"),
        ({"every": -3}, "every is -3; it must be a whole number >= 1"),
        ({"every": 1.5}, "every is 1.5; it must be a whole number >= 1"),
        ({"every": True}, "every is True; it must be a whole number >= 1"),
        ({"every": "x"}, "every is 'x'; it must be a whole number >= 1"),
        ({"every": 1, "start": -1}, "start is -1; it must be a whole number >= 0"),
        ({"every": 1, "start": 2.0}, "start is 2.0; it must be a whole number >= 0"),
        ({"every": 1, "start": False}, "start is False; it must be a whole number >= 0"),
        ({"every": 1, "start": None}, "start is None; it must be a whole number >= 0"),
    ],
)
def test_steps_that_make_no_sense_are_refused(options, message, tmp_path):
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        hessdiag.Recorder(model, optimizer, tmp_path / "files", **options)
    assert not optimizer._optimizer_step_post_hooks
    assert not (tmp_path / "files").exists()


def test_what_is_no_network_or_no_optimizer_is_refused(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    for wrong, name in (("m", "str"), (optimizer, "Adam"), (model.state_dict(), "OrderedDict")):
        with pytest.raises(OptionError, match=rf"^model is of class {name}; .*torch\.nn\.Module"):
            hessdiag.Recorder(wrong, optimizer, tmp_path / "files", every=1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for wrong, name in (("o", "str"), (model, "Sequential"), (schedule, "ConstantLR")):
        with pytest.raises(OptionError, match=rf"^optimizer is of class {name}; .*torch\.optim"):
            hessdiag.Recorder(model, wrong, tmp_path / "files", every=1)
    assert not optimizer._optimizer_step_post_hooks
    assert not (tmp_path / "files").exists()


def test_a_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("x")
    model = network()
    with pytest.raises(StoreError, match="taken cannot be used as a folder"):
        hessdiag.Recorder(
            model, OPTIMIZERS["adam"](model.parameters()), tmp_path / "taken", every=1
        )


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, OutOfResources), (errno.EACCES, StoreError)]
)
def test_a_disk_that_refuses_is_told_and_training_is_intact(code, kind, tmp_path, monkeypatch):
    plain = network()
    reference = OPTIMIZERS["adam"](plain.parameters())
    torch.manual_seed(5)
    train(plain, reference, 4)

    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    torch.manual_seed(5)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    with hessdiag.Recorder(model, optimizer, tmp_path, every=2) as recorder:
        train(model, optimizer, 1)
        with monkeypatch.context() as disk:
            disk.setattr(atomic.os, "fsync", refuse)
            with pytest.raises(kind, match=rf"step-000002\.pt .*{os.strerror(code)}.*intact"):
                train(model, optimizer, 1)
        assert list(tmp_path.iterdir()) == []
        train(model, optimizer, 2)
    assert [path.name for path in recorder.written] == ["step-000004.pt"]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with hessdiag.Recorder(model, optimizer, tmp_path / "ranks", every=1) as recorder:
        train(model, optimizer, 2)
    assert recorder.steps == 2
    assert not (tmp_path / "ranks").exists()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with hessdiag.Recorder(model, optimizer, tmp_path / "ranks", every=1):
        train(model, optimizer, 1)
    assert (tmp_path / "ranks" / "step-000001.pt").exists()


def test_wrappers_leave_no_mark_in_the_names(tmp_path):
    inner = network()
    model = nn.DataParallel(inner)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    with hessdiag.Recorder(model, optimizer, tmp_path, every=1):
        train(model, optimizer, 1)
    stored = torch.load(tmp_path / "step-000001.pt", weights_only=True)["model"]
    assert set(stored) == set(inner.state_dict())


def test_steps_that_a_gradient_scaler_skips_do_not_count(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with hessdiag.Recorder(model, optimizer, tmp_path, every=1) as recorder:
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(model(X).square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert recorder.steps == 2
