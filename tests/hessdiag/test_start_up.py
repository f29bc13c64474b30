"""What an analysis brings into the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
from torch import nn
import hessdiag

model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
data = [(torch.randn(8, 3), torch.randn(8, 2))]
task = hessdiag.Task(
    model, data, nn.MSELoss(), optimizer=lambda model: torch.optim.Adam(model.parameters())
)
slots = {
    i: {"step": torch.tensor(1.0), "exp_avg": 0 * p, "exp_avg_sq": 0 * p + 1.0}
    for i, p in enumerate(model.parameters())
}
group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False,
         "params": list(range(4))}
torch.save(
    {"model": model.state_dict(), "optimizer": {"state": slots, "param_groups": [group]}},
    sys.argv[1],
)
run = hessdiag.analyze(task, checkpoint=sys.argv[1])
assert run["whole"].variants["optimizer"]["source"] == "state"
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_an_analysis_does_not_import_torchs_compiler(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
