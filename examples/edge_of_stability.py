"""The edge of stability, measured: how close training stays to the largest stable curvature.

Full-batch gradient descent with learning rate a is stable on a quadratic while
``a λ_max(H) / 2 < 1``; Adam with momentum β1 and diagonal M while
``a λ_max(MH) (1 - β1) / (2 (1 + β1)) < 1``: at β1 = 0.9, ``a λ_max(MH) / 38``. Training drives
both ratios up to 1 and keeps them there (Cohen et al. 2021, 2022), where loss still falls.

Run it: ``python examples/edge_of_stability.py`` (a minute or two).
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import hessdiag

EVERY = 250
EARLY = 1000
"""Snapshots up to this step are on the way to the edge, and not in the medians."""

BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Setting:
    """An optimizer and how its stability limit is read off λ_max."""

    name: str
    variant: str
    limit: float
    rate: float
    steps: int

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer that trains ``model``."""
        if self.name == "Adam":
            return torch.optim.Adam(model.parameters(), lr=self.rate, betas=BETAS)
        return torch.optim.SGD(model.parameters(), lr=self.rate)


MOMENTUM = 2 * (1 + BETAS[0]) / (1 - BETAS[0])
SETTINGS = (
    Setting("Adam", "optimizer", MOMENTUM, 1e-3, 5000),
    Setting("Adam", "optimizer", MOMENTUM, 3e-3, 5000),
    Setting("GD", "raw", 2.0, 0.3, 5000),
    Setting("GD", "raw", 2.0, 0.4, 5000),
    Setting("GD", "raw", 2.0, 0.5, 5000),
)


@dataclass(frozen=True)
class Snapshot:
    """λ_max times the learning rate over the stability limit, and the loss, at one step."""

    step: int
    ratio: float
    loss: float


def network() -> nn.Module:
    """Tanh 1-20-20-1, always the same."""
    torch.manual_seed(0)
    layers = (nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    return nn.Sequential(*layers).double()


def half_squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the mean square error."""
    inputs, targets = batch
    return (model(inputs) - targets).square().mean() / 2


def measure(setting: Setting, directory: Path, steps: int | None = None) -> list[Snapshot]:
    """Train, record every 250 steps, and ask hessdiag for λ_max at each recorded checkpoint."""
    inputs = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    batch = (inputs, torch.sin(3 * math.pi * inputs))
    model = network()
    optimizer = setting.optimizer(model)
    with hessdiag.Recorder(model, optimizer, directory, every=EVERY) as recorder:
        for _ in range(steps or setting.steps):
            optimizer.zero_grad()
            half_squares(model, batch).backward()
            optimizer.step()

    task = hessdiag.Task(network(), [batch], half_squares, optimizer=setting.optimizer)
    found = []
    for path in recorder.written:
        run = hessdiag.analyze(task, checkpoint=path, blocks="whole", variants=setting.variant)
        result = run["whole"].variants[setting.variant]
        step = run.provenance.config["step"]
        ratio = setting.rate * result["lambda_max"].value / setting.limit
        found.append(Snapshot(step, ratio, result["loss"]))
    return found


def late_median(snapshots: list[Snapshot]) -> float:
    """Of the ratios after step 1000."""
    return statistics.median(s.ratio for s in snapshots if s.step > EARLY)


def row(setting: Setting, snapshots: list[Snapshot]) -> str:
    """A line of the table."""
    late = [s.ratio for s in snapshots if s.step > EARLY]
    return (
        f"{setting.name:<6}{setting.rate:>9g}{snapshots[0].ratio:>11.3f}"
        f"{late_median(snapshots):>9.3f}{min(late):>9.3f}{max(late):>9.3f}"
        f"{snapshots[-1].loss:>12.2e}"
    )


def main(show: Callable[[str], None] = print) -> None:
    """Print the table of all settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="fewer steps than 5000 per setting")
    steps = parser.parse_args().steps
    if steps is not None and steps < EARLY + EVERY:
        parser.error(f"--steps {steps}: a setting takes at least {EARLY + EVERY} steps")
    show(f"{'':<15}{f'step {EVERY}':>11}{f'median, minimum, maximum after {EARLY}':>38}")
    show(f"{'':<6}{'rate a':>9}{'ratio':>11}{'median':>9}{'min':>9}{'max':>9}{'last loss':>12}")
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as directory:
            show(row(setting, measure(setting, Path(directory), steps)))


if __name__ == "__main__":
    main()
