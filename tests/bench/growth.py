"""How seconds and peak memory grow with parameters, with examples and with products.

Run by ``make bench``. Each of the three is varied alone, in analyses of a small decoder as a user
runs them, each in a process of its own, so that one's peak is not another's. Parameters and
examples: of the embedding. Products: of the layers between, by the number of probes (the steps of
Lanczos add their orthogonalisation, n × steps², to their products). Prints one JSON row per
analysis and one per curve, with the slope of the logarithms against each other: 1 is linear
growth, and what does not grow brings it below, least so between the last two levels. Ends with 1
where that slope tells otherwise.
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
    "parameters": (1, 3, 9),
    "examples": (8, 32, 96),
    "products": (50, 200, 800),
}
"""Factors of the vocabulary, sequences, and probes."""
BLOCK = {"parameters": "embed", "examples": "embed", "products": "layers=layers.*"}
MEASURED = ("cpu_seconds", "peak_mib")  # of the processor: other work does not count
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
        blocks=(BLOCK[curve],),
        steps=STEPS,
        probes=level if curve == "products" else PROBES,
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


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the logarithms, by least squares, to two digits."""
    u, v = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    middle, height = sum(u) / len(u), sum(v) / len(v)
    rise = sum((a - middle) * (b - height) for a, b in zip(u, v, strict=True))
    return round(rise / sum((a - middle) ** 2 for a in u), 2)


def _shown(slopes: dict[str, float]) -> str:
    return f"{slopes['all']:.2f}, last {slopes['last']:.2f}".rjust(16)


def main() -> None:
    """Measure all curves, or the one analysis that the arguments name."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    table = [f"{'slope in':<12}{'from':>10}{'to':>10}{'processor':>16}{'memory':>16}"]
    passed = True
    for curve, levels in CURVES.items():
        rows = []
        for level in levels:
            rows.append(in_own_process(curve, level))
            print(json.dumps(rows[-1]), flush=True)
        found: dict[str, Any] = {"curve": curve, "threads": torch.get_num_threads()}
        for what in MEASURED:
            points = [(row[curve], row[what]) for row in rows]
            found[what] = {"all": slope(points), "last": slope(points[-2:])}
            passed &= found[what]["last"] <= ACCEPTED
        passed &= all(row["skipped"] is None for row in rows)
        print(json.dumps(found), flush=True)
        ends = (f"{rows[0][curve]:>10}", f"{rows[-1][curve]:>10}")
        table.append(f"{curve:<12}" + "".join((*ends, *(_shown(found[w]) for w in MEASURED))))
    print("\n".join(table), file=sys.stderr)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
