"""Networks whose blocks are too large to assemble: time per layer, and whether intervals hold.

Run with ``make bench-large`` on an idle machine. Each network is analysed per layer as a user
would, then each block's ends are compared with a long Lanczos run of their own, and its trace
with many more probes. Prints one JSON row per network.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

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


class Residual(nn.Module):
    """Two 3×3 convolutions and a shortcut, as in the CIFAR networks of He et al. (2016)."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        stride = 1 if narrow == wide else 2
        self.first = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.second = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(short, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))


def resnet20(examples: int = 8) -> Task:
    """ResNet-20 for 32×32 images, 270k parameters, after a few steps on random images."""
    torch.manual_seed(0)
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Residual(a, b) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return trained(model, [(torch.randn(examples, 3, 32, 32), torch.randint(0, 10, (examples,)))])


class Tokens(nn.Module):
    """A decoder with learnt positions."""

    def __init__(self, vocabulary: int, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, 0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embed(tokens) + self.position(torch.arange(length, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length).to(x)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x)).transpose(1, 2)  # type: ignore[no-any-return]


def transformer(examples: int = 2, length: int = 32) -> Task:
    """A decoder of 5M parameters after a few steps on random tokens."""
    torch.manual_seed(0)
    model = Tokens(vocabulary=1000, width=256, depth=6, length=length)
    tokens = torch.randint(0, 1000, (examples, length + 1))
    return trained(model, [(tokens[:, :-1], tokens[:, 1:])])


def trained(model: nn.Module, data: list[tuple[Tensor, Tensor]], steps: int = 10) -> Task:
    """The task after ``steps`` of Adam, so that it is no mere initialisation."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
    return Task(model, data, nn.CrossEntropyLoss(), name=type(model).__name__)


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
