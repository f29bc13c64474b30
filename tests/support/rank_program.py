"""What one of several ranks does in the tests; it leaves what it found in a file.

Importing torch takes seconds, so that one start serves many tests.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import sample_networks
from hessdiag import Task, analyze
from hessdiag.curvature.engines import BUILD, Kept, Recompute
from hessdiag.curvature.precision import noise_of
from hessdiag.distributed.group import Group
from hessdiag.distributed.launch import joined
from hessdiag.errors import Diverged
from hessdiag.task import units

NETWORKS = ("tanh", "tied transformer", "batchnorm train")
OPTIONS: dict[str, Any] = {"blocks": "layer,whole", "exact_limit": 20, "steps": 8, "probes": 5}


def ragged_task() -> Task:
    """Batches of unequal size: the mean of their means is another loss."""
    source = torch.Generator().manual_seed(0)
    sizes = (7, 1, 3)
    data = [
        (torch.randn(n, 4, generator=source) * (1 + n), torch.randn(n, 2, generator=source))
        for n in sizes
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    return Task(model, data, lambda m, b: (m(b[0]) - b[1]).square().mean())


def probe(size: int) -> torch.Tensor:
    """The vector that products are taken of."""
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def products(group: Group, name: str) -> dict[str, Any]:
    """Of one sample network, all its parameters."""
    case = sample_networks.make(name)
    with sample_networks.lent(case.task) as (alone, named):
        objective = replace(alone, group=group, units=units(case.task))
        parameters = list(named.values())
        vector = probe(sum(p.numel() for p in parameters))
        build = BUILD["hessian"]
        return {
            "product": Recompute(objective, parameters, build)(vector),
            "kept": Kept(objective, parameters, build)(vector),
            "noise": noise_of(objective, parameters, "hessian")(vector),
            "gradient": objective.gradient(parameters),
            "loss": objective.value(),
            "rows": objective.division.rows,
        }


def core(group: Group) -> dict[str, Any]:
    """The least that shows that so many ranks work together."""
    case = sample_networks.make(NETWORKS[0])
    with sample_networks.lent(case.task) as (alone, named):
        objective = replace(alone, group=group, units=units(case.task))
        parameters = list(named.values())
        product = Recompute(objective, parameters, BUILD["hessian"])
        vector = probe(sum(p.numel() for p in parameters))
        return {"product": product(vector), "rows": objective.division.rows}


def raising(group: Group) -> str:
    """The last rank's part fails."""

    def part() -> torch.Tensor:
        if group.rank == group.size - 1:
            raise ValueError("this part is broken")
        return torch.ones(3, dtype=torch.float64)

    try:
        group.summed(part)
    except ValueError as error:
        return str(error)
    return "nothing raised"


def diverging(group: Group) -> None:
    """The last rank multiplies another vector."""
    given = torch.ones(3, dtype=torch.float64)
    if group.rank == group.size - 1:
        given[1] += 1e-3
    group.summed(lambda: given, given)


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    if "CORE" in os.environ:
        with joined("cpu") as group:
            torch.save(core(group), folder / f"{group.rank}.pt")
        return
    if "OWN_GROUP" in os.environ:  # as in a training script, which has one already
        dist.init_process_group("gloo")
    with joined("cpu") as group:
        for name in NETWORKS:
            found[name] = products(group, name)
        long = torch.full((100_000,), float(group.rank + 1), dtype=torch.float64)
        found["long"] = float(group.summed(lambda: long, torch.ones(100_000)).sum())
        found["raised"] = raising(group)
        target = folder / "run.h5"
        run = analyze(ragged_task(), output=target, group=group, **OPTIONS)
        again = analyze(ragged_task(), output=target, group=group, **OPTIONS)
        found["run"], found["again"] = run.to_dict(), again.to_dict()
        found["environment"] = run.provenance.environment
    try:
        with joined("cpu") as group:
            diverging(group)
    except Diverged as error:
        found["diverged"] = str(error)
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
