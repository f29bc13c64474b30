"""Large cross-entropies have torch's values and derivatives, and keep no copies of the logits."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from hessdiag.curvature import cross_entropy as subject
from hessdiag.curvature.convexity import convex_loss
from hessdiag.curvature.cross_entropy import large_cross_entropy
from hessdiag.curvature.engines import Kept
from hessdiag.curvature.ggn import ggn_product
from hessdiag.curvature.loan import exact_arithmetic
from hessdiag.curvature.objective import Objective
from hessdiag.curvature.precision import hidden_casts, noise_of
from hessdiag.data import load_batches

ROWS, CLASSES = 5, 7
DOUBLE = {"dtype": torch.float64}
LABELS = torch.tensor([0, 6, 3, 3, 1])
IGNORED = torch.tensor([0, -100, 3, -100, 1])
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5, 1.0, 3.0], **DOUBLE)
SOME = {"label_smoothing": 0.3, "weight": WEIGHTS}
CASES = {
    "mean": (LABELS, {}),
    "sum": (LABELS, {"reduction": "sum"}),
    "none": (LABELS, {"reduction": "none"}),
    "ignored": (IGNORED, {}),
    "another is ignored": (LABELS, {"ignore_index": 3}),
    "one beyond all is ignored": (LABELS.where(LABELS != 3, 255), {"ignore_index": 255}),
    "weights": (LABELS, {"weight": WEIGHTS}),
    "smoothed": (LABELS, {"label_smoothing": 0.3}),
    "smoothed sum": (IGNORED, SOME | {"reduction": "sum"}),
    "everything": (IGNORED, SOME),
    "everything, each": (IGNORED, SOME | {"reduction": "none"}),
    "all smoothed": (IGNORED, SOME | {"label_smoothing": 1.0}),
}


@pytest.fixture(autouse=True)
def two_rows_at_once(monkeypatch):
    """The last piece is ragged."""
    monkeypatch.setitem(subject.ROWS_AT_ONCE, "cpu", 2 * CLASSES + 3)


def scores(scale: float = 1.0):
    torch.manual_seed(0)
    return (scale * torch.randn(ROWS, CLASSES, **DOUBLE)).requires_grad_(True)


@contextmanager
def counted(threshold: int = 1):
    """How often the replacement was asked, inside :func:`large_cross_entropy`."""
    calls = []
    forward = subject.LargeCrossEntropy.forward

    def counting(*arguments):
        calls.append(1)
        return forward(*arguments)

    subject.LargeCrossEntropy.forward = staticmethod(counting)
    try:
        with large_cross_entropy(threshold):
            yield calls
    finally:
        subject.LargeCrossEntropy.forward = staticmethod(forward)


def by_hand(logits, labels, *, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0):
    """The definition in torch's manual, written out; classes in dimension 1."""
    logs = logits - logits.exp().sum(1, keepdim=True).log()
    weight = torch.ones(CLASSES, **DOUBLE) if weight is None else weight
    counts = labels != ignore_index
    label = labels.where(counts, torch.tensor(0))
    hard = -weight[label] * logs.gather(1, label.unsqueeze(1)).squeeze(1)
    spread = -(logs * weight.reshape(1, -1, *[1] * (logs.dim() - 2))).sum(1) / CLASSES
    each = ((1 - label_smoothing) * hard + label_smoothing * spread) * counts
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.sum() / (weight[label] * counts).sum()


def derivatives(loss, logits):
    """Value, gradient and Hessian, the Hessian entry by entry through a double backward.

    What is not summed up is weighed by functions of the logits, so that the gradient of the
    losses' weights is seen, too.
    """
    value = loss(logits)
    total = value if value.dim() == 0 else (value * logits.square().sum(1)).sum()
    (slope,) = torch.autograd.grad(total, logits, create_graph=True)
    rows = [torch.autograd.grad(s, logits, retain_graph=True)[0] for s in slope.flatten()]
    return value.detach(), slope.detach(), torch.stack([row.flatten() for row in rows])


def assert_close(found, wanted):
    for ours, known in zip(found, wanted, strict=True):
        assert ours.shape == known.shape
        assert (ours - known).abs().max() <= 1e-13 * known.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("case", CASES)
def test_value_gradient_and_hessian_are_those_of_the_definition_and_of_torch(case):
    labels, options = CASES[case]
    with counted() as calls:
        found = derivatives(lambda z: F.cross_entropy(z, labels, **options), scores())
    assert calls
    assert_close(found, derivatives(lambda z: by_hand(z, labels, **options), scores()))
    assert_close(found, derivatives(lambda z: F.cross_entropy(z, labels, **options), scores()))


@pytest.mark.parametrize(
    "options", [{}, SOME, {"reduction": "none"}], ids=["plain", "some", "none"]
)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)], ids=["packed", "strided"])
def test_classes_may_stand_before_other_dimensions(order, options):
    torch.manual_seed(1)
    sizes = dict(zip(order, [(2, CLASSES, 2, 3)[k] for k in order], strict=True))
    raw = torch.randn([sizes[k] for k in order], **DOUBLE)
    labels = torch.randint(0, CLASSES, (2, 2, 3))

    def value(z, loss):
        return loss(z.permute(*(order.index(k) for k in range(4))), labels, **options)

    def all_of(loss):
        def total(z):
            each = value(z, loss)
            return (each * each).sum() if each.dim() else each

        return derivatives(total, raw.clone().requires_grad_(True))

    with counted() as calls:
        found = all_of(F.cross_entropy)
        shape = value(raw, F.cross_entropy).shape
    assert calls
    assert shape == (labels.shape if "reduction" in options else ())
    assert_close(found, all_of(by_hand))


@pytest.mark.parametrize("case", ["mean", "everything"])
def test_certain_predictions_have_the_limits_of_the_derivatives(case):
    """At logits of ±1e4 the probabilities are 0 and 1 to the last bit."""
    labels, options = CASES[case]
    right = torch.full((ROWS, CLASSES), -1e4, **DOUBLE)
    right[range(ROWS), [0, 2, 3, 0, 1]] = 1e4  # row 3 is wrong where it counts
    with counted():
        found = derivatives(lambda z: F.cross_entropy(z, labels, **options), right.requires_grad_())
    value, slope, hessian = found
    assert not hessian.any()
    if case == "mean":
        assert value == 2 * 2e4 / 5
        wanted = torch.zeros(ROWS, CLASSES, **DOUBLE)
        wanted[1, 2], wanted[1, 6], wanted[3, 0], wanted[3, 3] = 0.2, -0.2, 0.2, -0.2
        assert torch.equal(slope, wanted)
    assert_close(found, derivatives(lambda z: F.cross_entropy(z, labels, **options), right))


def test_two_equal_scores_far_above_the_rest_share_all_probability():
    logits = torch.full((1, CLASSES), -1e4, **DOUBLE)
    logits[0, :2] = 1e4
    with counted():
        value, slope, hessian = derivatives(
            lambda z: F.cross_entropy(z, torch.tensor([0])), logits.requires_grad_()
        )
    assert value == pytest.approx(math.log(2), rel=1e-12)
    assert slope[0, :2].tolist() == [-0.5, 0.5]
    assert hessian[:2, :2].tolist() == [[0.25, -0.25], [-0.25, 0.25]]
    assert not hessian[2:].any()


NOTHING = torch.full((ROWS,), -100)
NO_WEIGHT = torch.full((ROWS,), 3)


@pytest.mark.parametrize("labels", [NOTHING, NO_WEIGHT, NOTHING.where(LABELS != 3, 3)])
@pytest.mark.parametrize("options", [{"weight": WEIGHTS}, SOME], ids=["sharp", "smoothed"])
@pytest.mark.parametrize("caught", [False, True])
def test_where_nothing_is_weighed_the_mean_is_torchs_and_so_is_its_gradient(
    labels, options, caught
):
    """Undefined; but of ignored targets the gradient is zero."""

    def loss(z):
        value = F.cross_entropy(z, labels, **options)
        assert value.isnan()
        return value.nan_to_num() if caught else value

    with counted() as calls:
        value, slope, hessian = derivatives(loss, scores())
    assert calls
    wanted = derivatives(loss, scores())
    for found, known in zip((value, slope, hessian), wanted, strict=True):
        assert torch.equal(found.nan_to_num(7.0), known.nan_to_num(7.0))
    ignored = labels == -100
    assert not slope[ignored].any()
    assert slope[~ignored].isnan().all()
    assert not hessian.reshape(-1, ROWS, CLASSES)[:, ignored].any()


@pytest.mark.parametrize("options", [{}, SOME], ids=["plain", "some"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_ignored_spoils_no_value_by_being_no_number(wrong, reduction, options):
    def loss(z):
        rows = torch.cat([z[:1], torch.full((1, CLASSES), wrong, **DOUBLE), z[2:]])
        labels = torch.tensor([0, -100, 3, 2, 1])
        return F.cross_entropy(rows, labels, reduction=reduction, **options).sum()

    with counted() as calls:
        found = derivatives(loss, scores())
    assert calls
    assert not any(part.isnan().any() for part in found)
    assert_close(found, derivatives(loss, scores()))


def test_where_no_target_counts_the_sum_is_zero():
    with counted() as calls:
        found = derivatives(lambda z: F.cross_entropy(z, NOTHING, reduction="sum"), scores())
    assert calls
    assert not any(part.any() for part in found)


def test_a_forbidden_class_at_minus_infinity_stays_out_of_the_derivatives():
    """Masked vocabularies; the same as a network without that class."""
    short = scores()[:, :-1].detach()
    labels = LABELS.clamp(max=5)
    masked = torch.cat([short, torch.full((ROWS, 1), -torch.inf, **DOUBLE)], 1)

    def masked_loss(z):
        return F.cross_entropy(torch.cat([z, masked[:, -1:]], 1), labels)

    with counted() as calls:
        found = derivatives(masked_loss, short.clone().requires_grad_())
    assert calls
    wanted = derivatives(lambda z: F.cross_entropy(z, labels), short.clone().requires_grad_())
    assert_close(found, wanted)


def test_a_third_derivative_is_right_too():
    """A task's loss may hold a gradient itself."""

    def penalised(logits):
        loss = F.cross_entropy(logits, IGNORED, **SOME)
        (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
        return loss + slope.square().sum()

    with counted() as calls:
        found = derivatives(penalised, scores())
    assert calls
    assert_close(found, derivatives(penalised, scores()))


def test_several_products_may_be_taken_at_once():
    vectors = torch.eye(ROWS * CLASSES, **DOUBLE).reshape(-1, ROWS, CLASSES)
    logits = scores()
    with counted() as calls:
        loss = F.cross_entropy(logits, IGNORED, **SOME)
        (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
        (found,) = torch.autograd.grad(slope, logits, vectors, is_grads_batched=True)
    assert calls
    wanted = derivatives(lambda z: by_hand(z, IGNORED, **SOME), scores())[2]
    assert_close([found.reshape(wanted.shape)], [wanted])


def test_soft_labels_small_logits_and_transforms_stay_torchs_own():
    logits, soft = scores(), torch.full((ROWS, CLASSES), 1 / CLASSES, **DOUBLE)
    with counted() as calls:
        F.cross_entropy(logits, soft)
        F.cross_entropy(logits[0], LABELS[0])
        torch.func.grad(F.cross_entropy)(logits, LABELS)
        torch.func.vmap(F.cross_entropy)(logits.expand(2, -1, -1), LABELS.expand(2, -1))
        assert not calls
        F.cross_entropy(logits, LABELS)
        nn.CrossEntropyLoss()(logits, LABELS)
        assert len(calls) == 2
    with counted(ROWS * CLASSES + 1) as calls:
        F.cross_entropy(logits, LABELS)
    F.cross_entropy(logits, LABELS)
    assert not calls


def test_wrong_calls_are_refused_in_torchs_words():
    with counted(), pytest.raises(ValueError, match="batch_size"):
        F.cross_entropy(scores(), LABELS[:3])
    with counted(), pytest.raises(RuntimeError, match="label_smoothing must be between"):
        F.cross_entropy(scores(), LABELS, label_smoothing=1.5)
    with counted(), pytest.raises(RuntimeError, match="Long"):
        F.cross_entropy(scores(), LABELS.int())
    with counted() as calls, pytest.raises(IndexError, match=r"Target 7 is out of bounds"):
        F.cross_entropy(scores(), LABELS + 1)
    with pytest.raises(IndexError, match=r"Target -1 is out of bounds"), counted():
        F.cross_entropy(scores(), LABELS - 1)
    assert not calls


WEIGHTS_THAT_TORCH_REFUSES = {
    "too short": (WEIGHTS[:4], "all 7 classes"),
    "too long": (torch.cat([WEIGHTS, WEIGHTS]), "all 7 classes"),
    "float32": (WEIGHTS.float(), "expected scalar type"),
    "whole numbers": (torch.ones(CLASSES, dtype=torch.int64), "expected scalar type"),
    "learnt": (WEIGHTS.clone().requires_grad_(), "requires_grad"),
    "elsewhere": (WEIGHTS.to("meta"), "device|meta"),
}


@pytest.mark.parametrize("case", WEIGHTS_THAT_TORCH_REFUSES)
def test_weights_that_torch_refuses_are_refused_in_torchs_words(case, monkeypatch):
    weight, words = WEIGHTS_THAT_TORCH_REFUSES[case]
    labels = LABELS.clamp(max=3)  # within the shortest
    with pytest.raises((RuntimeError, NotImplementedError)) as own:
        F.cross_entropy(scores(), labels, weight=weight)
    assert own.match(words)
    monkeypatch.setattr(subject, "cross_entropy", None)  # which must not be asked
    with counted(), pytest.raises(own.type) as found:
        F.cross_entropy(scores(), labels, weight=weight)
    assert str(found.value) == str(own.value)


def objective(loss=nn.CrossEntropyLoss()):  # noqa: B008
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, CLASSES)).double()
    model.requires_grad_(False)
    batches = load_batches(
        [(torch.randn(ROWS, 4), LABELS)], lambda b: len(b[1]), device=torch.device("cpu"), **DOUBLE
    )
    return Objective(model, lambda m, batch: loss(m(batch[0]), batch[1]), batches)


NEGATIVE = {
    "no weights": None,
    "none": WEIGHTS,
    "of a target": WEIGHTS.where(WEIGHTS > 0, -0.1),
    "of another class": WEIGHTS.where(WEIGHTS != 2.0, -0.1),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("negative", NEGATIVE)
def test_the_loss_is_known_to_be_convex_where_no_weight_that_counts_is_negative(
    negative, smoothing
):
    loss = nn.CrossEntropyLoss(weight=NEGATIVE[negative], label_smoothing=smoothing)
    one = objective(loss)
    with counted() as calls:
        known = convex_loss(one, list(one.model.parameters()))
    assert calls
    wrong = negative == "of a target" or (negative == "of another class" and smoothing > 0)
    assert known == (not wrong)


def test_cross_entropy_of_bent_outputs_is_not_called_convex():
    one = objective(lambda z, y: F.cross_entropy(z.sin(), y))
    with counted():
        assert not convex_loss(one, list(one.model.parameters()))


def test_gauss_newton_products_are_those_with_the_softmax_matrix():
    one = objective()
    parameters = list(one.model.parameters())[2:]
    inputs = one.model[1](one.model[0](one.batches.items[0][0]))
    jacobian = torch.zeros(ROWS, CLASSES, 4 * CLASSES, **DOUBLE)  # weight row by row, then bias
    for c in range(CLASSES):
        jacobian[:, c, 3 * c : 3 * c + 3] = inputs
        jacobian[:, c, 3 * CLASSES + c] = 1
    p = one.model(one.batches.items[0][0]).softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    wanted = torch.einsum("rci,rcd,rdj->ij", jacobian, middle, jacobian) / ROWS
    with counted() as calls:
        engine = Kept(one, parameters, ggn_product)
    assert calls
    found = torch.stack([engine(unit) for unit in torch.eye(4 * CLASSES, **DOUBLE)])
    assert (found - wanted).abs().max() <= 1e-13 * wanted.abs().max()


def test_the_noise_of_the_products_is_measured_through_it():
    """Narrower arithmetic reaches the operations inside: about as noisy as torch's own."""
    one = objective()
    parameters = list(one.model.parameters())
    vector = torch.ones(sum(p.numel() for p in parameters), **DOUBLE)
    own = float(noise_of(one, parameters, "hessian")(vector).norm())
    with counted() as calls:
        ours = float(noise_of(one, parameters, "hessian")(vector).norm())
        assert calls
        assert not hidden_casts(one, parameters)
    assert 0.2 * own < ours < 5 * own


def test_an_analysis_replaces_large_ones_and_says_so():
    before = torch._C._nn.cross_entropy_loss
    with exact_arithmetic([], torch.float64) as record:
        assert torch._C._nn.cross_entropy_loss is not before
        assert str(subject.LARGE) in record["cross_entropy"]
    assert torch._C._nn.cross_entropy_loss is before


def test_the_graph_of_a_gradient_keeps_no_copy_of_the_logits():
    """Of everything saved for backward only the logits themselves are of their size."""
    logits = scores()
    pointers = set()

    def pack(tensor):
        if tensor.numel() >= logits.numel():
            pointers.add(tensor.untyped_storage().data_ptr())
        return tensor

    with counted() as calls, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = F.cross_entropy(logits * 1.0, LABELS, label_smoothing=0.1, weight=WEIGHTS)
        torch.autograd.grad(loss, logits, create_graph=True)
    assert calls
    assert len(pointers) == 1
