"""Networks whose blocks are too large to assemble: time per layer, and whether intervals hold.

Run with ``make bench-large`` on an idle machine. Each network is analysed per layer as a user
would, then each block's ends are compared with a long Lanczos run of their own, and its trace
with many more probes. Prints one JSON row per network.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from networks import resnet20, transformer

from hessdiag import Task, analyze
from hessdiag.blocks import WHOLE, find_blocks
from hessdiag.curvature.engines import make_engine
from hessdiag.curvature.loan import exact_arithmetic, loan
from hessdiag.curvature.objective import Objective
from hessdiag.data import load_batches
from hessdiag.names import named_parameters
from hessdiag.task import as_loss, units
from hessdiag_probes import generator, hutchinson, lanczos, sphere

REFERENCE_STEPS, REFERENCE_PROBES = 160, 120


def references(task: Task, names: list[str]) -> dict[str, dict[str, float]]:
    """Ends by long Lanczos runs and traces by many probes, seeds and code path of their own."""
    found = {}
    blocks = find_blocks(task.model, ("layer",))
    with (
        loan([task.model], mode="eval", dtype=torch.float64, device=torch.device("cpu")),
        exact_arithmetic([task.model], torch.float64),
    ):
        batches = load_batches(
            task.data, units(task), dtype=torch.float64, device=torch.device("cpu")
        )
        objective = Objective(task.model, as_loss(task), batches)
        named = dict(named_parameters(task.model))
        for block in blocks:
            if block.name not in names or block.skipped is not None:
                continue
            parameters = [named[name] for name in block.parameters]
            engine = make_engine(objective, parameters, curvature="hessian")
            start = sphere(block.size, generator=generator(99, block.name))
            run = lanczos(engine, start, min(REFERENCE_STEPS, block.size))
            ritz = run.ritz()
            probes = hutchinson(
                engine,
                block.size,
                REFERENCE_PROBES,
                generator=generator(98, block.name),
                deflate=run,
            )
            found[block.name] = {
                "lambda_max": float(ritz.value[-1]),
                "lambda_min": float(ritz.value[0]),
                "trace": probes.trace.value,
                "trace_error": probes.trace.stderr,
                "frobenius": probes.frobenius.value,
            }
    return found


def judge(row: Any, reference: dict[str, float]) -> dict[str, bool]:
    """Whether each interval is consistent with the reference, up to the reference's own error."""
    slack = 1e-8 * max(abs(reference["lambda_max"]), abs(reference["lambda_min"]))
    held = {}
    for name, error in (
        ("lambda_max", slack),
        ("lambda_min", slack),
        ("trace", 3 * reference["trace_error"]),
        ("frobenius", 0.05 * reference["frobenius"]),
    ):
        quantity = row[name]
        held[name] = quantity.low - error <= reference[name] <= quantity.high + error
    return held


def main() -> None:
    wanted = sys.argv[1:] or ["resnet20", "transformer"]
    for name, make in (("resnet20", resnet20), ("transformer", transformer)):
        if name not in wanted:
            continue
        task = make()
        size = sum(p.numel() for p in task.model.parameters())
        started = time.perf_counter()
        run = analyze(task, exact_limit=100)
        seconds = time.perf_counter() - started
        print(run, file=sys.stderr)
        rows = {block.name: block.variants["raw"] for block in run.blocks}
        free = [n for n, row in rows.items() if row["method"] == "lanczos"]
        checked = [n for n in free if n != WHOLE][:: max(len(free) // 6, 1)]
        held = {n: judge(rows[n], r) for n, r in references(task, checked).items()}
        print(
            json.dumps(
                {
                    "case": name,
                    "parameters": size,
                    "blocks": len(rows),
                    "matrix_free": len(free),
                    "minutes": round(seconds / 60, 2),
                    "products": sum(row["products"] for row in rows.values()),
                    "held": held,
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                }
            )
        )


if __name__ == "__main__":
    main()
