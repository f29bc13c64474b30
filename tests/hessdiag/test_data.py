from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hessdiag.data import (
    convert,
    halves,
    is_stack,
    join,
    leaves,
    load_batches,
    row_count,
    row_hashes,
    take,
    tensor_bytes,
)
from hessdiag.errors import InputError, TaskError
from hessdiag.task import Task, units

CPU = torch.device("cpu")


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    name: str
    y: torch.Tensor | None = None


class Encoding(UserDict):
    """Like a tokenizer's output: it also answers to attributes."""

    def __getattr__(self, name):
        if name.startswith("__") or name == "data":
            raise AttributeError(name)
        return self.data[name]


def x(rows=4):
    return torch.arange(3.0 * rows).view(rows, 3)


def y(rows=4):
    return torch.arange(rows)


KINDS = {
    "tensor": lambda: x(),
    "tuple": lambda: (x(), y()),
    "list": lambda: [x(), y()],
    "dict": lambda: {"x": x(), "y": y(), "text": "kept"},
    "ordered": lambda: OrderedDict(x=x(), y=y()),
    "default": lambda: defaultdict(list, x=x(), y=y()),
    "proxy": lambda: MappingProxyType({"x": x(), "y": y()}),
    "user dict": lambda: UserDict(x=x(), y=y()),
    "encoding": lambda: Encoding(x=x(), y=y()),
    "named tuple": lambda: Pair(x(), y()),
    "dataclass": lambda: Frozen(x(), "kept", y()),
    "nested": lambda: {"a": [x(), (y(), None)], "b": Pair(x(), y()), "n": 3},
}


def load(data, units=row_count, **options):
    return load_batches(data, units, dtype=torch.float64, device=CPU, **options)


def shape_of(value):
    """The types of a structure, with what is no tensor."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, dict | UserDict | MappingProxyType):
        return type(value), {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [shape_of(item) for item in value]
    return (
        (type(value), {k: shape_of(v) for k, v in vars(value).items()})
        if isinstance(value, Frozen)
        else value
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batch_moves_as_a_whole_and_keeps_its_types(kind):
    batch = KINDS[kind]()
    (moved,) = load([batch]).items
    assert shape_of(moved) == shape_of(batch)
    assert len(leaves(moved)) == len(leaves(batch)) > 0
    for before, after in zip(leaves(batch), leaves(moved), strict=True):
        assert after.dtype == (torch.float64 if before.is_floating_point() else torch.int64)
        assert after.data_ptr() != before.data_ptr()
        assert torch.equal(after, before.to(after.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
def test_every_kind_of_batch_is_cut_anew_into_the_same_rows(kind, size):
    data = [KINDS[kind](), KINDS[kind]()]
    cut = load(data, batch_size=size)
    whole = load(data)
    assert cut.rows == whole.rows == 8
    assert cut.digest == whole.digest
    assert [row_count(item) for item in cut.items] == [size] * (8 // size) + [8 % size] * bool(
        8 % size
    )
    assert sum(cut.shares) == pytest.approx(1)
    for before, after in zip(leaves(join(whole.items)), leaves(join(cut.items)), strict=True):
        assert torch.equal(before, after)


def test_a_moved_batch_is_no_view_of_the_users():
    batch = x()
    (moved,) = load([batch]).items
    moved.zero_()
    assert batch.any()


def test_a_loader_that_reuses_its_buffer_is_read_right():
    class Reusing:
        def __iter__(self):
            buffer = torch.zeros(2, 1)
            for value in range(3):
                yield buffer.fill_(value)

    assert [float(item[0]) for item in load(Reusing()).items] == [0, 1, 2]


def test_inputs_that_require_gradients_still_do_and_no_others():
    data = [(torch.ones(3, 1, requires_grad=True), torch.ones(3, 1))]
    for options in ({}, {"batch_size": 2}, {"max_examples": 2}):
        for first, second in load(data, **options).items:
            assert first.requires_grad
            assert first.is_leaf
            assert not second.requires_grad
    assert not convert(data[0][0], dtype=torch.float64, device=CPU).requires_grad


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float16, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.bool, torch.bool),
        (torch.uint8, torch.uint8),
        (torch.complex64, torch.complex64),
    ],
)
def test_only_floating_tensors_change_their_type(dtype, wanted):
    (moved,) = load([torch.ones(2, 2, dtype=dtype)]).items
    assert moved.dtype == wanted


def packed():
    return pack_sequence([torch.arange(3.0), torch.arange(2.0), torch.ones(1)])


def test_a_packed_sequence_is_moved_counted_by_sequences_and_never_cut():
    batches = load([(packed(), torch.zeros(3))])
    moved, _ = batches.items[0]
    assert isinstance(moved, PackedSequence)
    assert moved.data.dtype == torch.float64
    assert torch.equal(moved.batch_sizes, packed().batch_sizes)
    assert batches.rows == 3
    assert not is_stack(packed())
    assert not is_stack(pack_sequence([torch.ones(1), torch.zeros(1)]))
    for options in ({"batch_size": 2}, {"max_examples": 2}):
        for data in ([packed()], [(packed(), torch.zeros(3))]):
            with pytest.raises(InputError, match="cannot be cut anew"):
                load(data, **options)
    task = Task(torch.nn.Linear(1, 1), [], lambda model, batch: model(batch))
    assert units(task)((packed(), torch.zeros(3))) == 3
    other = PackedSequence(packed().data, torch.tensor([2, 2, 1, 1]))
    assert row_hashes(packed()) != row_hashes(other)


NO_ROWS = {
    "a number": lambda: {"x": x(), "t": torch.tensor(1.0)},
    "a number first": lambda: {"t": torch.tensor(1.0), "x": x()},
    "a matrix of its own": lambda: (x(8), torch.eye(3)),
    "a matrix as long": lambda: (x(4), torch.zeros(2, 4)),
    "sparse": lambda: (x(), torch.eye(4).to_sparse()),
    "nothing": lambda: {"text": "no tensor"},
}


@pytest.mark.parametrize("kind", NO_ROWS)
def test_batches_that_are_no_stacks_of_rows_are_analysed_but_not_cut(kind):
    data = [NO_ROWS[kind](), NO_ROWS[kind]()]
    whole = load(data, lambda batch: 1)
    assert whole.shares == (0.5, 0.5)
    assert halves(whole, lambda batch: 1) is None
    assert load(data, lambda batch: 1, max_examples=10**6).rows == whole.rows
    with pytest.raises(InputError, match="cannot be cut anew"):
        load(data, lambda batch: 1, batch_size=1)
    if whole.rows > 2:
        with pytest.raises(InputError, match="cannot be cut anew"):
            load(data, lambda batch: 1, max_examples=1)


def test_rows_of_other_shapes_or_structure_are_not_joined():
    with pytest.raises(InputError, match="rows differ in shape"):
        load([torch.ones(2, 3), torch.ones(2, 4)], batch_size=2)
    with pytest.raises(InputError, match="rows differ in shape"):
        load([torch.ones(2, 3), torch.ones(2, 4)], max_examples=2)
    with pytest.raises(InputError, match="differ in structure"):
        load([(torch.ones(2),), (torch.ones(2), torch.ones(2))], batch_size=2)


def test_shares_are_the_units_and_batches_without_any_are_left_out():
    data = [torch.ones(2), torch.full((3,), 2.0), torch.zeros(5)]
    batches = load(data, lambda batch: float(batch.sum()))
    assert batches.shares == (2 / 8, 6 / 8)
    assert batches.rows == 5
    assert "1 batches without any counted unit" in batches.notices[0]
    with pytest.raises(TaskError, match="all targets are ignored"):
        load(data, lambda batch: 0)


def test_empty_and_spent_data_are_refused():
    with pytest.raises(TaskError, match="hold no batch"):
        load([])
    with pytest.raises(TaskError, match="not a generator"):
        load(iter([x()]))
    with pytest.raises(TaskError, match="not a generator"):
        load(x(2) for _ in range(2))


class Noisy(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.ones(3) * index + torch.rand(3)


def counted(**options):
    return DataLoader(TensorDataset(torch.arange(24.0).view(8, 3)), batch_size=3, **options)


def test_a_shuffled_loader_is_a_notice():
    torch.manual_seed(0)
    batches = load(counted(shuffle=True))
    assert "another order at every pass" in batches.notices[0]
    assert batches.digest == load(counted()).digest
    assert load(counted()).notices == ()


def test_augmentation_and_drop_last_are_refused():
    torch.manual_seed(0)
    rows = TensorDataset(torch.arange(100))
    dropping = DataLoader(rows, batch_size=30, shuffle=True, drop_last=True)
    for data in (DataLoader(Noisy(), batch_size=4), dropping):
        with pytest.raises(TaskError, match="differ from pass to pass"):
            load(data)
    assert load(counted(drop_last=True)).rows == 6


@pytest.mark.parametrize("options", [{"max_examples": 4}, {"order_matters": True}])
def test_shuffling_is_refused_where_it_would_change_a_number(options):
    torch.manual_seed(0)
    with pytest.raises(TaskError, match="turn shuffling off"):
        load(counted(shuffle=True), **options)


def test_a_subset_is_drawn_by_the_seed_alone():
    data = [x(5), x(5) + 100]

    def rows(**options):
        return join(load(data, max_examples=4, **options).items).tolist()

    assert rows(seed=1) == rows(seed=1) == rows(seed=1, batch_size=3)
    assert rows(seed=1) != rows(seed=2)
    everything = join(data).tolist()
    assert [row for row in everything if row in rows(seed=1)] == rows(seed=1)
    assert len(rows(seed=1)) == 4
    state = torch.get_rng_state()
    rows(seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_subset_takes_whole_rows_of_every_tensor():
    data = [(x(6), y(6))]
    for first, second in load(data, max_examples=3).items:
        assert torch.equal(first[:, 0], 3.0 * second)


def test_a_subset_as_large_as_the_data_is_all_of_it():
    assert load([x(5)], max_examples=5).digest == load([x(5)]).digest
    assert load([x(5)], max_examples=50).rows == 5


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(7)), cuts=st.sets(st.integers(1, 6)))
def test_the_digest_knows_the_rows_but_neither_order_nor_partition(order, cuts):
    rows = torch.arange(21.0).view(7, 3)
    shuffled = rows[torch.tensor(order)]
    edges = [0, *sorted(cuts), 7]
    data = [(shuffled[a:b], shuffled[a:b, 0]) for a, b in pairwise(edges)]
    assert load(data).digest == load([(rows, rows[:, 0])]).digest


def test_a_view_with_any_strides_has_the_bytes_of_its_copy():
    rows = torch.arange(12.0).view(4, 3)
    for view in (rows[:1, 0], rows[:, 1], rows.T, rows[1, 1], rows[:0], rows.to_sparse()):
        copy = torch.tensor(view.to_dense().tolist() if view.numel() else [])
        assert tensor_bytes(view) == copy.numpy().tobytes()


def test_the_digest_knows_every_value_and_which_belong_together():
    base = load([(x(), y())]).digest
    changed = x()
    changed[3, 2] += 1e-6
    assert load([(changed, y())]).digest != base
    assert load([(x(), y().flip(0))]).digest != base
    assert load([(x()[:3], y()[:3])]).digest != base
    assert load([(x(), y()), (x(), y())]).digest != base


def test_halves_part_the_rows_and_weigh_them():
    batches = load([(x(5), y(5)), (x(2) + 50, y(2))])
    even, odd = halves(batches, row_count)
    assert (even.rows, odd.rows) == (4, 3)
    assert even.shares == (3 / 4, 1 / 4)
    together = sorted(join(even.items)[0].tolist() + join(odd.items)[0].tolist())
    assert together == sorted(join(batches.items)[0].tolist())
    assert halves(load([x(1)]), row_count) is None


def test_taking_rows_keeps_the_kind():
    taken = take(Frozen(x(), "kept", y()), torch.tensor([2, 0]))
    assert taken.name == "kept"
    assert taken.y.tolist() == [2, 0]


def test_data_without_values_are_refused():
    with pytest.raises(TaskError, match="data are on the meta device"):
        load([(x().to("meta"), y())])
