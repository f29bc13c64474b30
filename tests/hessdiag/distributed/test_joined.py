"""The protocol of several ranks: sums, decisions, and failures that all of them share."""

import re
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fake_ranks import together
from hessdiag.distributed import Alone
from hessdiag.distributed.frame import HEAD
from hessdiag.distributed.group import Ended
from hessdiag.errors import (
    Diverged,
    InputError,
    OutOfResources,
    StoreError,
    TaskError,
    is_out_of_memory,
)


def part(rank, size=5, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("size", [1, HEAD, HEAD + 1, 3 * HEAD])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_gets_the_same_bits_of_the_sum(ranks, size):
    found = together(ranks, lambda group: group.summed(lambda: part(group.rank, size)))
    exact = sum(part(rank, size) for rank in range(ranks))
    for one in found:
        assert torch.equal(one, found[0])
        torch.testing.assert_close(one, exact, rtol=1e-15, atol=1e-15)


def test_a_short_vector_takes_one_collective_and_a_long_one_two():
    def program(group):
        group.summed(lambda: part(group.rank, HEAD))
        group.summed(lambda: part(group.rank, HEAD + 7))
        return group.transport.added

    counts = together(2, program)[0]
    assert len(counts) == 3
    assert counts[2] == 7


def test_float32_parts_are_summed_in_float64():
    values = [1.0, 2.0**-24, 2.0**-24]

    def program(group):
        return group.summed(lambda: torch.full((HEAD + 1,), values[group.rank]).float())

    found = together(3, program)
    assert found[0].dtype == torch.float32
    # Sums in float32 would end at 1.
    assert all(bool((one == 1.0 + 2.0**-23).all()) for one in found)


class Watcher(TorchDispatchMode):
    """Counts operations."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_the_sum_is_invisible_to_a_dispatch_mode_and_the_part_is_not():
    def program(group):
        given = part(0)
        with Watcher() as watcher:
            group.summed(lambda: given * 2.0, given)
        return watcher.seen

    assert together(2, program) == [1, 1]


def test_an_agreed_value_is_the_least_or_what_is_chosen_of_all():
    def program(group):
        own = [3.5, 1.25, 2.0][group.rank]
        return group.agreed(own), group.agreed(own, max)

    assert together(3, program) == [(1.25, 3.5)] * 3


def test_the_clock_of_rank_0_counts_for_all():
    def program(group):
        past, future = time.monotonic() - 1, time.monotonic() + 100
        late = group.late(past if group.rank == 0 else future)
        return late, group.late(None)

    assert together(2, program) == [(True, False)] * 2


def test_after_a_sum_the_clock_costs_no_collective_of_its_own():
    def program(group):
        deadline = time.monotonic() + 0.2
        assert not group.late(deadline)
        group.summed(lambda: part(0))
        before = len(group.transport.added)
        assert not group.late(deadline)
        assert len(group.transport.added) == before
        time.sleep(0.25)
        assert group.late(deadline)  # nothing was heard since, so it is asked
        return len(group.transport.added) - before

    assert together(2, program) == [1, 1]


def test_rank_0_alone_does_what_is_to_be_done_once():
    done = []

    def program(group):
        def work():
            done.append(group.rank)
            return {"answer": 42}

        return group.first(work)

    assert together(3, program) == [{"answer": 42}] * 3
    assert done == [0]


def test_what_rank_0_raises_every_rank_raises():
    def program(group):
        def work():
            raise StoreError("there is another run")

        return group.first(work)

    for error in together(2, program):
        assert type(error) is StoreError
        assert str(error) == "there is another run"


def failing(error, rank=1):
    def program(group):
        def work():
            if group.rank == rank:
                raise error
            return part(group.rank)

        return group.summed(work)

    return program


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (TaskError("batch 7 is broken"), TaskError, "batch 7 is broken"),
        (ValueError("no"), ValueError, r"no \(on rank 1\)"),
        (UnicodeDecodeError("ascii", b"x", 0, 1, "odd"), RuntimeError, "UnicodeDecodeError"),
    ],
)
def test_a_part_that_raises_on_one_rank_raises_alike_on_all(error, kind, text):
    for found in together(3, failing(error)):
        assert type(found) is kind
        assert re.search(text, str(found))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("too much")]
)
def test_memory_that_ran_out_on_one_rank_ran_out_on_all(error):
    assert all(is_out_of_memory(found) for found in together(2, failing(error)))


def test_the_group_goes_on_after_a_shared_failure():
    def program(group):
        try:
            failing(ValueError("once"))(group)
        except ValueError:
            return group.summed(lambda: torch.ones(2, dtype=torch.float64)).tolist()

    assert together(2, program) == [[2.0, 2.0]] * 2


def test_a_failure_outside_of_sums_ends_on_the_others_what_they_are_at():
    """Rank 1 fails between two products of a row; both ranks lose that row and do the next."""

    def program(group):
        rows = []
        for row in ("a", "b"):
            try:
                group.summed(lambda: part(0))
                if group.rank == 1 and row == "a":
                    raise MemoryError("no room for the basis")
                try:
                    group.summed(lambda: part(0))  # where rank 0 waits
                except (ValueError, MemoryError) as error:
                    group.told(error, f"inner part of {row}")
                    rows.append(f"{row} kept")  # what must not happen: the row has failed
                rows.append(f"{row} done")
            except MemoryError as error:
                rows.append(f"{row} failed: {group.told(error, row)}")
        return rows

    expected = ["a failed: no room for the basis (on rank 1)", "b done"]
    assert together(2, program) == [expected] * 2


def test_failures_of_all_ranks_at_once_are_one():
    def program(group):
        return str(group.told(ValueError("the same everywhere"), "here"))

    assert together(2, program) == ["the same everywhere"] * 2


def test_a_failure_that_all_know_is_not_told_again():
    def program(group):
        with pytest.raises(ValueError, match="once") as caught:
            failing(ValueError("once"))(group)
        before = len(group.transport.added)
        same = group.told(caught.value, "anywhere") is caught.value
        return same, len(group.transport.added) - before

    assert together(2, program) == [(True, 0)] * 2


@pytest.mark.parametrize("moved", [1e-6, float("nan")])
def test_a_rank_whose_argument_differs_ends_all_with_its_name(moved):
    def program(group):
        given = part(0)
        if group.rank == 1:
            given[3] += moved
        return group.summed(lambda: given, given)

    for error in together(3, program):
        assert isinstance(error, Diverged)
        assert "rank 1" in str(error)
        assert "rank 2" not in str(error)


def test_arguments_that_differ_by_rounding_pass_and_are_counted():
    def program(group):
        given = part(0)
        if group.rank == 1:
            given[3] = torch.nextafter(given[3], given.new_tensor(9.0))
        found = group.summed(lambda: given, given)
        group.summed(lambda: part(0), part(0))
        return found, group.record()["drifted_products"]

    for found, drifted in together(2, program):
        torch.testing.assert_close(found, 2 * part(0), rtol=1e-15, atol=0)
        assert drifted == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda group: group.summed(lambda: part(0, 6)),
        lambda group: group.agreed(1.0),
        lambda group: group.late(time.monotonic()),
        lambda group: group.first(lambda: None),
        lambda group: group.end(),
    ],
)
def test_ranks_that_went_different_ways_all_end(other):
    def program(group):
        return other(group) if group.rank == 2 else group.summed(lambda: part(0))

    for error in together(3, program):
        assert isinstance(error, Diverged)
        assert "rank 2" in str(error)


def test_a_rank_that_is_lost_ends_the_others_and_nothing_swallows_that():
    def program(group):
        if group.rank == 1:
            raise SystemError("killed")
        try:
            return group.summed(lambda: part(0))
        except Exception:
            return "swallowed"

    first, second = together(2, program)
    assert isinstance(first, OutOfResources)
    assert isinstance(second, SystemError)


def test_an_ended_group_answers_nothing_any_more():
    def program(group):
        if group.rank == 1:
            raise SystemError("killed")
        with pytest.raises(Ended) as first:
            group.agreed(1.0)
        with pytest.raises(Ended) as again:
            group.summed(lambda: part(0))
        return again.value is first.value

    assert together(2, program)[0] is True


def test_ranks_that_analyse_different_things_are_refused_by_name():
    def program(group):
        facts = {"weights": "w", "data": "d1" if group.rank == 2 else "d0", "loss": 1.0}
        group.same(facts)

    for error in together(3, program):
        assert isinstance(error, InputError)
        assert "the data on rank 2" in str(error)
        assert "weights" not in str(error)


def test_ranks_that_analyse_the_same_thing_go_on():
    assert together(2, lambda group: group.same({"weights": "w"})) == [None, None]


def test_memory_of_a_machine_is_shared_by_its_ranks_and_a_gpu_is_not():
    def program(group):
        return group.share_of(100, device="cpu"), group.share_of(100, device="cuda")

    assert together(2, program) == [(50, 100)] * 2


def test_one_process_alone_decides_for_itself():
    alone, error = Alone(), ValueError("x")
    given = part(0)
    assert alone.summed(lambda: given, given) is given
    assert alone.agreed(3.0) == 3.0
    assert alone.first(lambda: "done") == "done"
    assert alone.told(error, "here") is error
    assert alone.late(time.monotonic() - 1)
    assert not alone.late(time.monotonic() + 9)
    assert not alone.late(None)
    assert alone.share_of(7, device="cpu") == 7
    assert alone.record() is None
    alone.same({"anything": 1})
