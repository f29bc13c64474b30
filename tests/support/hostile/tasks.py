"""Task files, configuration files, outputs and option values that go wrong."""

# ruff: noqa: E501 - a case a line

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from hostile.checkpoints import COMMAND
from hostile.judge import MARKER
from hostile.texts import JUNK_VALUES, NAMES, damaged

HEAD = """
import math
import os
import sys
import torch
from torch import nn
from hessdiag import Task

net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
batch = (torch.arange(24.0).reshape(6, 4).sin(), torch.arange(12.0).reshape(6, 2).cos())
mean = nn.MSELoss()
"""


def _task(body: str) -> str:
    return f"{HEAD}\ndef task():\n    {body}\n"


def _with(expression: str, setup: str = "pass") -> str:
    return _task(f"{setup}\n    return Task({expression})")


def _loss(expression: str) -> str:
    return _with(f"net, [batch], lambda model, batch: {expression}")


def _data(expression: str) -> str:
    return _with(f"net, {expression}, mean")


def sources() -> dict[str, str]:
    """Task files, for the checkpoint ``hostile.checkpoints.state()``."""
    return {
        "empty": "",
        "a syntax error": "def task(:\n",
        "bad indentation": "def task():\nreturn 1\n",
        "null bytes": "x = 1\0\n",
        "an unknown encoding": "# -*- coding: klingon -*-\n",
        "exit at import": "raise SystemExit(0)\n",
        "exit with words": "raise SystemExit('\\x1b[31mbye')\n",
        "interrupt at import": "raise KeyboardInterrupt\n",
        "an error at import": "1 / 0\n",
        "an error of hostile words": "raise ValueError('\\x1b[31m[red]' + 'x' * 5000)\n",
        "an error without words": "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E\n",
        "an error group": "raise ExceptionGroup('many', [ValueError('a'), OSError('b')])\n",
        "a missing module": "import nobody_has_this\n",
        "a missing name": "from hessdiag import Taskk\n",
        "infinite recursion": "def f():\n    return f()\nf()\n",
        "recursion in the task": _task("return task()"),
        "no task": "x = 1\n",
        "a class": "class task:\n    pass\n",
        "a number": "task = 7\n",
        "a module": "import os as task\n",
        "a generator": _task("yield Task(net, [batch], mean)"),
        "a coroutine": HEAD + "async def task():\n    return Task(net, [batch], mean)\n",
        "None": _task("pass"),
        "the class Task": _task("return Task"),
        "a task that needs arguments": HEAD + "def task(a, /, *, b):\n    return 1\n",
        "a task that is a lambda": HEAD + "task = lambda: Task(net, [batch], mean)\n",
        "a name that lies": HEAD + "class T:\n    __name__ = 3\n    def __call__(self): return self\ntask = T()\n",
        "no data": _data("[]"),
        "data None": _data("None"),
        "a generator as data": _data("(b for b in [batch])"),
        "data that ends once": _with("net, once, mean", "once = type('D', (), {'n': 0, '__iter__': lambda s: (setattr(s, 'n', s.n + 1), iter([batch] if s.n < 2 else []))[1]})()"),
        "data that grow": _with("net, grow, mean", "grow = type('D', (), {'n': 0, '__iter__': lambda s: (setattr(s, 'n', s.n + 1), iter([batch] * s.n))[1]})()"),
        "data that change": _with("net, wild, mean", "wild = type('D', (), {'__iter__': lambda s: iter([(torch.randn(6, 4), batch[1])])})()"),
        "data that raise": _with("net, bad, mean", "bad = type('D', (), {'__iter__': lambda s: 1 / 0})()"),
        "data without rows": _data("[(torch.zeros(0, 4), torch.zeros(0, 2))]"),
        "a batch of None": _data("[None]"),
        "a batch of text": _data("['rows']"),
        "a batch of ints": _data("[3]"),
        "a batch of lists": _data("[([1.0] * 4, [1.0] * 2)]"),
        "an empty batch": _data("[()]"),
        "NaN in the data": _data("[(batch[0] * math.nan, batch[1])]"),
        "infinity in the data": _data("[(batch[0] * math.inf, batch[1])]"),
        "NaN in a target": _data("[(batch[0], batch[1] * math.nan)]"),
        "huge data": _data("[(batch[0].double() * 1e200, batch[1].double())]"),
        "tiny data": _data("[(batch[0].double() * 1e-200, batch[1].double() * 1e-200)]"),
        "zero data": _data("[(batch[0] * 0, batch[1] * 0)]"),
        "complex data": _data("[(batch[0] * 1j, batch[1])]"),
        "boolean data": _data("[(batch[0] > 0, batch[1])]"),
        "sparse data": _data("[(batch[0].to_sparse(), batch[1])]"),
        "data on meta": _data("[(batch[0].to('meta'), batch[1].to('meta'))]"),
        "data of another width": _data("[(batch[0][:, :3], batch[1])]"),
        "data of other lengths": _data("[(batch[0][:5], batch[1])]"),
        "data that need gradients": _data("[(batch[0].requires_grad_(), batch[1])]"),
        "a loss of rows": _loss("(model(batch[0]) - batch[1]).square()"),
        "a loss of NaN": _loss("model(batch[0]).mean() * math.nan"),
        "a loss of infinity": _loss("model(batch[0]).mean() * math.inf"),
        "a loss of None": _loss("None"),
        "a loss of a float": _loss("0.5"),
        "a loss of an int tensor": _loss("torch.tensor(3)"),
        "a complex loss": _loss("model(batch[0]).mean() * 1j"),
        "a detached loss": _loss("model(batch[0]).mean().detach()"),
        "a loss without the model": _loss("torch.tensor(1.0)"),
        "a loss on meta": _loss("torch.tensor(1.0, device='meta')"),
        "a loss of text": _loss("'\\x1b[31m0.5'"),
        "a loss of a tuple": _loss("(model(batch[0]).mean(), 1)"),
        "a linear loss": _loss("model(batch[0]).mean() * 0 + sum(p.sum() for p in model.parameters())"),
        "a constant loss": _loss("0 * model(batch[0]).mean()"),
        "a random loss": _loss("model(batch[0]).mean() * torch.rand(())"),
        "a loss that raises": _loss("1 / 0"),
        "a loss that exits": _loss("sys.exit(0)"),
        "a loss that interrupts itself": _with("net, [batch], bad", "def bad(model, batch): raise KeyboardInterrupt"),
        "a loss out of memory": _with("net, [batch], bad", "def bad(model, batch): raise MemoryError"),
        "a loss that wants a petabyte": _loss("torch.empty(1 << 50).mean()"),
        "a loss that steps": _with("net, [batch], step", "def step(model, batch):\n        loss = mean(model(batch[0]), batch[1])\n        with torch.no_grad():\n            for p in model.parameters(): p.add_(1e-3)\n        return loss"),
        "a loss that backpropagates": _with("net, [batch], step", "def step(model, batch):\n        loss = mean(model(batch[0]), batch[1])\n        loss.backward(retain_graph=True)\n        return loss"),
        "a loss without gradients": _with("net, [batch], f", "def f(model, batch):\n        with torch.no_grad():\n            return mean(model(batch[0]), batch[1])"),
        "a loss in inference mode": _with("net, [batch], f", "def f(model, batch):\n        with torch.inference_mode():\n            return mean(model(batch[0]), batch[1])"),
        "a loss in NumPy": _loss("torch.tensor(float(((model(batch[0]) - batch[1]).detach().numpy() ** 2).mean()))"),
        "a loss that prints": _loss("(print('hello'), mean(model(batch[0]), batch[1]))[1]"),
        "a loss of two arguments too few": _with("net, [batch], lambda: 0"),
        "a loss that is a class": _with("net, [batch], nn.MSELoss"),
        "a loss that sums": _with("net, [batch], nn.MSELoss(reduction='sum')"),
        "a loss beyond float64": _loss("mean(model(batch[0]), batch[1]).double() * 1e300 * 1e300"),
        "a loss near the end of float64": _loss("mean(model(batch[0]), batch[1]).double() * 1e290"),
        "a loss of denormals": _loss("mean(model(batch[0]), batch[1]).double() * 1e-310"),
        "a loss with a kink": _loss("(model(batch[0]) - batch[1]).abs().mean()"),
        "a loss of a square root at zero": _loss("(model(batch[0]) * 0).square().sum().sqrt()"),
        "a batch size of text": _with("net, [batch], mean, batch_size=lambda b: '6'"),
        "a batch size of NaN": _with("net, [batch], mean, batch_size=lambda b: math.nan"),
        "a batch size of zero": _with("net, [batch], mean, batch_size=lambda b: 0"),
        "a negative batch size": _with("net, [batch], mean, batch_size=lambda b: -1"),
        "a huge batch size": _with("net, [batch], mean, batch_size=lambda b: 10**400"),
        "a batch size that raises": _with("net, [batch], mean, batch_size=lambda b: 1 / 0"),
        "an optimizer that raises": _with("net, [batch], mean, optimizer=lambda m: 1 / 0"),
        "an optimizer of None": _with("net, [batch], mean, optimizer=lambda m: None"),
        "an optimizer of others": _with("net, [batch], mean, optimizer=lambda m: torch.optim.SGD([torch.ones(1)], 1)"),
        "an optimizer of nothing": _with("net, [batch], mean, optimizer=lambda m: torch.optim.SGD([], 1)"),
        "a mode of its own": _with("net, [batch], mean, mode='test'"),
        "a hostile name": _with("net, [batch], mean, name='\\x1b[31m\\n[red]' + 'y' * 4000"),
        "hostile notices": _with("net, [batch], mean, notices=('\\x1b[31m\\n[red]',)"),
        "a name of a surrogate": _with("net, [batch], mean, name='\\ud800'"),
        "no model": _with("None, [batch], mean"),
        "a class as model": _with("nn.Linear, [batch], mean"),
        "a model without parameters": _with("nn.Tanh(), [batch], mean"),
        "a lazy model": _with("nn.LazyLinear(2), [batch], mean"),
        "a frozen model": _with("net.requires_grad_(False), [batch], mean"),
        "a model on meta": _with("net.to('meta'), [batch], mean"),
        "a half model": _with("net.half(), [batch], mean"),
        "a complex model": _with("net.to(torch.complex64), [batch], mean"),
        "another model": _with("nn.Linear(4, 2), [batch], mean"),
        "NaN in a buffer": _with("net, [batch], mean", "net.register_buffer('b', torch.tensor(math.nan), persistent=False)"),
        "a parameter that is no leaf": _with("net, [batch], mean", "net[0].weight.data = (net[0].weight * 2).detach(); net[0].__dict__['weight'] = net[0].weight * 1"),
        "a forward that raises": _with("net, [batch], mean", "net.forward = lambda x: 1 / 0"),
        "a forward that prints": _with("net, [batch], mean", "net.register_forward_hook(lambda *a: print('here'))"),
        "a forward that counts": _with("net, [batch], mean", "net.register_forward_pre_hook(lambda m, a: setattr(m, 'n', getattr(m, 'n', 0) + 1)); net.register_forward_hook(lambda m, a, o: o * m.n)"),
        "a hook that drops gradients": _with("net, [batch], mean", "net[1].register_full_backward_hook(lambda m, i, o: (i[0] * 0,))"),
        "a default dtype changed": _with("net, [batch], mean", "torch.set_default_dtype(torch.float16)"),
        "gradients switched off": _with("net, [batch], mean", "torch.set_grad_enabled(False)"),
        "another folder": _with("net, [batch], mean", "os.chdir('/')"),
        "warnings as errors": _with("net, [batch], mean", "import warnings; warnings.simplefilter('error'); warnings.warn('\\x1b[31mhere')"),
    }  # fmt: skip


def own_models() -> dict[str, str]:
    """Tasks whose model has names or parameters of its own; each saves its checkpoint as it loads."""
    modules = {
        "a scalar parameter": "self.p = nn.Parameter(torch.tensor(0.5))",
        "an empty parameter": "self.p = nn.Parameter(torch.ones(2)); self.e = nn.Parameter(torch.empty(0))",
        "only an empty parameter": "self.p = nn.Parameter(torch.empty(0))",
        "an integer parameter": "self.p = nn.Parameter(torch.ones(2)); self.i = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)",
        "a boolean parameter": "self.p = nn.Parameter(torch.ones(2)); self.i = nn.Parameter(torch.ones(2) > 0, requires_grad=False)",
        "a complex parameter": "self.p = nn.Parameter(torch.ones(2)); self.c = nn.Parameter(torch.ones(2) * 1j)",
        "a parameter of NaN": "self.p = nn.Parameter(torch.tensor([1.0, math.nan]))",
        "a shared parameter": "self.p = nn.Parameter(torch.ones(2)); self.q = self.p",
        "an expanded parameter": "self.p = nn.Parameter(torch.ones(1).expand(3))",
        "overlapping parameters": "base = torch.ones(4); self.p = nn.Parameter(base[:3]); self.q = nn.Parameter(base[1:])",
        "a sparse parameter": "self.p = nn.Parameter(torch.ones(2)); self.s = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)",
        "an unused parameter": "self.p = nn.Parameter(torch.ones(2)); self.u = nn.Parameter(torch.ones(2))",
        "1,000 dimensions of one": "self.p = nn.Parameter(torch.ones([1] * 60))",
        "a module of itself": "self.p = nn.Parameter(torch.ones(2)); self.__dict__['me'] = self",
    }  # fmt: skip
    for name, text in NAMES.items():
        if "." not in text and text:
            modules[f"a parameter called {name}"] = f"setattr(self, 'p', nn.Parameter(torch.ones(2))); self.register_parameter({text!r}, nn.Parameter(torch.ones(2)))"  # fmt: skip
            modules[f"a module called {name}"] = f"setattr(self, 'p', nn.Parameter(torch.ones(2))); self.add_module({text!r}, nn.Linear(1, 1))"  # fmt: skip
        modules[f"a key called {name}"] = f"self.p = nn.Parameter(torch.ones(2)); self.d = nn.ModuleDict(); self.d._modules[{text!r}] = nn.Linear(1, 1)"  # fmt: skip
    return {
        name: f"""{HEAD}
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        {body}

    def forward(self, x):
        real = (p for p in self.parameters() if p.is_floating_point() and not p.is_sparse)
        return sum((p.square() * (i + 1)).sum() for i, p in enumerate(real))

torch.manual_seed(0)
model = Own()
torch.save(model.state_dict(), "own.pt")

def task():
    return Task(model, [torch.ones(2, 1)], lambda m, b: m(b))
"""
        for name, body in modules.items()
    }


VALUED = (
    *("--task", "--task-arg", "--data", "--variants", "--blocks", "--curvature"),
    *("--exact-limit", "--steps", "--probes", "--tolerance", "--eigensolver", "--max-seconds"),
    *("--device", "--dtype", "--seed", "--batch-size", "--max-examples", "--weight-decay"),
    *("--damping", "--engine", "--memory-budget"),
)
"""The options of ``analyze`` that take a value."""


def junk(rng: random.Random) -> list[str]:
    """One to three options of ``analyze``, each with a value that makes no sense."""
    arguments: list[str] = []
    for option in rng.sample(VALUED, rng.choice((1, 1, 2, 3))):
        value = rng.choice(JUNK_VALUES)
        arguments += rng.choice(([option, value], [f"{option}={value}"]))
    return arguments


def outputs() -> dict[str, Callable[[Path], str]]:
    """Outputs that cannot be; each prepares the folder and returns the value of ``-o``."""

    def link(target: str) -> Callable[[Path], str]:
        def make(folder: Path) -> str:
            (folder / "out.h5").symlink_to(target)
            return "out.h5"

        return make

    def made(content: bytes | None) -> Callable[[Path], str]:
        def make(folder: Path) -> str:
            path = folder / "out.h5"
            path.mkdir() if content is None else path.write_bytes(content)
            return "out.h5"

        return make

    def fifo(folder: Path) -> str:
        os.mkfifo(folder / "out.h5")
        return "out.h5"

    return {
        "a link to a file": link("keep.txt"),
        "a dangling link": link("nowhere/at/all"),
        "a link to itself": link("out.h5"),
        "a link to /dev/null": link("/dev/null"),
        "a folder": made(None),
        "somebody's file": made(b"precious"),
        "an empty file": made(b""),
        "a FIFO": fifo,
        "the checkpoint itself": lambda folder: "model.pt",
        "the task itself": lambda folder: "hessdiag_task.py",
        "/dev/full": lambda folder: "/dev/full",
        "/dev/null": lambda folder: "/dev/null",
        "/proc": lambda folder: "/proc/self/out.h5",
        "below a file": lambda folder: "keep.txt/out.h5",
        "in no folder": lambda folder: "no/such/folder/out.h5",
        "nothing": lambda folder: "",
        "a dot": lambda folder: ".",
        "the root": lambda folder: "/",
        "300 characters": lambda folder: "y" * 300 + ".h5",
        "250 characters": lambda folder: "y" * 250 + ".h5",
        "5,000 characters": lambda folder: "y/" * 2500 + "out.h5",
        "a newline": lambda folder: "no\n/\x1b[31mout.h5",
        "a surrogate": lambda folder: "no/\udcff.h5",
    }  # fmt: skip


def configurations() -> dict[str, tuple[str, bytes]]:
    """Configuration files of the working directory: name and content."""
    texts = {
        "no TOML": b"[tool.hessdiag\n",
        "bytes": b"\xff\xfe\x00task",
        "a null": b"task = 'a\0b'\n",
        "a task of seven": b"task = 7\n[tool.hessdiag]\ntask = 7\n",
        "a task of lists": b"[tool.hessdiag]\ntask = ['a']\n",
        "a table of text": b"tool = 'x'\n",
        "a section of lists": b"[tool]\nhessdiag = [1]\n",
        "a hostile task": b'[tool.hessdiag]\ntask = "\\u001b[31m.py"\n',
        "a task of nothing": b'[tool.hessdiag]\ntask = ""\n',
        "a task that climbs": b'[tool.hessdiag]\ntask = "../../../etc/passwd.py"\n',
        "a task of a null": b'[tool.hessdiag]\ntask = "a\\u0000.py"\n',
        "a long task": b'[tool.hessdiag]\ntask = "' + b"y" * 5000 + b'.py"\n',
        "deep lists": b"a = " + b"[" * 50_000 + b"]" * 50_000,
        "deep tables": b"[" + b"a." * 5_000 + b"b]\n",
        "a huge integer": b"a = " + b"9" * 10_000 + b"\n",
        "a million keys": b"".join(b"k%d = 1\n" % i for i in range(20_000)),
        "shell": f'[tool.hessdiag]\ntask = "$({COMMAND}).py"\n'.encode(),
        "code": f"[tool.hessdiag]\ntask = \"os:system('touch {MARKER}')\"\n".encode(),
        "a module that runs": b'[tool.hessdiag]\ntask = "this:nothing"\n',
    }
    return {
        f"{file} with {name}": (file, content)
        for name, content in texts.items()
        for file in ("hessdiag.toml", "pyproject.toml")
    }


def accident(rng: random.Random) -> bytes:
    """A sound task file after one accident."""
    return damaged(_with("net, [batch], mean").encode(), rng)
