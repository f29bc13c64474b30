"""A language model of the size of GPT-2 small, 124M parameters: does it fit, and how long.

Run by ``make bench``. Three named blocks, among them the tied embedding of 50,257 rows, 20 steps,
on one sequence of 64 random tokens, through :func:`hessdiag.analyze` as a user calls it. Prints
one JSON row per block and one of the whole run; ends with 1 where the memory limit is passed.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from networks import Tokens
from torch import nn

from hessdiag import Task, analyze

VOCABULARY, WIDTH, DEPTH, LENGTH, HEADS = 50_257, 768, 12, 64, 12
STEPS = 20
BLOCKS = ("embed", "attention=layers.6.self_attn.*", "layers.11.linear2")
BUDGET = "8G"  # for Krylov bases, and as much for graphs: the same on every machine
LIMIT = 24 * 2**30
SPREAD = 0.02  # of the weights, as GPT-2 begins


def gpt(vocabulary: int, width: int, depth: int, length: int, heads: int) -> nn.Module:
    """A decoder with learnt positions whose last layer is its embedding; random weights."""
    torch.manual_seed(0)
    model = Tokens(vocabulary, width, depth, length, heads)
    model.head.weight = model.embed.weight
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=SPREAD)
    return model.eval()


def task(model: nn.Module, vocabulary: int, length: int, examples: int = 1) -> Task:
    """Next-token prediction on random tokens."""
    tokens = torch.randint(0, vocabulary, (examples, length + 1))
    return Task(model, [(tokens[:, :-1], tokens[:, 1:])], nn.CrossEntropyLoss())


def peak_bytes() -> int:
    """The most that this process was ever resident with."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Print what every block took, and the run as a whole."""
    before = peak_bytes()
    model = gpt(VOCABULARY, WIDTH, DEPTH, LENGTH, HEADS)
    size = sum(p.numel() for p in model.parameters())
    subject = task(model, VOCABULARY, LENGTH)
    started = time.perf_counter()
    run = analyze(
        subject, variants="raw", blocks=BLOCKS, steps=STEPS, memory_budget=BUDGET, dtype="float64"
    )
    seconds = time.perf_counter() - started
    print(run, file=sys.stderr)
    record = run.provenance.environment
    for block in run.blocks:
        row = block.variants["raw"]
        found = row["lambda_max"]
        print(
            json.dumps(
                {
                    "block": block.name,
                    "n": row["size"],
                    "method": row["method"],
                    "engine": record["engine"].get(block.name),
                    "products": row["products"],
                    "seconds": round(row["seconds"], 1),
                    "lambda_max": [found.low, found.high],
                    "notes": row["notes"],
                    "skipped": row["skipped"],
                }
            )
        )
    peak = peak_bytes()
    print(
        json.dumps(
            {
                "case": "size",
                "parameters": size,
                "seconds": round(seconds, 1),
                "products": sum(block.variants["raw"]["products"] for block in run.blocks),
                "peak_gib": round(peak / 2**30, 2),
                "before_gib": round(before / 2**30, 2),
                "limit_gib": LIMIT / 2**30,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )
    failed = [block.name for block in run.blocks if block.variants["raw"]["skipped"] is not None]
    sys.exit(1 if failed or peak > LIMIT else 0)


if __name__ == "__main__":
    main()
