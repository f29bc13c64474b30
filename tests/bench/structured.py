"""Blocks assembled by structure and by products, side by side in one run.

Prints one JSON row per block: seconds of either assembly, of the dense solve that follows both,
and by how much the matrices differ. With sizes as arguments: whole analyses of one layer of about
so many parameters, which tell how far ``--exact-limit`` reaches.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hessdiag import Task, analyze
from hessdiag.curvature.engines import BUILD, Kept
from hessdiag.curvature.loan import exact_arithmetic, loan
from hessdiag.curvature.objective import Objective
from hessdiag.curvature.structured import make_plan, structured_matrix
from hessdiag.data import load_batches
from hessdiag.demos import DEMOS
from hessdiag.task import as_loss, units
from hessdiag_probes.exact import assemble, eigh

REPEATS = 3


def best(function: Callable[[], Any]) -> tuple[float, Any]:
    """The best of several timings, and the result."""
    seconds, found = [], None
    for _ in range(REPEATS):
        start = time.perf_counter()
        found = function()
        seconds.append(time.perf_counter() - start)
    return min(seconds), found


def side_by_side(name: str, task: Task) -> None:
    """A row for the whole network and for each of its layers that has structure."""
    device = torch.device("cpu")
    model = task.model
    with (
        loan([model], mode="eval", dtype=torch.float64, device=device),
        exact_arithmetic([model], torch.float64),
    ):
        batches = load_batches(task.data, units(task), dtype=torch.float64, device=device)
        objective = Objective(model, as_loss(task), batches)
        blocks = {"whole": list(model.parameters())}
        for label, module in model.named_modules():
            blocks[label] = list(module.parameters(recurse=False))
        for label, parameters in blocks.items():
            plan = make_plan(objective, parameters) if parameters else None
            if plan is None or not plan.worthwhile or len(plan.others):
                continue
            structured, ours = best(
                lambda p=plan: structured_matrix(objective, p, "hessian", step=lambda: None)
            )
            engine = Kept(objective, parameters, BUILD["hessian"])
            start = time.perf_counter()
            theirs = assemble(engine, plan.size).matrix
            products = time.perf_counter() - start
            solve, _ = best(lambda m=ours: eigh(m))
            row = {
                "case": name,
                "block": label,
                "n": plan.size,
                "directions": plan.directions,
                "structured_seconds": structured,
                "products_seconds": products,
                "eigh_seconds": solve,
                "assembly_ratio": products / structured,
                "total_ratio": (products + solve) / (structured + solve),
                "difference": float((ours - theirs).abs().max() / theirs.abs().max()),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
            print(json.dumps(row), flush=True)


def reach(size: int) -> None:
    """A row for a default analysis of one hidden layer of about ``size`` parameters."""
    torch.manual_seed(0)
    width = max(int(size**0.5) // 2, 1)
    model = nn.Sequential(nn.Linear(4 * width - 1, width), nn.Tanh(), nn.Linear(width, 10))
    data = [(torch.randn(1000, 4 * width - 1), torch.randint(10, (1000,)))]
    task = Task(model, data, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    start = time.perf_counter()
    run = analyze(task, variants="raw", blocks="hidden=0.*", exact_limit=1 << 20)
    seconds = time.perf_counter() - start
    block = run.blocks[0].variants["raw"]
    row = {
        "case": "reach",
        "n": block["size"],
        "passes": block["products"],
        "seconds": seconds,
        "status": block["kappa"].status,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    """The demo networks, or the reach for the sizes given."""
    if sys.argv[1:]:
        for size in sys.argv[1:]:
            reach(int(size))
        return
    for name, make in DEMOS.items():
        side_by_side(name, make())


if __name__ == "__main__":
    main()
