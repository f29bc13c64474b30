from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from torch import nn

from hessdiag.curvature.engines import make_engine
from hessdiag.curvature.loan import bare, exact_arithmetic, has_rnn, loan
from hessdiag.errors import InputError, TaskError

CPU = torch.device("cpu")
WIDE = {"mode": "eval", "dtype": torch.float64, "device": CPU}


class Cached(nn.Module):
    """A model with everything that a measurement could leave behind."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.register_buffer("drift", torch.zeros(1))
        self.register_buffer("nothing", None)
        self.scale = torch.ones(2)
        self.scales = [torch.ones(2), torch.ones(2)]
        self._table = {"shift": torch.zeros(2)}
        self.seen, self.recent, self.names = [], deque(maxlen=3), {"start"}
        self.calls = 0
        self.body.eval()

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        self.scratch = self.scratch * 2
        self.seen.append(self.calls)
        self.recent.append(self.calls)
        self.names.add(str(self.calls))
        self._table[self.calls] = x.detach()
        self.leftover = x
        self.drift.add_(x.detach().mean())
        found = self.frozen(self.head(self.body(x))) * self.scale + self._table["shift"]
        return found * self.scales[0]


def states(model):
    """Everything of a model that can be compared."""
    named = dict(model.named_parameters())
    modules = dict(model.named_modules())
    return {
        "tensors": {k: v.clone() for k, v in (*named.items(), *model.named_buffers())},
        "types": {k: (v.dtype, v.requires_grad, v.is_leaf) for k, v in named.items()},
        "pointers": {k: v.data_ptr() for k, v in (*named.items(), *model.named_buffers())},
        "objects": {k: id(v) for k, v in (*named.items(), *model.named_buffers())},
        "grads": {
            k: None if v.grad is None else (id(v.grad), v.grad.clone()) for k, v in named.items()
        },
        "modes": {k: m.training for k, m in modules.items()},
        "attributes": {k: {a: id(v) for a, v in m.__dict__.items()} for k, m in modules.items()},
        "contents": {
            k: {
                a: list(v)
                for a, v in m.__dict__.items()
                if isinstance(v, dict | list | set | deque)
            }
            for k, m in modules.items()
        },
        "hooks": {
            k: list(m._forward_hooks) + list(m._forward_pre_hooks) for k, m in modules.items()
        },
        "random": (torch.get_rng_state(), np.random.get_state()[1], random.getstate()),  # noqa: NPY002
        "switches": switches(),
    }


def switches():
    return (
        torch.get_default_dtype(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,
        torch.backends.cudnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[k], second[k]) for k in first)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_same(before, after):
    for part, value in before.items():
        assert same(value, after[part]), part


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Cached()
    model.train()
    model.body[1].eval()
    model.register_forward_hook(lambda *_: None)
    # Some gradients are there, one is not.
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.body[0].weight.grad = torch.zeros_like(model.body[0].weight)
    return model


def loss(model, batch):
    random.random()
    np.random.rand()  # noqa: NPY002
    torch.rand(1)
    model.register_forward_hook(lambda *_: None)
    return model(batch).square().mean()


def measure(model, networks, loss=loss, mode="eval"):
    task = networks.Task(model, [torch.ones(5, 3), torch.zeros(2, 3)], loss, mode=mode)
    with networks.lent(task) as (objective, named):
        parameters = list(named.values())
        for engine in ("kept", "recompute"):
            product = make_engine(objective, parameters, curvature="hessian", engine=engine)
            product(torch.ones(sum(p.numel() for p in parameters), dtype=torch.float64))
        objective.value()
        objective.gradient(parameters)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_measurement_leaves_everything_bit_for_bit(model, networks, mode):
    before = states(model)
    measure(model, networks, mode=mode)
    assert_same(before, states(model))
    assert not hasattr(model, "leftover")


@pytest.mark.parametrize(
    ("error", "seen"), [(ValueError("no"), TaskError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_also_after_an_error_in_the_loss(model, networks, error, seen):
    def failing(model, batch):
        loss(model, batch)
        if model.calls > 3:
            raise error
        return loss(model, batch)

    before = states(model)
    with pytest.raises(seen):
        measure(model, networks, failing)
    assert_same(before, states(model))


@pytest.mark.parametrize(
    "surroundings",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.FLASH_ATTENTION]),
    ],
    ids=["no_grad", "inference_mode", "autocast", "flash"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_callers_surroundings_change_no_number_and_come_back(networks, surroundings, dtype):
    case = networks.make("encoder layer")

    def product():
        with networks.lent(case.task, dtype) as (objective, named):
            parameters = list(named.values())
            engine = make_engine(objective, parameters, curvature="hessian")
            n = sum(p.numel() for p in parameters)
            return engine(torch.linspace(-1, 1, n, dtype=dtype)).tolist()

    plain = product()
    before = states(case.model)
    with surroundings():
        inside = switches()
        found = product()
        assert switches() == inside
    assert found == plain
    assert_same(before, states(case.model))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_training_goes_on_as_if_nothing_had_happened(networks, kind):
    def train(measured):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        optimizer = kind(model.parameters(), lr=0.1)
        for step in range(6):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            x = torch.randn(8, 3)
            if measured:
                measure(model, networks, lambda m, b: m(b).square().mean())
            model(x).square().mean().backward()
            if measured:
                measure(model, networks, lambda m, b: m(b).square().mean(), mode="train")
            optimizer.step()
        return model.state_dict()

    assert same(dict(train(measured=False)), dict(train(measured=True)))


def test_a_gradient_hook_still_fires_afterwards(networks):
    model, fired = nn.Linear(3, 2), []
    model.weight.register_hook(lambda g: fired.append("hook"))
    model.weight.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    with loan([model], **WIDE):
        pass
    model(torch.ones(1, 3)).sum().backward()
    assert fired == ["hook", "accumulated"]


def test_inside_everything_is_a_copy_in_the_working_precision(model):
    pointers = states(model)["pointers"]
    with loan([model], **WIDE):
        inside = states(model)
        assert all(
            dtype == torch.float64 and not grad for dtype, grad, _ in inside["types"].values()
        )
        assert not set(inside["pointers"].values()) & set(pointers.values())
        assert model.steps.dtype == torch.int64
        assert model.scale.dtype == model.scales[1].dtype == torch.float64
        assert model._table["shift"].dtype == torch.float64
        assert not any(m.training for m in model.modules())
        assert all(p.grad is None for p in model.parameters())


def test_a_parameter_keeps_its_identity_inside(model):
    before = [id(p) for p in model.parameters()]
    with loan([model], **WIDE):
        assert [id(p) for p in model.parameters()] == before


def test_train_mode_is_every_modules_mode(model):
    with loan([model], mode="train", dtype=torch.float64, device=CPU):
        assert all(m.training for m in model.modules())


def test_loans_nest():
    model = nn.Linear(3, 2)
    pointer = model.weight.data_ptr()
    with loan([model], mode="eval", dtype=torch.float32, device=CPU):
        inner = model.weight.data_ptr()
        with loan([model], **WIDE):
            assert model.weight.dtype == torch.float64
        assert model.weight.data_ptr() == inner
    assert model.weight.data_ptr() == pointer
    assert model.weight.requires_grad


def test_shared_modules_and_tied_parameters_stay_shared():
    shared = nn.Linear(3, 3)
    model = nn.ModuleList([shared, shared, nn.Linear(3, 3)])
    model[2].weight = shared.weight
    with loan([model], **WIDE):
        assert model[2].weight is model[0].weight
        assert model[1] is model[0]
    assert model[2].weight is shared.weight


def test_a_float16_network_comes_back_in_float16():
    model = nn.Linear(3, 2).half()
    before = copy.deepcopy(model.state_dict())
    with loan([model], **WIDE):
        assert model(torch.ones(1, 3, dtype=torch.float64)).dtype == torch.float64
    assert same(OrderedDict(before), model.state_dict())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "'weight' is complex"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight' is on the meta device"),
    ],
)
def test_parameters_without_a_real_number_are_refused(make, reason):
    with pytest.raises(InputError, match=reason), loan([make()], **WIDE):
        pass


def test_a_model_made_in_inference_mode_is_refused_with_the_remedy():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="build the model outside"), loan([model], **WIDE):
        pass


def test_compile_and_parallel_wrappers_are_taken_off():
    inner = nn.Linear(2, 2)
    for wrapped in (
        torch.compile(inner),
        nn.DataParallel(inner),
        nn.DataParallel(torch.compile(inner, backend="eager")),
        torch.compile(nn.DataParallel(inner), backend="eager"),
        inner,
    ):
        assert bare(wrapped) is inner


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh(self.layer(x))


def test_what_is_compiled_runs_eagerly_and_is_compiled_again_afterwards(networks):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    @torch.compile(backend=backend)
    def loss(output):
        return output.square().mean()

    whole, part = Own(), nn.Sequential(torch.compile(Own(), backend=backend))
    whole.compile(backend=backend)
    for model in (whole, part):
        measure(model, networks, lambda m, b: loss(m(b)))
    assert not compiled
    for model in (whole, part):
        loss(model(torch.ones(5, 3)).detach())
    assert compiled


def test_the_record_says_what_was_switched():
    with exact_arithmetic([nn.LSTM(2, 2)], torch.float64) as record:
        assert not torch.backends.cudnn.enabled
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
        assert torch.get_default_dtype() == torch.float64
    assert record["attention"] == "math"
    assert record["tf32"] is False
    assert record["cudnn_rnn"] == "off"
    assert has_rnn([nn.Sequential(nn.GRU(2, 2))])
    with exact_arithmetic([nn.Linear(2, 2)], torch.float64) as record:
        assert torch.backends.cudnn.enabled
    assert record["cudnn_rnn"] == "not used"


def tf32_is_off():
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    return not any(kind.fp32_precision == "tf32" for kind in kinds)


OLD = [("matmul", True), ("matmul", False), ("cudnn", False), ("precision", "medium")]
NEW = [("new matmul", "tf32"), ("new conv", "ieee")]


@pytest.mark.parametrize(("what", "value"), OLD + NEW)
def test_tf32_is_off_inside_whichever_interface_set_it(what, value):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    newer = (matmul, cudnn.conv, cudnn.rnn, torch.backends.mkldnn.matmul)

    def read():
        return [kind.fp32_precision for kind in newer]

    default, flag = read(), cudnn.allow_tf32
    try:
        if what == "matmul":
            matmul.allow_tf32 = value
        elif what == "cudnn":
            cudnn.allow_tf32 = value
        elif what == "precision":
            torch.set_float32_matmul_precision(value)
        elif what == "new matmul":
            matmul.fp32_precision = value
        else:
            cudnn.conv.fp32_precision = value
        before = read()
        with exact_arithmetic([], torch.float64):
            assert tf32_is_off()
        assert read() == before
        if (what, value) in OLD:
            assert torch.get_float32_matmul_precision() == {
                ("precision", "medium"): "medium", ("matmul", True): "high"
            }.get((what, value), "highest")  # fmt: skip
    finally:
        for kind, setting in zip(newer, default, strict=True):
            kind.fp32_precision = setting
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = flag
        for kind, setting in zip(newer, default, strict=True):
            kind.fp32_precision = setting
