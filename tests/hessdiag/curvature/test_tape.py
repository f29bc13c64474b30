from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessdiag.curvature.engines.tape import CannotRecord, record


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B = numbers(4, 3), numbers(5, 4, seed=1)


def test_a_tape_gives_for_another_vector_what_the_function_gives():
    first, second = numbers(3, seed=2), numbers(3, seed=3)
    tape = record(lambda: [B @ (A @ first), A @ first], [first])
    high, low = tape([second])
    torch.testing.assert_close(high, B @ A @ second)
    torch.testing.assert_close(low, A @ second)


def test_what_does_not_depend_on_the_vector_is_computed_once():
    vector = numbers(3)
    tape = record(lambda: [(B @ A).exp() @ vector], [vector])
    assert [step.function for step in tape.steps] == [torch.ops.aten.mv.default]


def test_what_the_results_do_not_need_is_left_out():
    vector = numbers(3)

    def function():
        _ = (7 * vector).sum()
        return [2 * vector]

    assert len(record(function, [vector]).steps) == 1


def test_writes_into_an_intermediate_and_through_a_view_of_it_are_played():
    vector = numbers(4)

    def function(v):
        sums = 3 * v
        half = sums[:2]
        sums.add_(v)
        half.mul_(5)
        return [sums]

    tape = record(lambda: function(vector), [vector])
    other = numbers(4, seed=1)
    for _ in range(2):  # the second time nothing of the first is left
        torch.testing.assert_close(
            tape([other])[0], other * torch.tensor([20, 20, 4, 4.0]).double()
        )


def test_lists_of_tensors_several_results_and_keywords_are_played():
    vector = numbers(6)

    def function(v):
        left, right = v.split(3)
        return [
            torch.cat([right, A[0], left]) - torch.cat([0 * left, A[0], 0 * right]),
            right.sum(dim=0),
        ]

    tape = record(lambda: function(vector), [vector])
    other = numbers(6, seed=1)
    both, total = tape([other])
    wanted = torch.cat([other[3:], torch.zeros(3), other[:3]])
    torch.testing.assert_close(both, wanted, atol=1e-15, rtol=0)
    torch.testing.assert_close(total, other[3:].sum())


def test_a_result_that_does_not_depend_on_the_vector_is_zero():
    vector = numbers(3)
    tape = record(lambda: [2 * vector, torch.zeros(2, 2)], [vector])
    assert torch.equal(tape([vector])[1], torch.zeros(2, 2))
    assert not tape.steps[0].several


def test_the_vector_is_not_written():
    vector = numbers(3)
    with pytest.raises(CannotRecord, match="writes into"):
        record(lambda: [vector.mul_(2)], [vector])


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda v: [v * v.sum().item()], "number"),
        (lambda v: [torch.zeros(3).double().add_(v)], "writes into"),
    ],
    ids=["reads a number", "writes into a constant"],
)
def test_what_cannot_be_played_again_is_refused(function, why):
    vector = numbers(3)
    with pytest.raises(CannotRecord, match=why):
        record(lambda: function(vector), [vector])


def test_a_constant_that_changes_after_it_was_read_is_refused():
    vector, scale = numbers(3), numbers(3, seed=1)

    def function():
        read = scale * vector
        scale.mul_(2)
        return [read]

    with pytest.raises(CannotRecord, match="earlier operation"):
        record(function, [vector])


def test_a_copy_that_was_made_out_of_sight_is_refused():
    vector = numbers(3)
    with pytest.raises(CannotRecord, match="out of sight"):
        record(lambda: [2 * torch.from_numpy(vector.numpy())], [vector])


def test_narrow_arithmetic_shows_rounding():
    vector = numbers(3)
    tape = record(lambda: [B @ (A @ vector)], [vector])
    coarse = tape([vector], narrow=torch.float32)[0]
    assert coarse.dtype == torch.float32
    error = float((coarse.double() - B @ (A @ vector)).norm() / (B @ A @ vector).norm())
    assert 1e-9 < error < 1e-6


def test_zeros_without_memory_are_no_danger():
    """Kernels below a dispatch mode write into torch's zero tensors, and crash."""
    vector, p = numbers(3), numbers(3, seed=1)

    def function():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(p, vector)
            flat = torch.nn.functional.mse_loss(dual.sign() * 2, p)
            tangent = torch.autograd.forward_ad.unpack_dual((dual * flat).sum()).tangent
        return [tangent]

    tape = record(function, [vector])
    other = numbers(3, seed=2)
    flat = (2 * p.sign() - p).square().mean()
    assert tape([other])[0].item() == pytest.approx(float(flat * other.sum()), rel=1e-14)
