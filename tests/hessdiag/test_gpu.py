"""The same numbers on a CUDA device; skipped without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.variants.grammar import COORDINATES

pytestmark = pytest.mark.gpu


def make_task(mode: str = "eval") -> hessdiag.Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    y = torch.randint(0, 3, (40,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    return hessdiag.Task(
        model, [(x[:30], y[:30]), (x[30:], y[30:])], nn.CrossEntropyLoss(), mode=mode
    )


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_exact_spectra_agree_with_the_cpu(mode, curvature):
    there = hessdiag.analyze(make_task(mode), device="cuda", curvature=curvature)
    here = hessdiag.analyze(make_task(mode), device="cpu", curvature=curvature)
    for block in here.blocks:
        want = block.variants["raw"].spectrum["eigenvalue"]
        got = there[block.name].variants["raw"].spectrum["eigenvalue"]
        assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()


@pytest.mark.parametrize("network", ["", "bn", "bn-detached", "ln", "without-bn"])
def test_every_variant_agrees_with_the_cpu(network):
    names = [name for name in COORDINATES if name not in {"raw", "optimizer"}]
    chosen = [network or "raw", *(f"{network}+{name}".removeprefix("+") for name in names)]
    there = hessdiag.analyze(make_task(), device="cuda", variants=chosen)
    here = hessdiag.analyze(make_task(), device="cpu", variants=chosen)
    for block in here.blocks:
        for name, known in block.variants.items():
            found = there[block.name].variants[name]
            assert found["skipped"] == known["skipped"]
            if known["skipped"] is None:
                want, got = (r.spectrum["eigenvalue"] for r in (known, found))
                assert np.abs(got - want).max() <= 1e-7 * np.abs(want).max(), (block.name, name)


@pytest.mark.parametrize("eigensolver", ["lanczos", "power"])
def test_intervals_from_products_hold_on_the_device(eigensolver):
    options = {"exact_limit": 0, "eigensolver": eigensolver, "density": True}
    there = hessdiag.analyze(make_task(), device="cuda", **options)
    here = hessdiag.analyze(make_task(), device="cpu")
    for block in here.blocks:
        for name in ("lambda_max", "lambda_min", "trace", "frobenius"):
            truth = block.variants["raw"][name].value
            found = there[block.name].variants["raw"][name]
            assert found.status == "interval"
            slack = 0.5 * (found.high - found.low) if found.confidence < 0.99 else 0.0
            assert found.low - slack <= truth + 1e-12
            assert truth - 1e-12 <= found.high + slack


def test_a_recurrent_network_has_double_backward_on_the_device():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    x, y = torch.randn(10, 5, 3), torch.randint(0, 2, (10,))
    run = hessdiag.analyze(
        hessdiag.Task(Recurrent(), [(x, y)], nn.CrossEntropyLoss()), device="cpu"
    )
    assert run.provenance.environment["switches"]["cudnn_rnn"] == "off"
    assert run["whole"].variants["raw"]["kappa"].status in ("exact", "lower-bound")


def test_a_model_on_the_device_stays_there():
    task = make_task()
    task.model.to("cuda")
    before = [p.data_ptr() for p in task.model.parameters()]
    hessdiag.analyze(task, device="cpu")
    assert [p.data_ptr() for p in task.model.parameters()] == before
    assert all(p.is_cuda for p in task.model.parameters())
