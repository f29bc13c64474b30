"""The curvature of one layer of a model that FSDP2 shards.

Gradients are those of the sharded model. Their differences stand in for second derivatives, which
sharded parameters do not have:

    torchrun --nproc-per-node 2 examples/sharded_model.py

Every process runs the same analysis on the same data, for each gradient is a collective of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import hessdiag

Loss = Callable[[nn.Module, Any], Tensor]


class ShardedLoss(torch.autograd.Function):
    """The sharded model's loss as a function of whole copies of the chosen parameters."""

    @staticmethod
    def forward(ctx: Any, block: ShardedBlock, batch: Any, *values: Tensor) -> Tensor:
        """The loss with the chosen parameters at ``values``; keeps their gradients."""
        for parameter, value in zip(block.chosen, values, strict=True):
            shard = distribute_tensor(value.detach(), parameter.device_mesh, parameter.placements)
            parameter.data.to_local().copy_(shard.to_local())
        block.sharded[0].zero_grad()
        with torch.enable_grad():
            loss = block.loss(block.sharded[0], batch)
            loss.backward()
        ctx.gradients = [parameter.grad.full_tensor() for parameter in block.chosen]
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that the forward has found."""
        return (None, None, *(scale * gradient for gradient in ctx.gradients))


class ShardedBlock(nn.Module):
    """Holds whole copies of the parameters to analyse; all else stays sharded.

    Args:
        sharded: A model after ``fully_shard``, in float64.
        names: Of its parameters to analyse.
        loss: Of the sharded model and a batch.
    """

    def __init__(self, sharded: nn.Module, names: list[str], loss: Loss) -> None:
        super().__init__()
        self.sharded = (sharded,)  # in a tuple: no submodule, so hessdiag leaves it alone
        self.loss = loss
        named = dict(sharded.named_parameters())
        self.chosen: list[Any] = [named[name] for name in names]
        self.values = nn.ParameterList([p.full_tensor().detach().clone() for p in self.chosen])

    def forward(self, batch: Any) -> Tensor:
        """The loss of the batch."""
        return ShardedLoss.apply(self, batch, *self.values)


def main() -> None:
    """Analyse one layer of a small model that is sharded over all processes."""
    dist.init_process_group("gloo")  # "nccl" with a GPU per process
    torch.manual_seed(0)  # the same model and data in every process
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model.double()
    inputs, labels = torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 3, (30,))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # "cuda" with nccl
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    block = ShardedBlock(model, ["2.weight", "2.bias"], loss)
    task = hessdiag.Task(block, [(inputs, labels)], lambda model, batch: model(batch))
    run = hessdiag.analyze(task, engine="difference", blocks="whole", variants="raw")
    if dist.get_rank() == 0:
        print(run["whole"].variants["raw"]["lambda_max"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
