"""A product for one layer pays for no layer below it; work is counted, not timed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hessdiag.curvature.engines import BUILD, graph_bytes, make_engine

LAYERS = 20


class Multiplications(TorchDispatchMode):
    """Counts those of matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return result


def deep(networks):
    torch.manual_seed(0)
    layers = [m for _ in range(LAYERS - 1) for m in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(16, 16))
    data = [(torch.randn(32, 16), torch.randn(32, 16))]
    return networks.Task(model, data, networks.mse)


def work(product, parameters):
    vector = torch.ones(sum(p.numel() for p in parameters), dtype=torch.float64)
    with Multiplications() as counted:
        product(vector)
    return counted.count


@pytest.mark.parametrize(
    ("engine", "curvature", "most"),
    [
        ("kept", "hessian", 4),
        ("linearized", "hessian", 4),
        ("recompute", "hessian", 6),
        ("kept", "ggn", 5.4),
        ("linearized", "ggn", 5.4),
    ],
)
def test_all_single_layer_products_cost_no_more_than_six_of_the_whole_network(
    networks, engine, curvature, most
):
    with networks.lent(deep(networks)) as (objective, named):
        parameters = list(named.values())
        layers = [parameters[2 * i : 2 * i + 2] for i in range(LAYERS)]

        def cost(block):
            product = make_engine(objective, block, curvature=curvature, engine=engine)
            return work(product, block)

        whole = cost(parameters)
        costs = [cost(layer) for layer in layers]
    assert whole > 0
    assert costs == sorted(costs, reverse=True)
    assert sum(costs) <= most * whole


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_the_graph_of_a_layer_holds_nothing_of_the_layers_below(networks, curvature):
    with networks.lent(deep(networks)) as (objective, named):
        parameters = list(named.values())
        layers = [parameters[2 * i : 2 * i + 2] for i in range(LAYERS)]
        sizes = [graph_bytes(objective, layer, BUILD[curvature]) for layer in layers]
    assert sizes[-1] < 0.1 * sizes[0]
    steps = [low - high for low, high in pairwise(sizes)]
    assert min(steps[1:-2]) > 0  # each layer higher up, some activations fewer
