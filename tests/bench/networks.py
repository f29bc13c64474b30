"""The networks that benchmarks measure: on real digits, on random images and on random tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hessdiag import Task
from hessdiag.demos import DEMOS
from hessdiag.demos.handwriting import digits

Pairs = list[tuple[Tensor, Tensor]]
ROWS, BATCH = 600, 256  # of the digits: the last batch is ragged


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

    def __init__(
        self, vocabulary: int, width: int, depth: int, length: int, heads: int = 4
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, activation="gelu", batch_first=True, norm_first=True
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


def trained(model: nn.Module, data: Pairs, steps: int = 10) -> Task:
    """The task after ``steps`` of Adam, so that it is no mere initialisation."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _, (inputs, targets) in zip(range(steps), itertools.cycle(data), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return Task(model, data, nn.CrossEntropyLoss(), name=type(model).__name__)


def batches(data: Pairs, rows: int) -> Pairs:
    """The data in batches of so many rows, a ragged one at the end."""
    inputs, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    return list(zip(inputs.split(rows), targets.split(rows), strict=True))


def demo(name: str) -> Task:
    """A demo network on 600 digits in batches, after two passes or so."""
    task = DEMOS[name]()
    images, labels = task.data[0]  # type: ignore[index]
    return trained(task.model, batches([(images[:ROWS], labels[:ROWS])], BATCH), steps=30)


def mlp20() -> Task:
    """A 20-layer MLP of 85k parameters on 600 digits."""
    torch.manual_seed(0)
    hidden = [part for _ in range(18) for part in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), *hidden, nn.Linear(64, 10))
    for layer in model[::2]:  # torch's own start lets nothing through twenty of them
        nn.init.orthogonal_(layer.weight)
    images, labels = digits()
    return trained(model, batches([(images[:ROWS].flatten(1), labels[:ROWS])], BATCH), steps=60)


def ragged(make: Callable[..., Task], examples: int, rows: int) -> Task:
    """One of the larger networks on so many examples, in batches."""
    task = make(examples)
    return Task(task.model, batches(list(task.data), rows), task.loss, name=task.name)


SIX: dict[str, Callable[[], Task]] = {
    "mlp": lambda: demo("mlp"),
    "convnet": lambda: demo("convnet"),
    "transformer": lambda: demo("transformer"),
    "mlp20": mlp20,
    "resnet20": lambda: ragged(resnet20, 6, 4),
    "gpt": lambda: ragged(lambda examples: transformer(examples, length=16), 3, 2),
}
"""By name: three demos, a deep MLP, ResNet-20 and a GPT-like decoder of 5M parameters."""
