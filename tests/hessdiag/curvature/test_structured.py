"""Blocks by structure against the dense matrix, differentiated entry by entry."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import sample_networks
from hessdiag.curvature.engines import BUILD, Recompute
from hessdiag.curvature.structured import (
    NotStructured,
    assembly,
    make_plan,
    sites,
    structured_matrix,
)
from hessdiag.data import row_count
from sample_networks import IGNORED, Case, Checkpointed, cross_entropy, pairs, regression


class Positions(nn.Module):
    """Layers that every position of a sample shares, mixed by attention-like products between."""

    def __init__(self, last=2):
        super().__init__()
        self.lift = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.query, self.value = nn.Linear(5, 3), nn.Linear(5, 3, bias=False)
        self.head = nn.Linear(3, last)

    def forward(self, x):
        x = self.norm(torch.tanh(self.lift(x)))
        mixed = torch.softmax(self.query(x) @ x[..., :3].mT, dim=-1) @ self.value(x)
        return self.head(mixed)


class Branches(nn.Module):
    """A layer whose output goes two ways, and comes together in a product."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.last = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(self.left(x) * torch.sigmoid(self.right(x)) + x)


def tokens(model, batch):
    found, wanted = model(batch[0]), batch[1]
    return F.cross_entropy(found.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)


def positions():
    return regression(Positions(), [(torch.randn(n, 2, 4), torch.randn(n, 2, 2)) for n in (4, 3)])


def masked():
    data = [(torch.randn(n, 2, 4), torch.randint(0, 3, (n, 2))) for n in (4, 3)]
    data[0][1][1:3, 1] = IGNORED
    return Case(Positions(last=3), data, tokens, [6.0, 6.0])


def convolution(**more):
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, **more),
        nn.Softplus(),
        nn.Conv2d(3, 2, 2, bias=False),
        nn.Flatten(),
        nn.Linear(2, 2),
    )
    return regression(model, pairs(2, 4, 4, sizes=(4, 3)))


def classes():
    data = [(torch.randn(n, 3), torch.randint(0, 2, (n,))) for n in (6, 3)]
    return Case(sample_networks.mlp(), data, cross_entropy, [6.0, 3.0])


def linear_readout():
    """Slopes of the last layer that nothing below bends; its inputs move all the same."""
    data = pairs(3)
    return Case(sample_networks.mlp(), data, lambda m, b: m(b[0]).mean(), [5.0, 3.0])


def one_sample():
    return regression(sample_networks.mlp(), pairs(3, sizes=(1, 4)))


OWN = {
    "positions": positions,
    "masked tokens": masked,
    "convolution": convolution,
    "reflected convolution": lambda: convolution(padding_mode="reflect"),
    "convolution in time": lambda: regression(
        nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)), pairs(2, 3)
    ),
    "branches": lambda: regression(Branches()),
    "classes": classes,
    "linear readout": linear_readout,
    "one sample": one_sample,
}
BORROWED = [
    *("tanh", "relu", "batchnorm eval", "groupnorm", "encoder layer", "lstm", "checkpoint"),
    *("outputs", "compiled inside", "spectral norm"),
]


def made(name):
    """The case of that name, the same numbers every time."""
    if name not in OWN:
        return sample_networks.make(name)
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        case = OWN[name]()
    case.trainable = [name for name, _ in case.model.named_parameters()]
    return case


@pytest.fixture
def eager(monkeypatch):
    """Structure wherever there is any, however little it saves."""
    monkeypatch.setattr(sites, "MOST_POSITIONS", 100)
    monkeypatch.setattr(sites, "LEAST_SAVED", 1)


def by_structure(case, curvature="hessian", only=None):
    """The matrix by structure, the plan, and the places of the block in the network's matrix."""
    with sample_networks.lent(case.task) as (objective, named):
        chosen = [n for n in named if only is None or n in only]
        plan = make_plan(objective, [named[n] for n in chosen])
        steps = []
        matrix = structured_matrix(objective, plan, curvature, step=lambda: steps.append(1))
    places, start = {}, 0
    for name in case.trainable:
        count = named[name].numel()
        places[name] = torch.arange(start, start + count)
        start += count
    return matrix, plan, torch.cat([places[name] for name in chosen])


def covered(plan):
    kept = torch.ones(plan.size, dtype=torch.bool)
    kept[plan.others] = False
    return kept


def assert_is_the_dense_matrix(matrix, plan, dense):
    kept = covered(plan)
    size = float(dense.abs().max())
    assert kept.any()
    assert (matrix[kept][:, kept] - dense[kept][:, kept]).abs().max() <= 1e-13 * size
    assert torch.equal(matrix, matrix.T)
    assert not matrix[~kept].any()


@pytest.mark.parametrize("name", [*OWN, *BORROWED])
def test_the_matrix_by_structure_is_the_dense_hessian(eager, name):
    case = made(name)
    matrix, plan, _ = by_structure(case)
    assert_is_the_dense_matrix(matrix, plan, sample_networks.dense_hessian(case))


@pytest.mark.parametrize("name", ["positions", "convolution", "branches", "classes", "relu"])
def test_the_gauss_newton_matrix_by_structure_is_the_dense_one(eager, name):
    case = made(name)
    matrix, plan, _ = by_structure(case, "ggn")
    assert_is_the_dense_matrix(matrix, plan, sample_networks.dense_ggn(case))


@pytest.mark.parametrize(
    "only",
    [
        ("first.weight", "first.bias"),
        ("left.weight",),
        ("right.bias",),
        ("last.weight", "left.bias", "first.weight"),
    ],
)
def test_any_block_of_weights_has_its_part_of_the_matrix(eager, monkeypatch, only):
    monkeypatch.setattr(assembly, "NUMBERS", 16)  # a few samples and features at a time
    case = made("branches")
    matrix, plan, places = by_structure(case, only=only)
    assert not len(plan.others)
    dense = sample_networks.dense_hessian(case)[places][:, places]
    assert_is_the_dense_matrix(matrix, plan, dense)


def test_a_matrix_larger_than_a_slab_is_put_in_order(eager, monkeypatch):
    monkeypatch.setattr(assembly, "SLAB", 7)
    case = made("tanh")
    matrix, plan, _ = by_structure(case)
    assert_is_the_dense_matrix(matrix, plan, sample_networks.dense_hessian(case))


def test_a_layer_costs_a_direction_per_neuron_and_position(eager):
    steps = []
    case = made("positions")
    with sample_networks.lent(case.task) as (objective, named):
        plan = make_plan(objective, list(named.values()))
        structured_matrix(objective, plan, "hessian", step=lambda: steps.append(1))
    neurons = 5 + 3 + 3 + 2
    assert plan.directions == 2 * neurons
    assert plan.size - len(plan.others) == (4 + 1) * 5 + (5 + 1) * 3 + 5 * 3 + (3 + 1) * 2
    assert len(plan.others) == 5 + 5  # of the norm
    assert plan.products == plan.directions + 10
    assert len(steps) == 2 * plan.directions  # two batches


def plan_of(case):
    with sample_networks.lent(case.task) as (objective, named):
        return make_plan(objective, list(named.values()))


def test_a_layer_with_more_positions_than_weights_is_left_to_products():
    case = regression(
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(18, 4), nn.Linear(4, 2)),
        pairs(1, 4, 4),
    )
    plan = plan_of(case)
    assert [site.layer.name for site in plan.sites] == ["2", "3"]
    assert plan.others.tolist() == list(range(10))


def test_a_convolution_with_groups_is_left_to_products(eager):
    model = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(8, 2))
    plan = plan_of(regression(model, pairs(2, 3)))
    assert [site.layer.name for site in plan.sites] == ["2"]


def test_structure_is_worth_it_from_some_products_on():
    small, large = (plan_of(regression(nn.Linear(3, k), pairs(3, out=k))) for k in (2, 40))
    assert (small.size, small.products, small.worthwhile) == (8, 2, False)
    assert (large.size, large.products, large.worthwhile) == (160, 40, True)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("tied transformer", {"embed.weight"}),  # the head's, too
        ("lstm", {"rnn.weight_ih_l0", "rnn.bias_hh_l0"}),
        ("partial", {"first.weight", "first.bias", "unused.weight"}),
        ("spectral norm", {"0.parametrizations.weight.original"}),
    ],
)
def test_weights_that_act_in_other_ways_are_left_to_products(eager, name, left):
    case = made(name)
    with sample_networks.lent(case.task) as (objective, named):
        plan = make_plan(objective, list(named.values()))
        taken = {site.layer.weight for site in plan.sites}
    assert left <= set(named)
    assert taken.isdisjoint(left)


def apart(model, batch):
    """Compares the samples of a batch."""
    found = model(batch[0])
    return (found @ found.T).softmax(dim=1).square().mean()


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Case(sample_networks.mlp(), pairs(3), apart, [5.0, 3.0]),
        lambda: sample_networks.make("batchnorm train"),
    ],
    ids=["contrastive", "batchnorm train"],
)
def test_samples_that_interact_are_told(eager, curvature, build):
    with pytest.raises(NotStructured, match="depends on other samples"):
        by_structure(build(), curvature)


def test_a_loss_without_second_derivative_is_told(eager):
    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no second derivative")

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * Slope.apply(ctx.saved_tensors[0])

    case = Case(nn.Linear(3, 2), pairs(3, sizes=(5,)), lambda m, b: Square.apply(m(b[0])), [5.0])
    case.trainable = ["weight", "bias"]
    with pytest.raises(NotStructured, match="no second derivative"):
        by_structure(case)


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature(eager):
    matrix, plan, _ = by_structure(made("linear loss"))
    assert len(plan.sites) == 1
    assert not matrix.any()


def test_the_model_is_left_without_hooks(eager):
    case = made("branches")
    by_structure(case)
    with pytest.raises(NotStructured):
        by_structure(sample_networks.make("batchnorm train"))
    for module in case.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None and p.requires_grad for p in case.model.parameters())


def test_a_layer_that_some_batches_call_twice_is_left_to_products(eager):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.again, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = torch.tanh(self.again(x))
            return self.head(torch.tanh(self.again(x)) if len(x) == 3 else x)

    plan = plan_of(regression(Sometimes()))
    assert [site.layer.name for site in plan.sites] == ["head"]


def test_equal_terms_of_many_samples_are_summed_without_drift(eager):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(0.75)
        model[1].weight.fill_(1.0)
    data = [(torch.ones(30000, 1), torch.zeros(30000, 1))]
    with sample_networks.lent(regression(model, data).task) as (objective, named):
        plan = make_plan(objective, list(named.values()))
        matrix = structured_matrix(objective, plan, "hessian", step=lambda: None)
    expected = torch.tensor([[2.0, 3.0], [3.0, 1.125]])  # of (v w)² where w = 0.75 and v = 1
    assert torch.allclose(matrix, expected.double(), rtol=2e-14, atol=0)


def test_products_in_float32_make_a_matrix_right_to_their_precision(eager):
    case = made("classes")
    with sample_networks.lent(case.task, dtype=torch.float32) as (objective, named):
        parameters = list(named.values())
        plan = make_plan(objective, parameters)
        matrix = structured_matrix(objective, plan, "hessian", step=lambda: None)
        assert matrix.dtype == torch.float64
        vector = torch.ones(plan.size)
        product = Recompute(objective, parameters, BUILD["hessian"])(vector)
    dense = sample_networks.dense_hessian(case)
    assert (matrix - dense).abs().max() <= 1e-6 * dense.abs().max()
    assert torch.allclose(matrix @ vector.double(), product.double(), rtol=1e-4, atol=1e-6)


def test_the_sample_cases_have_ragged_batches():
    assert len({row_count(batch) for batch in made("positions").data}) == 2
    assert isinstance(made("checkpoint").model, Checkpointed)
