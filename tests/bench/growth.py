"""How seconds and peak memory grow with parameters, with examples and with products.

Run by ``make bench``. Each of the three is varied alone, from analyses of a small decoder's
embedding as a user runs them, each in a process of its own, so that one's peak is not another's.
Prints one JSON row per analysis and one per curve, with the slope of the logarithms against each
other, and a table of the slopes: 1 is linear growth, and what does not grow brings it below.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from size import gpt, peak_bytes, task

from hessdiag import analyze

VOCABULARY, WIDTH, DEPTH, LENGTH, HEADS = 4000, 64, 2, 16, 4
EXAMPLES, STEPS, PROBES = 4, 10, 10
CURVES: dict[str, Sequence[int]] = {
    "parameters": (1, 4, 16),
    "examples": (16, 64, 256),
    "products": (40, 80, 160),
}
"""Factors of the vocabulary, sequences, and steps of the Lanczos run."""
ACCEPTED = 1.15  # a slope above it is no linear growth


def measure(curve: str, level: int) -> dict[str, Any]:
    """One analysis in this process."""
    vocabulary = VOCABULARY * (level if curve == "parameters" else 1)
    examples = level if curve == "examples" else EXAMPLES
    model = gpt(vocabulary, WIDTH, DEPTH, LENGTH, HEADS)
    subject = task(model, vocabulary, LENGTH, examples)
    _warm_up()
    before = peak_bytes()
    started = time.perf_counter()
    used = time.process_time()
    run = analyze(
        subject,
        variants="raw",
        blocks=("embed",),
        steps=level if curve == "products" else STEPS,
        probes=PROBES,
        tolerance=0.0,
        engine="kept",
        dtype="float64",
    )
    row = run.blocks[0].variants["raw"]
    return {
        "curve": curve,
        "level": level,
        "parameters": sum(p.numel() for p in model.parameters()),
        "examples": examples,
        "products": row["products"],
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "block_seconds": row["seconds"],
        "peak_mib": (peak_bytes() - before) / 2**20,
        "skipped": row["skipped"],
    }


def _warm_up() -> None:
    """Pay what is paid once: imports, and the first pass through the pipeline."""
    model = gpt(50, 8, 1, 4, 2)
    analyze(task(model, 50, 4), variants="raw", blocks=("embed",), steps=5, exact_limit=0)


def in_own_process(curve: str, level: int) -> dict[str, Any]:
    """What :func:`measure` finds there."""
    done = subprocess.run(
        [sys.executable, __file__, curve, str(level)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the logarithms, by least squares."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    middle, height = sum(u) / len(u), sum(v) / len(v)
    rise = sum((a - middle) * (b - height) for a, b in zip(u, v, strict=True))
    return rise / sum((a - middle) ** 2 for a in u)


def main() -> None:
    """Measure all curves, or the one analysis that the arguments name."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    table = [f"{'against':<12}{'from':>10}{'to':>10}{'seconds':>10}{'memory':>10}"]
    passed = True
    for curve, levels in CURVES.items():
        rows = []
        for level in levels:
            rows.append(in_own_process(curve, level))
            print(json.dumps(rows[-1]), flush=True)
        against = [row[curve] for row in rows]
        slopes = {
            what: slope(against, [row[what] for row in rows])
            for what in ("cpu_seconds", "seconds", "peak_mib")
        }
        told = {name: round(value, 2) for name, value in slopes.items()}
        print(json.dumps({"curve": curve, "threads": torch.get_num_threads()} | told), flush=True)
        table.append(
            f"{curve:<12}{against[0]:>10}{against[-1]:>10}"
            f"{slopes['cpu_seconds']:>10.2f}{slopes['peak_mib']:>10.2f}"
        )
        failed = [row for row in rows if row["skipped"] is not None]
        passed &= max(slopes["cpu_seconds"], slopes["peak_mib"]) <= ACCEPTED and not failed
    print("\n".join(table), file=sys.stderr)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
