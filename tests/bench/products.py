"""Cost and error of one Hessian-vector product, ours and PyHessian's, side by side in one run.

Run by ``make bench``; prints one JSON row per case and engine. Times are the best of several
repeats, in units of one gradient measured in the same run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from hessdiag.curvature.engines import BUILD, Kept, Recompute
from hessdiag.curvature.loan import exact_arithmetic, loan
from hessdiag.curvature.objective import Objective, only
from hessdiag.data import load_batches
from hessdiag.demos import DEMOS
from hessdiag.task import as_loss, units

REPEATS = 7


def best(function: Callable[[], object]) -> float:
    """The best of several timings, after one to warm up."""
    function()
    timings = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        timings.append(time.perf_counter() - start)
    return min(timings)


def pyhessian_product(
    model: nn.Module, batches: list[object]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """PyHessian's product over a loader, as its eigenvalues and trace use it."""
    from pyhessian import hessian

    subject = hessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=False)

    def product(vector: torch.Tensor) -> torch.Tensor:
        sizes = [p.numel() for p in subject.params]
        pieces = vector.split(sizes)
        shaped = [piece.view(p.shape) for piece, p in zip(pieces, subject.params, strict=True)]
        _, result = subject.dataloader_hv_product(shaped)
        return torch.cat([part.reshape(-1) for part in result])

    return product


def main() -> None:
    """Print a row per demo network and engine."""
    for name, make in DEMOS.items():
        task = make()
        model = task.model
        with (
            loan([model], mode="eval", dtype=torch.float64, device=torch.device("cpu")),
            exact_arithmetic([model], torch.float64),
        ):
            batches = load_batches(
                task.data, units(task), dtype=torch.float64, device=torch.device("cpu")
            )
            objective = Objective(model, as_loss(task), batches)
            parameters = list(model.parameters())
            generator = torch.Generator().manual_seed(0)
            size = sum(p.numel() for p in parameters)
            vector = torch.randn(size, generator=generator, dtype=torch.float64)
            gradient = best(lambda o=objective, p=parameters: o.gradient(p))
            reference = Recompute(objective, parameters, BUILD["hessian"])(vector)
            cases: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
                "kept": Kept(objective, parameters, BUILD["hessian"]),
                "recompute": Recompute(objective, parameters, BUILD["hessian"]),
            }
            with only(parameters):
                cases["pyhessian"] = pyhessian_product(model, list(batches.items))
            for engine, product in cases.items():
                # Our engines switch gradients on and off themselves; PyHessian leaves that to us.
                with only(parameters) if engine == "pyhessian" else nullcontext():
                    seconds = best(lambda f=product, v=vector: f(v))
                    error = float((product(vector) - reference).norm() / reference.norm())
                row = {
                    "case": name,
                    "n": size,
                    "engine": engine,
                    "gradients": round(seconds / gradient, 2),
                    "relative_difference": error,
                    "seconds": seconds,
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                }
                sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
