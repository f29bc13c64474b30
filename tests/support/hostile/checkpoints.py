"""Checkpoints that are damaged, confused, or meant to do harm."""

# ruff: noqa: E501 - a case a line

from __future__ import annotations

import collections
import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from hostile.judge import MARKER
from hostile.texts import NAMES, damaged

Write = Callable[[Path], None]
"""Writes a checkpoint, or something with its name, at a path."""

SHAPES = {"0.weight": (3, 4), "0.bias": (3,), "2.weight": (2, 3), "2.bias": (2,)}
"""Of the network in :data:`TASK`."""

TASK = """
import torch
from torch import nn
from hessdiag import Task

def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    batch = (torch.randn(6, 4), torch.randn(6, 2))
    adam = lambda model: torch.optim.Adam(model.parameters())
    return Task(model, [batch], nn.MSELoss(), optimizer=adam)
"""


def state(**changed: Any) -> dict[Any, Any]:
    """The state dict of the network in :data:`TASK`, with some entries changed."""
    seeded = torch.Generator().manual_seed(7)
    return {n: torch.randn(s, generator=seeded) for n, s in SHAPES.items()} | changed


def training(**changed: Any) -> dict[str, Any]:
    """A training dict with the state of Adam after one step."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model.load_state_dict(state())
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    adam.step()
    return {"model": model.state_dict(), "optimizer": adam.state_dict(), "step": 1} | changed


def saved(content: object, *, legacy: bool = False) -> bytes:
    """The bytes of ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def sound() -> dict[str, bytes]:
    """A checkpoint of every format, as a file: what accidents then happen to."""
    return {
        "zip.pt": saved(training()),
        "legacy.pt": saved(training(), legacy=True),
        "state.safetensors": safetensors_bytes(state()),
        "lightning.ckpt": saved(lightning()),
    }


def lightning(**changed: Any) -> dict[str, Any]:
    """What Lightning's Trainer writes, without Lightning."""
    content = training()
    return {
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"net.{name}": value for name, value in content["model"].items()},
        "optimizer_states": [content["optimizer"]],
        "global_step": 1,
        "epoch": 0,
        "callbacks": {},
        "loops": {},
    } | changed


def put(path: Path, content: bytes) -> None:
    """Write ``content`` at ``path``."""
    path.write_bytes(content)


def _saved(make: Callable[[], object], *, legacy: bool = False) -> Write:
    return lambda path: put(path, saved(make(), legacy=legacy))


class Call:
    """Unpickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


COMMAND = f"touch {MARKER}"
CODE = f"open({MARKER!r}, 'w').close()"


def _evil() -> dict[str, tuple[object, str]]:
    """Objects that run code when they are unpickled, and the name that must be shown."""
    return {
        "os.system": (Call(os.system, COMMAND), f"{os.system.__module__}.system"),
        "eval": (Call(eval, CODE), "builtins.eval"),
        "exec": (Call(exec, CODE), "builtins.exec"),
        "getattr": (Call(getattr, Call(__import__, "os"), "system"), "builtins.getattr"),
        "open": (Call(open, MARKER, "w"), "io.open"),
        "torch.load": (Call(torch.load, MARKER), "torch.serialization.load"),
        "hub": (Call(torch.hub.load, ".", "x"), "torch.hub.load"),
    }


def executing() -> dict[str, tuple[Write, str]]:
    """Files that would run code, each with the global that the refusal must name."""
    found: dict[str, tuple[Write, str]] = {}
    for name, (evil, shown) in _evil().items():
        for legacy in (False, True):
            kind = "legacy" if legacy else "zip"
            # Old pickles call the module by the name that it had in Python 2.
            says = shown.replace("builtins.", "__builtin__.") if legacy else shown
            hidden = state(**{"0.bias": evil})
            found[f"{name}, {kind}"] = (_saved(lambda o=evil: o, legacy=legacy), says)
            found[f"{name} among weights, {kind}"] = (
                _saved(lambda h=hidden: h, legacy=legacy),
                says,
            )
    return found


def typed() -> dict[str, Write]:
    """Well-formed files of ``torch.save`` that hold what nobody expects."""
    made: dict[str, Callable[[], object]] = {
        "a list": lambda: [torch.ones(2)],
        "an int": lambda: 3,
        "None": lambda: None,
        "a string": lambda: "\x1b[31mweights",
        "a tensor": lambda: torch.ones(3, 4),
        "a parameter": lambda: nn.Parameter(torch.ones(2)),
        "an empty dict": dict,
        "an empty tuple": tuple,
        "a set": lambda: {1, 2},
        "nested dicts": lambda: {"a": {"b": {"c": state()}}},
        "two networks": lambda: {"gan\n": state(), "\x1b[31mother": state()},
        "keys of all types": lambda: state() | {1: torch.ones(1), None: torch.ones(1), (1, 2): 3},
        "integer keys": lambda: dict(enumerate(state().values())),
        "None for a weight": lambda: state(**{"0.bias": None}),
        "a list for a weight": lambda: state(**{"0.bias": [1.0, 2.0, 3.0]}),
        "a float for a weight": lambda: state(**{"0.bias": 1.0}),
        "a dict for a weight": lambda: state(**{"0.bias": {}}),
        "an array for a weight": lambda: state(**{"0.bias": np.ones(3)}),
        "an array of objects": lambda: state(**{"0.bias": np.array([None, 1, "x"])}),
        "itself": _recursive,
        "deep lists": lambda: state(deep=_deep(400)),
        "a weight of the wrong shape": lambda: state(**{"0.weight": torch.ones(4, 3)}),
        "a weight of no dimension": lambda: state(**{"0.bias": torch.tensor(1.0)}),
        "an empty weight": lambda: state(**{"0.bias": torch.empty(0)}),
        "empty in one dimension": lambda: state(**{"0.weight": torch.empty(3, 0)}),
        "25 dimensions": lambda: state(**{"0.bias": torch.ones([1] * 25)}),
        "NaN": lambda: state(**{"0.bias": torch.tensor([1.0, float("nan"), 2.0])}),
        "infinity": lambda: state(**{"2.bias": torch.tensor([1.0, float("-inf")])}),
        "huge": lambda: state(**{"0.bias": torch.full((3,), 3e38)}),
        "denormal": lambda: state(**{"0.weight": torch.full((3, 4), 1e-45)}),
        "float64 beyond float32": lambda: state(
            **{"0.bias": torch.full((3,), 1e300, dtype=torch.float64)}
        ),
        "sparse": lambda: state(**{"0.weight": torch.eye(4)[:3].to_sparse()}),
        "sparse CSR": lambda: state(**{"0.weight": torch.eye(4)[:3].to_sparse_csr()}),
        "quantised": _quantised,
        "complex": lambda: state(**{"0.bias": torch.ones(3, dtype=torch.complex64)}),
        "meta": lambda: state(**{"0.bias": torch.ones(3, device="meta")}),
        "bool": lambda: state(**{"0.bias": torch.ones(3, dtype=torch.bool)}),
        "integers": lambda: state(**{"0.bias": torch.ones(3, dtype=torch.int64)}),
        "uint16": lambda: state(**{"0.bias": torch.ones(3, dtype=torch.uint16)}),
        "float8": lambda: state(**{"0.bias": torch.ones(3).to(torch.float8_e4m3fn)}),
        "bfloat16": lambda: state(**{"0.bias": torch.ones(3, dtype=torch.bfloat16)}),
        "nested tensor": lambda: state(**{"0.bias": torch.nested.nested_tensor([torch.ones(3)])}),
        "expanded": lambda: state(**{"0.weight": torch.ones(1).expand(3, 4)}),
        "transposed": lambda: state(**{"0.weight": torch.ones(4, 3).T}),
        "overlapping": lambda: state(**{"0.weight": torch.ones(9).as_strided((3, 4), (1, 2))}),
        "conjugated": lambda: state(**{"0.bias": torch.ones(3, dtype=torch.complex64).conj()}),
        "one weight too many": lambda: state(extra=torch.ones(2)),
        "one weight missing": lambda: {k: v for k, v in state().items() if k != "2.bias"},
        "only a counter": lambda: {"num_batches_tracked": torch.tensor(3)},
        "a module.n_averaged of NaN": lambda: _prefixed(n_averaged=torch.tensor(float("nan"))),
        "a module.n_averaged of None": lambda: _prefixed(n_averaged=None),
        "a huge step": lambda: training(step=10**600),
        "a step of NaN": lambda: training(step=float("nan")),
        "a step of text": lambda: training(step="\x1b[31m9"),
        "a counter dict": lambda: collections.Counter({"a": 1}),
        "a pickled module": lambda: nn.Linear(2, 2),
        "lightning without weights": lambda: lightning(state_dict={}),
        "lightning with a list": lambda: lightning(state_dict=[1, 2]),
        "lightning with two networks": lambda: lightning(
            state_dict={f"{net}.{n}": v for net in ("a", "b") for n, v in state().items()}
        ),
        "lightning with optimizers of text": lambda: lightning(optimizer_states="adam"),
        "lightning of no version": lambda: lightning(**{"pytorch-lightning_version": None}),
    }
    for task in (7, "demo:nothing", "/etc/passwd.py", "demo:\x1b[31m", "os:system", "demo:mlp", ""):
        made[f"the task {task!r}"] = lambda task=task: training(hessdiag={"task": task})
    made["hessdiag is a list"] = lambda: training(hessdiag=["task"])
    return {name: _saved(make) for name, make in made.items()}


def named() -> dict[str, Write]:
    """State dicts with a tensor of a hostile name."""
    return {
        f"a tensor called {n}": _saved(lambda t=t: state() | {t: torch.ones(1)})
        for n, t in NAMES.items()
    }


def optimizers() -> dict[str, Write]:
    """Optimizer state that is confused, beside weights that are sound."""
    sound = training()["optimizer"]
    groups, held = sound["param_groups"], sound["state"]
    first = dict(held[0])
    changed: dict[str, object] = {
        "a list": [1, 2],
        "a string": "adam",
        "a tensor": torch.ones(2),
        "empty": {},
        "of None": {"state": None, "param_groups": None},
        "of lists": {"state": [], "param_groups": []},
        "of a tensor": {"state": torch.ones(2), "param_groups": torch.ones(2)},
        "of ints": {"state": 3, "param_groups": 4},
        "groups of ints": {"state": held, "param_groups": [1, 2]},
        "groups without params": {"state": held, "param_groups": [{}]},
        "params of None": {"state": held, "param_groups": [{"params": None}]},
        "params of text": {"state": held, "param_groups": [{"params": "0123"}]},
        "params nested": {"state": held, "param_groups": [{"params": [[0], [1]]}]},
        "params that recur": {"state": held, "param_groups": [dict(groups[0], params=[0, 0, 0, 0])]},
        "names of None": {"state": held, "param_groups": [dict(groups[0], param_names=None)]},
        "names too few": {"state": held, "param_groups": [dict(groups[0], param_names=["0.bias"])]},
        "names hostile": {"state": held, "param_groups": [dict(groups[0], param_names=list(NAMES.values())[:4])]},
        "state of ints": {"state": dict.fromkeys(range(4), 7), "param_groups": groups},
        "state of None": {"state": dict.fromkeys(range(4)), "param_groups": groups},
        "state under text": {"state": {"\x1b[31m": first}, "param_groups": groups},
        "state under tuples": {"state": {(1, 2): first}, "param_groups": groups},
        "state kinds hostile": {"state": {0: dict.fromkeys(NAMES.values(), 1)}, "param_groups": groups},
        "state of other shapes": {"state": {0: first | {"exp_avg": torch.ones(7)}}, "param_groups": groups},
        "state of NaN": {"state": {0: first | {"exp_avg_sq": torch.full((3, 4), float("nan"))}}, "param_groups": groups},
        "state negative": {"state": {0: first | {"exp_avg_sq": -torch.ones(3, 4)}}, "param_groups": groups},
        "state complex": {"state": {0: first | {"exp_avg": torch.ones(3, 4) * 1j}}, "param_groups": groups},
        "a step of NaN": {"state": {0: first | {"step": float("nan")}}, "param_groups": groups},
        "a step of text": {"state": {0: first | {"step": "one"}}, "param_groups": groups},
        "betas of None": {"state": held, "param_groups": [dict(groups[0], betas=None, lr="x", eps=[])]},
        "more parameters": {"state": held, "param_groups": [dict(groups[0], params=list(range(90)))]},
    }  # fmt: skip
    return {f"optimizer {n}": _saved(lambda o=o: training(optimizer=o)) for n, o in changed.items()}


def accident(rng: random.Random) -> tuple[str, bytes]:
    """A sound checkpoint after one accident: its file name and its bytes."""
    name, content = rng.choice(sorted(sound().items()))
    return name, damaged(content, rng)


def _recursive() -> object:
    content: dict[str, Any] = state()
    content["self"] = content
    return content


def _deep(levels: int) -> object:
    deep: object = 0
    for _ in range(levels):
        deep = [deep]
    return deep


def _quantised() -> object:
    return state(**{"0.bias": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)})


def _prefixed(**extra: object) -> dict[str, object]:
    return {f"module.{name}": value for name, value in state().items()} | extra
