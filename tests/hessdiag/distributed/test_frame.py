"""The frame that every collective begins with, and the checksum of a vector."""

import pytest
import torch

from hessdiag.distributed.frame import HEAD, checksum, operation_code, packed, unpacked

CPU = torch.device("cpu")
SIZES = [1, 2, 100, 4096, 5000, 20000]


def vector(size, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)


def changed(how, given):
    found = given.clone()
    if how == "last bit":
        found[-1] = torch.nextafter(found[-1], torch.tensor(9.0, dtype=found.dtype))
    elif how == "sign of all":
        found = -found
    elif how == "signs of two":
        found[[0, -1]] *= -1
    elif how == "neighbours":
        found[[0, 1]] = found[[1, 0]]
    elif how == "a row apart":
        found[[0, 4096 % len(found)]] = found[[4096 % len(found), 0]]
    elif how == "rolled":
        found = found.roll(1)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_a_copy_of_a_vector_has_its_checksum_which_is_an_integer(size, dtype):
    given = vector(size, dtype)
    strided = torch.stack([given, given], dim=1)[:, 0]
    found = checksum(given)
    assert found == checksum(given.clone()) == checksum(strided)
    assert found == int(found) < 2**53


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", SIZES[2:])
@pytest.mark.parametrize(
    "how", ["last bit", "sign of all", "signs of two", "neighbours", "a row apart", "rolled"]
)
def test_a_vector_that_differs_anyhow_has_another_checksum(how, size, dtype):
    given = vector(size, dtype)
    other = changed(how, given)
    if not torch.equal(given, other):
        assert checksum(other) != checksum(given)


def test_an_empty_vector_and_zeros_of_two_lengths_have_checksums():
    sums = {checksum(torch.zeros(n, dtype=torch.float64)) for n in (0, 1, 2, 5000)}
    assert len(sums) == 4


def test_ranks_are_told_apart_in_a_frame_and_heads_are_summed():
    head = vector(10)
    frames = [
        packed(
            rank,
            3,
            state=float(rank == 1),
            operation=10.0 + rank,
            checksum=20.0 + rank,
            value=30.0 + rank,
            late=rank == 0,
            head=head * (rank + 1),
            device=CPU,
        )
        for rank in range(3)
    ]
    frame = unpacked(torch.stack(frames).sum(dim=0), 3)
    assert frame.failed == [1]
    assert frame.operation == [10.0, 11.0, 12.0]
    assert frame.checksum == [20.0, 21.0, 22.0]
    assert frame.value == [30.0, 31.0, 32.0]
    assert frame.late
    torch.testing.assert_close(frame.head[:10], head * 6)
    assert frame.head.shape == (HEAD,)
    assert not frame.head[10:].any()


def test_the_time_is_up_when_it_is_so_on_rank_0():
    common = {"operation": 0.0, "checksum": 0.0, "value": 0.0, "head": None, "device": CPU}
    frames = [packed(rank, 2, state=0.0, late=rank == 1, **common) for rank in range(2)]
    assert not unpacked(sum(frames), 2).late


def test_operations_are_known_by_their_words_and_lengths():
    codes = {operation_code(*what) for what in [("sum", 1), ("sum", 2), ("agree", 1), ("end",)]}
    assert len(codes) == 4
    assert operation_code("sum", 1) == operation_code("sum", 1)
    assert all(code == int(code) < 2**53 for code in codes)
