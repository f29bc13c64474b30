"""hessdiag beside its peers: accuracy and time of the same work, in one process and run.

Run by ``make bench``. Prints a table, what must be shown and whether it is, and then all figures
as JSON. Times are the best of several turns, A B A B; products are in units of one gradient of
the same run; float64 throughout. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from measures import measure
from networks import SIX
from peers import STANDARD_ERROR, SURE

PEERS = ("PyHessian", "Curvlinops", "Eigenthings")
HEADER = (
    *(
        "network",
        "library",
        "product, gradients",
        "its error",
        "λ_max, s",
        "products",
        "true error",
    ),
    *("trace, s", "products", "true error", "density, s", "W₁", "peak MiB"),
)


def table(cases: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line per network and library."""
    lines = [_line(HEADER), _line(["---"] * 2 + ["---:"] * (len(HEADER) - 2))]
    for name, case in cases.items():
        for index, row in enumerate(case["libraries"].values()):
            first = f"{name}, n = {case['n']:,}" if index == 0 else ""
            lines.append(_line((first, row["label"], *_cells(row))))
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    product, top, trace = row["product"], row["lambda_max"], row["trace"]
    cells = [f"{product['gradients']:.2f}", f"{product['error']:.0e}"]
    if top is None:
        return [*cells, *[""] * 8, f"{row['peak_mib']:.0f}"]
    if "failure" in top:
        cells += [top["failure"], "", ""]
    else:
        mark = " certified" if top["certified"] else ""
        cells += [f"{top['seconds']:.3f}", str(top["products"]), f"{top['error']:.0e}{mark}"]
    tilde = "~" if trace["extrapolated"] else ""
    error = "" if trace["error"] is None else f"{100 * trace['error']:.1f} %"
    cells += [f"{tilde}{trace['seconds']:.3f}", str(trace["products"]), error]
    density = row["density"]
    if "failure" in density:
        cells += ["raises", ""]
    else:
        distance = density["wasserstein"]
        cells += [f"{density['seconds']:.3f}", "" if distance is None else f"{distance:.1e}"]
    return [*cells, f"{row['peak_mib']:.0f}"]


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def verdicts(cases: dict[str, dict[str, Any]]) -> list[str]:
    """What must be shown, and whether this run shows it."""
    ours = {name: case["libraries"]["Ours"] for name, case in cases.items()}
    there = {
        name: [case["libraries"][peer] for peer in PEERS if peer in case["libraries"]]
        for name, case in cases.items()
    }
    ratio = {
        name: min(peer["product"]["seconds"] for peer in there[name]) / row["product"]["seconds"]
        for name, row in ours.items()
    }
    gradients = {name: row["product"]["gradients"] for name, row in ours.items()}
    lines = [
        _verdict(
            "a product at least 1.5 times cheaper than the best peer's",
            _mean(ratio.values()) >= 1.5,
            f"geometric mean {_mean(ratio.values()):.2f}; {_listed(ratio)}",
        ),
        _verdict("a product nowhere slower", min(ratio.values()) >= 1, _listed(ratio)),
        _verdict(
            "a product at most 2.8 gradients", max(gradients.values()) <= 2.8, _listed(gradients)
        ),
    ]
    tops = {name: row["lambda_max"] for name, row in ours.items()}
    slow = {name: _pyhessian_seconds(case) for name, case in cases.items()}
    both = [name for name in cases if slow[name] is not None and "failure" not in tops[name]]
    if both:
        faster = {name: slow[name] / tops[name]["seconds"] for name in both}
        never = [n for n in both if "failure" in cases[n]["libraries"]["PyHessian"]["lambda_max"]]
        words = f" (never right, so at least: {', '.join(never)})" if never else ""
        lines.append(
            _verdict(
                "λ_max certified to 1e-3 in a fifth of the time of PyHessian's right answer",
                _mean(faster.values()) >= 5 and all(tops[n]["certified"] for n in both),
                f"geometric mean {_mean(faster.values()):.2f}; {_listed(faster)}{words}",
            )
        )
    lines += _one_setting(cases, tops)
    joined = {
        name: case["libraries"]["PyHessianJoined"]["product"]["seconds"]
        / case["libraries"]["OursJoined"]["product"]["seconds"]
        for name, case in cases.items()
        if "PyHessianJoined" in case["libraries"]
    }
    if joined:
        lines.append(
            "for information: where all rows fit one batch, PyHessian keeps its graph too; its "
            f"product then costs {_mean(joined.values()):.2f} times ours on the same batch; "
            f"{_listed(joined)}"
        )
    return lines


def _pyhessian_seconds(case: dict[str, Any]) -> float | None:
    """Of its right λ_max; where there is none, of the products after which it was not right."""
    row = case["libraries"].get("PyHessian")
    if row is None:
        return None
    top = row["lambda_max"]
    return top.get("seconds", top["products"] * row["product"]["seconds"])


def _one_setting(cases: dict[str, dict[str, Any]], tops: dict[str, Any]) -> list[str]:
    """PyHessian at the one tolerance that is right on all networks, as a user must choose it."""
    settings = next(iter(cases.values()))["stops"]
    right = [t for t in settings if all(case["stops"][t]["right"] for case in cases.values())]
    if not right or not all("PyHessian" in case["libraries"] for case in cases.values()):
        return ["for information: no one tolerance makes PyHessian right on all these networks"]
    loosest = max(right, key=float)
    faster = {
        name: case["stops"][loosest]["products"]
        * case["libraries"]["PyHessian"]["product"]["seconds"]
        / tops[name]["seconds"]
        for name, case in cases.items()
        if "failure" not in tops[name]
    }
    return [
        f"for information: at tol={loosest}, the loosest that is right on all networks and "
        f"starts, PyHessian's products take {_mean(faster.values()):.2f} times the time of our "
        f"certified λ_max; {_listed(faster)}"
    ]


def _verdict(claim: str, shown: bool, figures: str) -> str:
    return f"{'PASS' if shown else 'FAIL'}  {claim}: {figures}"


def _mean(ratios: Any) -> float:
    return statistics.geometric_mean(list(ratios))


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {number:.2f}" for name, number in numbers.items())


def machine() -> dict[str, Any]:
    """Where these figures are from."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="networks, comma-separated", default=",".join(SIX))
    parser.add_argument("--quick", action="store_true", help="fewer turns: for development")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds of the process: with one thread, on a machine that does other work too",
    )
    parser.add_argument("--json", type=Path, help="write the JSON here and not to stdout")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", message="Using backward")  # PyHessian's reference cycle
    torch.manual_seed(0)  # PyHessian, curvlinops and scipy draw from the global generators
    clock = time.process_time if asked.cpu_time else time.perf_counter
    cases = {}
    started = time.perf_counter()
    for name in asked.only.split(","):

        def report(text: str, name: str = name) -> None:
            sys.stderr.write(f"{time.perf_counter() - started:6.0f} s  {name}: {text}\n")

        cases[name] = measure(SIX[name](), report, clock=clock, quick=asked.quick)
        sys.stderr.write(f"{table({name: cases[name]})}\n")  # in case a later network fails
    where = machine() | {
        "clock": "CPU time" if asked.cpu_time else "wall",
        "seconds": round(time.perf_counter() - started),
    }
    document = json.dumps({"machine": where, "cases": cases}, allow_nan=False)
    words = ", ".join(f"{key} {value}" for key, value in where.items())
    print(f"{words}\n\n{table(cases)}\n\n" + "\n".join(verdicts(cases)))
    print(
        f"λ_max: to {SURE:g}, certified by ours; of the others at the loosest setting that is "
        f"right. trace: to {STANDARD_ERROR:.0%} standard error; ~ extrapolated from fewer probes."
    )
    if asked.json is not None:
        asked.json.write_text(document)
    else:
        print(document)


if __name__ == "__main__":
    main()
