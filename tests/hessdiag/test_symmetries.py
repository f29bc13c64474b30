import contextlib
import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hessdiag import Task, analyze
from hessdiag.blocks import Block
from hessdiag.invariance import MOST_PRODUCTS, Claim, probed
from hessdiag.symmetries import Symmetries, find_symmetries
from lent_scenes import Held, lent_scene, linear_task
from sample_networks import Case, dense_hessian, mse


@pytest.fixture(autouse=True)
def same_numbers():
    with torch.random.fork_rng():
        torch.manual_seed(11)
        yield


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def perturbed(model):
    """At random biases and norms, so that nothing is zero or one by initialisation."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def classified(model, *shape, classes=3, sizes=(12, 7), mode="eval", loss=cross_entropy):
    data = [
        (torch.randn(n, *shape, dtype=torch.float64), torch.randint(0, classes, (n,)))
        for n in sizes
    ]
    return Case(perturbed(model), data, loss, [float(n) for n in sizes], mode=mode)


class Analysed:
    """The symmetries of any block of a network whose whole Hessian is known."""

    def __init__(self, case):
        case.trainable = [n for n, _ in case.model.named_parameters()]
        plain = dataclasses.replace(case, model=copy.deepcopy(case.model))
        self.task = case.task
        self.matrix = dense_hessian(plain)

    def __call__(self, *names, **options):
        with lent_scene(self.task, matrix=self.matrix, **options) as scene:
            self.places = torch.cat([scene.places()[n] for n in names or scene.places()])
            matrix = self.matrix[self.places][:, self.places]
            block = Block("block", tuple(names) or scene.block.parameters, len(matrix))
            size = matrix.abs().amax(dim=1)
            part = dataclasses.replace(
                scene,
                block=block,
                dead=size <= 1e-13 * size.max(),
                matrix=matrix,
                product=lambda v: matrix @ v,
            )
            return find_symmetries(part).found


def tanh_net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_a_tanh_network_has_only_the_shift_of_its_softmax():
    found = Analysed(classified(tanh_net(), 4))
    assert found() == ["softmax shift"]
    assert found("0.weight", "0.bias") == []
    assert found("2.weight", "2.bias") == ["softmax shift"]
    assert found("2.weight") == ["softmax shift"]


def test_the_shift_is_a_null_space_of_one_more_than_the_inputs():
    found = Analysed(classified(tanh_net(), 4, sizes=(40,)))
    found("2.weight", "2.bias")
    values = torch.linalg.eigvalsh(found.matrix[found.places][:, found.places])
    assert int((values.abs() < 1e-13 * values.max()).sum()) == 5 + 1


def test_squared_errors_leave_no_shift():
    data = [(torch.randn(12, 4).double(), torch.randn(12, 3).double())]
    assert Analysed(Case(perturbed(tanh_net()), data, mse, [12.0]))() == []


@pytest.mark.parametrize("kind", [nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU])
def test_only_relus_pass_scales_on(kind):
    model = nn.Sequential(
        *(nn.Linear(4, 5), kind(), nn.Linear(5, 3), kind(), nn.Linear(3, 2)),
    )
    data = [(torch.randn(30, 4).double(), torch.randn(30, 2).double())]
    found = Analysed(Case(perturbed(model), data, mse, [30.0]))
    passes = kind in (nn.ReLU, nn.LeakyReLU)
    both = ["ReLU rescaling: 0 – 2", "ReLU rescaling: 2 – 4"]
    assert [s for s in found() if not s.startswith("dead")] == (both if passes else [])
    one = found("0.weight", "0.bias", "2.weight", "2.bias")
    assert both[0] in one if passes else not one
    assert not [s for s in found("0.weight", "0.bias") if "rescaling" in s]


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Tanh])
def test_where_the_gradient_vanishes_products_tell_symmetries_from_flat_directions(kind):
    model = perturbed(nn.Sequential(nn.Linear(4, 5), kind(), nn.Linear(5, 3)))
    x = torch.randn(60, 4).double()
    data = [(x, model(x).detach())]
    found = Analysed(Case(model, data, mse, [60.0]))()
    assert found == (["ReLU rescaling: 0 – 2"] if kind is nn.ReLU else [])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_channels_before_batchnorm_are_scale_invariant_only_in_train_mode(mode):
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()),
        nn.Linear(3, 3),
    )
    found = Analysed(classified(model, 1, 5, 5, sizes=(40,), mode=mode))
    scales = ["scale-invariant: 0.weight (2 groups)", "scale-invariant: 4.weight (3 groups)"]
    passed = "rescaling: 1 – 4"  # gamma, beta and the weights behind the ReLU
    if mode == "train":
        assert found() == [*scales, "softmax shift", passed]
        assert found("0.weight") == scales[:1]
    else:
        assert found() == ["softmax shift", passed]
        assert found("0.weight") == []


def norm_net(norm):
    return lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), norm(), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
    )


NORMS = {
    "batch": (
        norm_net(lambda: nn.BatchNorm2d(4)),
        ["scale-invariant: 0.weight (4 groups)", "bias before BatchNorm: 0.bias"],
    ),
    "instance": (
        norm_net(lambda: nn.InstanceNorm2d(4, affine=True)),
        ["scale-invariant: 0.weight (4 groups)", "bias before InstanceNorm: 0.bias"],
    ),
    "group": (
        norm_net(lambda: nn.GroupNorm(2, 4)),
        ["scale-invariant: 0.weight + 0.bias (2 groups)"],
    ),
    "all channels": (
        norm_net(lambda: nn.GroupNorm(1, 4)),
        ["scale-invariant: 0.weight + 0.bias (1 group)"],
    ),
    "none": (norm_net(nn.Identity), []),
}


@pytest.mark.parametrize(("build", "expected"), NORMS.values(), ids=NORMS)
def test_the_groups_of_a_scale_are_those_of_the_normalisation(build, expected):
    case = classified(build(), 1, 5, 5, sizes=(20,), mode="train")
    assert Analysed(case)("0.weight", "0.bias") == expected


def test_layer_normalisation_ties_the_scale_of_a_layer_together_and_undoes_its_shift():
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    assert Analysed(classified(model, 4))("0.weight", "0.bias") == [
        "scale-invariant: 0.weight + 0.bias (1 group)",
        "shift before LayerNorm: 0",
    ]


def test_rms_normalisation_leaves_the_shift_in_place():
    model = nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.Tanh(), nn.Linear(5, 3))
    expected = ["scale-invariant: 0.weight + 0.bias (1 group)"]
    assert Analysed(classified(model, 4))("0.weight", "0.bias") == expected


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_eps_of_what_normalises_is_made_negligible_and_put_back(mode):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.LayerNorm(5), nn.Linear(5, 3))
    case = classified(model, 4, mode=mode)
    with lent_scene(case.task) as scene:
        with probed(scene, None, 1e-13):
            assert (model[1].eps < 1e-14) == (mode == "train")  # else it scales a constant
            assert model[2].eps < 1e-14
        assert model[1].eps == model[2].eps == 1e-5


class NormalNoiseFloor(nn.Module):
    """Divides by a norm that its eps keeps away from: nothing here is invariant."""

    def __init__(self):
        super().__init__()
        self.eps = 1.0

    def forward(self, x):
        return x / torch.sqrt(x.square().sum(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("layer", [NormalNoiseFloor, lambda: nn.LayerNorm(5, eps=0.1)])
def test_an_eps_that_matters_is_part_of_the_network(layer):
    model = nn.Sequential(nn.Linear(4, 5), layer(), nn.Linear(5, 3))
    eps = model[1].eps
    case = classified(model, 4)
    with lent_scene(case.task) as scene:
        with probed(scene, None, 1e-13):
            assert model[1].eps == eps
        found = find_symmetries(scene, None, 1e-13).found
    assert not any(text.startswith("scale-invariant") for text in found)


def test_a_gradient_that_is_given_does_not_hide_what_eps_breaks():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    with lent_scene(classified(model, 4, mode="train").task) as scene:
        given = scene.objective.gradient(scene.parameters)
        assert (
            find_symmetries(scene, given, 1e-13).found[0] == "scale-invariant: 0.weight (5 groups)"
        )


def test_channels_without_effect_are_not_counted_among_the_groups():
    case = classified(norm_net(lambda: nn.BatchNorm2d(4))(), 1, 5, 5, sizes=(20,), mode="train")
    with torch.no_grad():
        case.model[1].weight[2] = 0
    expected = ["scale-invariant: 0.weight (3 groups)", "bias before BatchNorm: 0.bias"]
    assert Analysed(case)("0.weight", "0.bias") == [*expected, "dead: 9 rows"]


def test_a_block_without_symmetries_costs_no_product(monkeypatch):
    taken = []
    monkeypatch.setattr("hessdiag.invariance.hessian_product", lambda *_: taken.append(1))
    data = [(torch.randn(12, 4).double(), torch.randn(12, 3).double())]
    with lent_scene(Case(perturbed(tanh_net()), data, mse, [12.0]).task) as scene:
        assert find_symmetries(scene, None, 1e-13) == Symmetries([], 0, 0)
    assert taken == []


def everywhere(direction):
    return Claim(torch.arange(len(direction)), direction.double())


def test_nothing_is_seen_where_the_hessian_is_zero():
    slopes = [torch.randn(5)]
    with lent_scene(linear_task([[5]], [slopes])) as scene, probed(scene, None, 1e-13) as probe:
        assert probe.settle([everywhere(torch.randn(5))]) == [False]
        assert probe.level(everywhere(torch.zeros(5)))
        assert not probe.level(everywhere(slopes[0]))


SIZE = 12


@contextlib.contextmanager
def claimed(curvatures, flat, *, dtype=torch.float64, **limits):
    """Blocks on the diagonal of H, some with a null vector of ones: each is claimed to have it."""
    null = torch.eye(SIZE, dtype=torch.float64) - 1 / SIZE
    eye = torch.eye(SIZE, dtype=torch.float64)
    parts = [c * (null if i in flat else eye) for i, c in enumerate(curvatures)]
    matrix = torch.block_diag(*parts)
    task = Task(Held([[len(matrix)]]), [matrix[None]], lambda m, b: 0.5 * (b[0] @ m() @ m()))
    with lent_scene(task, dtype=dtype) as scene, probed(scene, None, 1e-30, **limits) as probe:
        ones = torch.ones(SIZE, dtype=dtype)
        places = torch.arange(len(matrix)).reshape(-1, SIZE)
        yield probe, [Claim(where, ones) for where in places]


def test_claims_that_all_hold_cost_two_products_together():
    with claimed([1.0] * 30, range(30)) as (probe, claims):
        assert probe.settle(claims) == [True] * 30
        assert (probe.products, probe.asked, probe.untested) == (2, 30, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("wrong", [(0,), (20,), (3, 4, 17), range(24)], ids=str)
def test_claims_that_do_not_hold_are_told_from_those_that_do(wrong, dtype):
    flat = set(range(24)) - set(wrong)
    with claimed([1.0] * 24, flat, dtype=dtype) as (probe, claims):
        assert probe.settle(claims) == [i in flat for i in range(24)]
        differences = 1 if dtype == torch.float64 else 2  # in float32 they may be rounding
        assert probe.products <= differences * min(2 * 24, 2 + 2 * 5 * len(wrong))
        assert probe.untested == 0


def test_a_claim_is_not_taken_for_true_beside_a_much_larger_curvature():
    curvatures = [1e9, 1e-3, 1.0, 1e-9]
    with claimed(curvatures, {0, 3}) as (probe, claims):
        assert probe.settle(claims) == [True, False, False, True]
        assert probe.products <= 4 * len(claims)


@pytest.mark.parametrize("most", [0, 1, 2, 6, 7])
def test_what_products_do_not_reach_is_left_open_and_counted(most):
    with claimed([1.0] * 8, {6, 7}, most=most) as (probe, claims):
        verdicts = probe.settle(claims)
        assert probe.products <= most
        assert all(v is None or v == (i in {6, 7}) for i, v in enumerate(verdicts))
        assert verdicts.count(None) == probe.untested > 0


def test_the_search_ends_between_two_tests_when_the_time_is_up():
    times = iter([False, False, True, True, True, True])
    with claimed([1.0] * 8, {6, 7}, late=lambda: next(times, True)) as (probe, claims):
        verdicts = probe.settle(claims)
        assert probe.products == 4
        assert verdicts == [None, None, None, None, None, None, None, None]


def test_no_claims_cost_nothing():
    with claimed([1.0], {0}) as (probe, _):
        assert probe.settle([]) == []
        assert probe.products == 0


def normalised_chain(layers=24, width=8):
    stages = [(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*(m for stage in stages for m in stage), nn.Linear(width, 3))


def test_every_layer_of_a_deep_network_is_tested_with_few_products():
    with lent_scene(classified(normalised_chain(), 8, sizes=(30,)).task) as scene:
        found = find_symmetries(scene, None, 1e-13)
    assert found.untested == 0
    assert found.products == 6  # scales, shifts and rescalings: two each
    for kind in ("scale-invariant", "shift before LayerNorm", "rescaling"):
        assert sum(s.startswith(kind) for s in found.found) == 24


def test_null_vectors_that_move_with_the_norm_before_them_cost_no_product():
    names = [n for n, _ in Encoder().named_parameters()]
    with lent_scene(classified(Encoder(), 3, 2, sizes=(12,)).task) as scene:
        assert find_symmetries(scene, None, 1e-13).products == 4  # shifts and rescalings
    # Where the gradient vanishes they are null after all.
    behind = [n for n in names if n.startswith(("norm.", "head."))]
    model = Encoder()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-20  # a minimum with eps is none without
    data = [(torch.randn(12, 3, 2).double(), torch.randn(12, 3).double())]
    passed, null = "rescaling: norm – head", "LayerNorm null vectors: 3"
    moving = Case(perturbed(model), data, mse, [12.0])
    for task, expected in ((moving, [passed]), (still(model, data), [passed, null])):
        with lent_scene(task.task, behind) as scene:
            found = find_symmetries(scene, None, 1e-13).found
        assert [name for name in found if not name.startswith("scale-inv")] == expected


def still(model, data):
    """The same at a minimum."""
    x = data[0][0]
    return Case(model, [(x, model.eval()(x).detach())], mse, [float(len(x))])


def still_net(layers=24, width=3):
    """A network at a minimum: every first-order test passes, and nothing is symmetric."""
    layered = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())]
    return perturbed(nn.Sequential(*layered))


def test_what_fails_of_one_kind_leaves_products_for_the_others():
    layered = [m for _ in range(6) for m in (nn.Linear(4, 4), nn.LeakyReLU(0.3))]
    case = still(perturbed(nn.Sequential(*layered)), [(torch.randn(60, 4).double(),)])
    with lent_scene(case.task) as scene:
        found = find_symmetries(scene, None, 1e-13)
    assert found.untested > 0  # scales, which all fail at a minimum
    assert sum(name.startswith("ReLU rescaling") for name in found.found) == 5


@pytest.mark.parametrize("held", ["norm.weight", "norm.bias"])
def test_a_null_vector_moves_with_either_parameter_of_the_norm(held):
    data = [(torch.randn(12, 3, 2).double(), torch.randn(12, 3).double())]
    task = Case(perturbed(Encoder()), data, mse, [12.0]).task
    with lent_scene(task, [held, "head.weight", "head.bias"]) as scene:
        assert find_symmetries(scene, None, 1e-13) == Symmetries([], 0, 0)


def test_what_was_not_tested_is_said():
    case = still(still_net(), [(torch.randn(40, 3).double(),)])
    with lent_scene(case.task) as scene:
        found = find_symmetries(scene, None, 1e-13)
    assert found.products <= MOST_PRODUCTS
    assert found.untested > 0
    *_, last = found.found
    assert last.startswith(f"not tested: {found.untested} of ")
    assert last.endswith(" candidates (24 products)")


def test_no_symmetry_is_sought_after_the_time_is_up():
    with lent_scene(classified(tanh_net(), 4).task) as scene:
        found = find_symmetries(scene, None, 1e-13, late=lambda: True)
    assert found == Symmetries(["not tested: 1 of 1 candidates (--max-seconds)"], 0, 1)


def test_the_product_that_estimates_rounding_is_counted():
    with lent_scene(classified(tanh_net(), 4).task) as scene:
        assert find_symmetries(scene).products == 3
        assert scene.product.count == 1
        assert find_symmetries(scene, None, 1e-13).products == 2


def test_a_run_records_what_symmetries_cost_beside_the_products():
    task = classified(tanh_net(), 4).task
    run = analyze(task, variants="raw,jacobi", blocks="whole", device="cpu")
    record = run.provenance.environment["symmetry_products"]
    assert record == {"whole": 2}
    assert run["whole"].variants["raw"]["products"] == 43


def test_a_layer_after_layer_normalisation_has_a_null_vector_for_every_neuron():
    model = nn.Sequential(
        *(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh()),
        nn.Linear(4, 3),
    )
    found = Analysed(classified(model, 4, sizes=(60, 20)))
    assert found("3.weight", "3.bias") == ["LayerNorm null vectors: 4"]
    values = torch.linalg.eigvalsh(found.matrix[found.places][:, found.places])
    assert int((values.abs() < 1e-13 * values.max()).sum()) == 4
    assert found("3.weight") == []  # a shift needs the bias


def test_no_bias_is_needed_where_the_normalisation_has_none():
    norm = nn.LayerNorm(5, elementwise_affine=False)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, 4, bias=False), nn.Tanh())
    expected = ["LayerNorm null vectors: 4"]
    assert Analysed(classified(model, 4, classes=4))("2.weight") == expected


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.position = nn.Parameter(torch.randn(3, 4))
        self.encoder = nn.TransformerEncoderLayer(
            4, 2, 6, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.encoder(self.embed(x) + self.position).mean(dim=1)))


def test_the_symmetries_of_a_transformer():
    found = Analysed(classified(Encoder(), 3, 2, sizes=(12,)))
    attention = ["encoder.self_attn.in_proj_weight", "encoder.self_attn.in_proj_bias"]
    assert found(*attention) == [
        "LayerNorm null vectors: 12",
        "key bias: encoder.self_attn.in_proj_bias",
    ]
    assert found("encoder.linear1.weight", "encoder.linear1.bias") == ["LayerNorm null vectors: 6"]
    out = "encoder.self_attn.out_proj"
    assert found(f"{out}.weight", f"{out}.bias") == [f"shift before LayerNorm: {out}"]
    assert found("head.weight", "head.bias") == ["softmax shift", "LayerNorm null vectors: 3"]
    assert found("encoder.norm1.weight", "encoder.norm1.bias") == []
    assert found("position") == []
    assert found() == [
        "shift before LayerNorm: embed",
        f"shift before LayerNorm: {out}",
        "shift before LayerNorm: encoder.linear2",
        "softmax shift",
        "rescaling: encoder.norm2 – encoder.linear1",
        "rescaling: norm – head",
        "key bias: encoder.self_attn.in_proj_bias",
    ]


class Keyed(nn.Module):
    """Attention by hand, its projections apart or in one layer."""

    def __init__(self, *, apart):
        super().__init__()
        self.apart = apart
        if apart:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))
        else:
            self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        if self.apart:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.head((torch.softmax(q @ k.mT, dim=-1) @ v).mean(dim=1))


@pytest.mark.parametrize("apart", [True, False])
def test_the_bias_of_the_keys_has_no_effect(apart):
    found = Analysed(classified(Keyed(apart=apart), 5, 4))
    name = "k_proj" if apart else "qkv"
    assert found(f"{name}.weight", f"{name}.bias") == [f"key bias: {name}.bias"]
    if apart:
        assert found("q_proj.weight", "q_proj.bias") == []


class Indexed(nn.Module):
    """A bias that nothing reads, between layers without a normalisation."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(torch.tanh(hidden - hidden.mean(dim=0)))


def test_a_bias_is_before_batchnorm_only_where_one_follows():
    case = classified(Indexed(), 4, sizes=(20,))
    assert Analysed(case)("first.weight", "first.bias") == ["dead: 3 rows"]


def test_dead_rows_are_counted():
    case = classified(tanh_net(), 4)
    for x, _ in case.data:
        x[:, 2] = 0
    assert Analysed(case)("0.weight", "0.bias") == ["dead: 5 rows"]


def test_a_dead_unit_is_no_symmetry_of_its_scale():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    case = classified(model, 4)
    with torch.no_grad():
        case.model[0].bias[1] = -1e3
    assert Analysed(case)("0.weight", "0.bias") == ["dead: 5 rows"]


class Leaning(nn.Module):
    """A bias of which the loss is a linear function, and weights that do nothing."""

    def __init__(self):
        super().__init__()
        self.body, self.lean = nn.Linear(3, 1), nn.Linear(3, 2)

    def forward(self, x):
        return self.body(x), self.lean.bias.sum()


def test_rows_that_are_straight_but_not_level_are_not_called_dead():
    data = [(torch.randn(9, 3).double(), torch.randn(9, 1).double())]

    def loss(model, batch):
        value, slope = model(batch[0])
        return (value - batch[1]).square().mean() + slope

    found = Analysed(Case(perturbed(Leaning()), data, loss, [9.0]))
    assert found("lean.weight", "lean.bias") == ["dead: 6 rows"]


def test_weight_decay_breaks_no_symmetry_of_the_loss():
    case = classified(tanh_net(), 4)
    assert Analysed(case)(weight_decay=0.1) == ["softmax shift"]


def test_float32_sees_the_same_symmetries():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    task = classified(model, 4, sizes=(40,), mode="train").task
    with lent_scene(task, dtype=torch.float32) as scene:
        matrix = torch.eye(scene.block.size)  # a scale for the rounding of products
        part = dataclasses.replace(scene, product=lambda v: matrix @ v)
        found = find_symmetries(part).found
    assert found == [
        "scale-invariant: 0.weight (5 groups)",
        "softmax shift",
        "rescaling: 1 – 3",
    ]


class Once(torch.autograd.Function):
    """The identity; its gradient is the identity too, and cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return Never.apply(slope)


class Never(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        raise RuntimeError("no double backward")


def test_a_loss_without_a_double_backward_has_no_known_symmetries():
    def once(model, batch):
        return F.cross_entropy(Once.apply(model(batch[0])), batch[1])

    for loss, expected in ((cross_entropy, ["softmax shift"]), (once, [])):
        with lent_scene(classified(nn.Linear(4, 3), 4, loss=loss).task) as scene:
            assert find_symmetries(scene, None, 1e-13).found == expected


def test_the_model_is_left_as_it_was():
    case = classified(Encoder(), 3, 2, sizes=(5,))
    with lent_scene(case.task) as scene:
        before = {n: p.clone() for n, p in scene.named.items()}
        find_symmetries(scene)
        assert all(torch.equal(before[n], p) for n, p in scene.named.items())
        assert not any(p.requires_grad for p in scene.named.values())
        modules = list(scene.model.modules())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)
