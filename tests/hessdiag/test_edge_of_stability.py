"""The shipped example reaches the edge of stability, and its curvature is a dense Hessian's."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
FILE = Path(__file__).parents[2] / "examples" / "edge_of_stability.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("edge_of_stability", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("rate", [1e-3, 3e-3])
def test_adam_stays_at_38_over_its_learning_rate(rate, example, tmp_path):
    (setting,) = (s for s in example.SETTINGS if (s.name, s.rate) == ("Adam", rate))
    assert setting.limit == pytest.approx(38)
    snapshots = example.measure(setting, tmp_path)
    assert 0.9 < example.late_median(snapshots) < 1.05


@pytest.mark.parametrize("rate", [0.3, 0.4, 0.5])
def test_gradient_descent_stays_at_two_over_its_learning_rate(rate, example, tmp_path):
    (setting,) = (s for s in example.SETTINGS if (s.name, s.rate) == ("GD", rate))
    assert setting.limit == 2
    snapshots = example.measure(setting, tmp_path, 3000)
    assert 0.9 < example.late_median(snapshots) < 1.1


def test_the_ratio_is_that_of_a_dense_hessian_and_torchs_own_step(example, tmp_path):
    setting = example.SETTINGS[1]
    (snapshot,) = example.measure(setting, tmp_path, 250)
    stored = torch.load(tmp_path / "step-000250.pt", weights_only=True)
    model = example.network()
    model.load_state_dict(stored["model"])
    inputs = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    targets = torch.sin(3 * math.pi * inputs)
    parameters = list(model.parameters())
    loss = (model(inputs) - targets).square().mean() / 2
    slope = torch.autograd.grad(loss, parameters, create_graph=True)
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(s, parameters, retain_graph=True)])
        for g in slope
        for s in g.reshape(-1)
    ]
    state = stored["optimizer"]["state"].values()
    second = torch.cat([held["exp_avg_sq"].reshape(-1) for held in state])
    scale = ((second / (1 - 0.99**250)).sqrt() + 1e-8).rsqrt()
    top = torch.linalg.eigvalsh(scale[:, None] * torch.stack(rows) * scale)[-1]
    assert snapshot.ratio == pytest.approx(float(top) * setting.rate / 38, rel=1e-9)
    assert snapshot.loss == pytest.approx(loss.item(), rel=1e-12)
