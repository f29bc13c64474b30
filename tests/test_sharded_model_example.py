from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

EXAMPLE = Path(__file__).parents[1] / "examples" / "sharded_model.py"
NUMBER = r"(-?[0-9.]+(?:e-?[0-9]+)?)"


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
def test_a_layer_of_a_model_that_fsdp2_shards_over_two_processes_has_its_true_curvature():
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLE)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    match = re.search(f"value={NUMBER}, low={NUMBER}, high={NUMBER}", found.stdout)
    assert match, found.stdout
    value, low, high = map(float, match.groups())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model.double()
    inputs, labels = torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 3, (30,))
    chosen = [model[2].weight, model[2].bias]
    loss = nn.functional.cross_entropy(model(inputs), labels)
    slope = torch.autograd.grad(loss, chosen, create_graph=True)
    rows = [
        torch.cat([p.reshape(-1) for p in torch.autograd.grad(entry, chosen, retain_graph=True)])
        for part in slope
        for entry in part.reshape(-1)
    ]
    truth = float(torch.linalg.eigvalsh(torch.stack(rows))[-1])
    assert low <= truth <= high
    assert abs(value - truth) <= 1e-10 * truth
