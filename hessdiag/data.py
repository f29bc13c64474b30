"""Batches of any shape: moved as a whole, counted, cut anew, and hashed row by row."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from hessdiag.errors import HessdiagError, InputError, TaskError, is_out_of_memory
from hessdiag_probes.random import generator


@dataclass(frozen=True)
class Batches:
    """The data of one analysis, on the device, in its dtype.

    Attributes:
        items: The batches.
        shares: Of each batch in the dataset mean; they sum to 1.
        rows: Number of rows (examples) in all.
        digest: Hash of the rows, whatever their order.
        notices: What the user should know about how the data were read.
    """

    items: tuple[Any, ...]
    shares: tuple[float, ...]
    rows: int
    digest: str
    notices: tuple[str, ...] = ()


def transform(
    value: Any,
    tensor: Callable[[Tensor], Any],
    packed: Callable[[PackedSequence], Any] | None = None,
) -> Any:
    """Apply ``tensor`` to every tensor inside ``value``; its structure and types stay.

    Of a packed sequence the data are meant, or ``packed`` is applied to all of it.
    """

    def inside(item: Any) -> Any:
        return transform(item, tensor, packed)

    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, PackedSequence):
        if packed is not None:
            return packed(value)
        data = tensor(value.data)
        return value._replace(data=data) if data.device == value.data.device else value.to(data)
    if isinstance(value, (dict, UserDict)):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = inside(item)
        return changed
    if isinstance(value, Mapping):
        items = {key: inside(item) for key, item in value.items()}
        try:
            return type(value)(items)  # type: ignore[call-arg]
        except TypeError:
            return items
    if isinstance(value, tuple):
        parts = [inside(item) for item in value]
        make = getattr(type(value), "_make", type(value))
        return make(parts)
    if isinstance(value, list):
        return [inside(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin: Any = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(twin, field.name, inside(getattr(value, field.name)))
        return twin
    return value


def leaves(value: Any) -> list[Tensor]:
    """All tensors inside ``value``, in the order of its structure."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    transform(value, keep)
    return found


def packed_sequences(value: Any) -> list[PackedSequence]:
    """All packed sequences inside ``value``."""
    found: list[PackedSequence] = []
    transform(value, lambda tensor: tensor, found.append)
    return found


def convert(
    value: Any, *, dtype: torch.dtype, device: torch.device, keep_grad: bool = False
) -> Any:
    """``value`` on ``device``, its floating-point tensors in ``dtype``; always copies.

    With ``keep_grad`` inputs that require gradients (of a PINN) still do.
    """

    def move(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        copied = tensor.detach().to(device=device, dtype=wanted, copy=True)
        return copied.requires_grad_(keep_grad and tensor.requires_grad)

    return transform(value, move)


def load_batches(
    data: Iterable[Any],
    units: Callable[[Any], float],
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int | None = None,
    max_examples: int | None = None,
    seed: int = 0,
    order_matters: bool = False,
) -> Batches:
    """Read the data twice, compare the passes, draw the subset, cut the batches.

    The second pass is what tells a shuffled loader (same rows, another order: a notice) from
    random augmentation and ``drop_last`` (other rows: refused, since no two products would be
    of the same matrix) and from a generator that is spent (refused).

    Args:
        data: Re-iterable of batches.
        units: Batch to the number of units its mean loss was taken over.
        dtype: Of floating-point tensors afterwards.
        device: Of all tensors afterwards.
        batch_size: Rows per batch; None keeps the batches.
        max_examples: Rows of the subset; None keeps all.
        seed: Of the drawn subset.
        order_matters: The loss depends on which rows share a batch (BatchNorm in train mode).
    Raises:
        TaskError: The data are empty, spent, or differ between two passes.
        InputError: The batches cannot be cut into rows as asked.
    """
    first = [copy_batch(batch) for batch in _read(data)]
    if not first:
        raise TaskError("the task's data hold no batch; give an iterable of at least one batch")
    hashes = [row_hashes(batch) for batch in first]
    again = [row_hashes(batch) for batch in _read(data)]
    notices = _compare_passes(hashes, again, max_examples is not None, order_matters)
    rows = sum(row_count(batch) for batch in first)
    if max_examples is not None and max_examples < rows:
        first = _subset(first, max_examples, seed)
    if batch_size is not None:
        first = list(_cut(join(first), batch_size))
    counted = [_counted(units, batch) for batch in first]
    kept = [(batch, count) for batch, count in zip(first, counted, strict=True) if count > 0]
    if not kept:
        raise TaskError("no batch holds a single counted unit (all targets are ignored)")
    if len(kept) < len(first):
        notices.append(f"{len(first) - len(kept)} batches without any counted unit are left out")
    total = sum(count for _, count in kept)
    final = [row_hashes(batch) for batch, _ in kept]
    return Batches(
        items=tuple(
            convert(batch, dtype=dtype, device=device, keep_grad=True) for batch, _ in kept
        ),
        shares=tuple(count / total for _, count in kept),
        rows=sum(row_count(batch) for batch, _ in kept),
        digest=_digest(final),
        notices=tuple(notices),
    )


def _counted(units: Callable[[Any], float], batch: Any) -> float:
    try:
        return float(units(batch))
    except HessdiagError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(
            f"counting the units of a batch raised {type(error).__name__}: {error}; "
            "mend the task's batch_size, or the batch's targets"
        ) from error


def _read(data: Iterable[Any]) -> Iterator[Any]:
    """The batches; what the user's data raise becomes one error that says so."""
    try:
        for batch in data:
            if any(tensor.is_meta for tensor in leaves(batch)):
                raise TaskError("the task's data are on the meta device and hold no numbers")
            yield batch
    except HessdiagError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        raise TaskError(
            f"reading the task's data raised {type(error).__name__}: {error}; "
            "iterate over it once outside of hessdiag to find the batch"
        ) from error


def copy_batch(batch: Any) -> Any:
    """A batch whose tensors are its own, so that a loader may reuse its buffers."""
    return transform(batch, lambda t: t.detach().clone().requires_grad_(t.requires_grad))


def row_count(batch: Any) -> int:
    """How many examples a batch holds.

    The leading dimension of the first tensor that has one, the number of sequences where that
    is packed; 1 where there is no such tensor.
    """
    counts: list[int] = []

    def count(tensor: Tensor) -> None:
        if tensor.dim() > 0:
            counts.append(tensor.shape[0])

    transform(batch, count, lambda sequences: counts.append(int(sequences.batch_sizes[0])))
    return counts[0] if counts else 1


def is_stack(batch: Any) -> bool:
    """Whether every tensor has a row per example, so that rows can be taken from the batch."""
    found, rows = leaves(batch), row_count(batch)
    if not found or packed_sequences(batch):
        return False
    return all(t.layout == torch.strided and t.dim() > 0 and t.shape[0] == rows for t in found)


def row_hashes(batch: Any) -> list[bytes]:
    """A hash per row; a batch that is no stack of rows counts as one."""
    found, rows = leaves(batch), row_count(batch)
    if not is_stack(batch):
        whole = hashlib.sha256()
        for tensor in (*found, *(s.batch_sizes for s in packed_sequences(batch))):
            whole.update(tensor_bytes(tensor))
        return [whole.digest()]
    views = [memoryview(tensor_bytes(tensor)) for tensor in found]
    widths = [len(view) // rows if rows else 0 for view in views]
    digests = []
    for row in range(rows):
        digest = hashlib.sha256()
        for view, width in zip(views, widths, strict=True):
            digest.update(view[row * width : (row + 1) * width])
        digests.append(digest.digest())
    return digests


def tensor_bytes(tensor: Tensor) -> bytes:
    """The numbers of a tensor in row-major order, whatever its strides, device or layout."""
    dense = tensor.detach().cpu()
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    # A copy, for a one-element view counts as contiguous and keeps strides that no view likes.
    plain = dense.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.view(-1).view(torch.uint8).numpy().tobytes()


def _digest(hashes: Sequence[Sequence[bytes]]) -> str:
    digest = hashlib.sha256()
    for row in sorted(row for batch in hashes for row in batch):
        digest.update(row)
    return digest.hexdigest()


def _compare_passes(
    first: Sequence[Sequence[bytes]],
    second: Sequence[Sequence[bytes]],
    subset: bool,
    order_matters: bool,
) -> list[str]:
    if not second:
        raise TaskError(
            "the task's data are spent after one pass; give a list of batches or a DataLoader, "
            "which can be read again, not a generator"
        )
    if list(map(list, first)) == list(map(list, second)):
        return []
    if _digest(first) != _digest(second):
        raise TaskError(
            "the task's data differ from pass to pass (random augmentation, a random subset, or "
            "shuffle with drop_last), so no two products would be of the same Hessian; "
            "turn the randomness off for the analysis"
        )
    reason = None
    if subset:
        reason = "--max-examples would draw other rows at every run"
    elif order_matters:
        reason = "with BatchNorm in train mode the loss depends on which rows share a batch"
    if reason:
        raise TaskError(
            f"the task's data come in another order at every pass, and {reason}; "
            "turn shuffling off for the analysis"
        )
    return ["the data come in another order at every pass; the order of the first pass is used"]


def join(batches: Sequence[Any]) -> Any:
    """All rows in one batch of the same structure.

    Raises:
        InputError: The batches are no stacks of rows, or their rows differ in shape.
    """
    if not all(is_stack(batch) for batch in batches):
        raise InputError(
            "the batches cannot be cut anew: not every tensor in them has a row per example; "
            "leave out --batch-size and --max-examples, or let the task's data do it"
        )
    parts = [leaves(batch) for batch in batches]
    if len({len(tensors) for tensors in parts}) != 1:
        raise InputError("the batches cannot be cut anew: they differ in structure")
    try:
        joined: Iterator[Tensor] = iter(
            [torch.cat(list(column)) for column in zip(*parts, strict=True)]
        )
    except RuntimeError as error:
        raise InputError(
            f"the batches cannot be cut anew, their rows differ in shape ({error}); "
            "pad them alike, or leave out --batch-size and --max-examples"
        ) from error
    return transform(batches[0], lambda _: next(joined))


def take(batch: Any, rows: Tensor | slice) -> Any:
    """The given rows of a batch."""
    return transform(batch, lambda tensor: tensor[rows])


def _subset(batches: Sequence[Any], count: int, seed: int) -> list[Any]:
    """``count`` rows drawn without replacement, left in their batches and order."""
    sizes = [row_count(batch) for batch in batches]
    join([take(batch, slice(0, 0)) if is_stack(batch) else batch for batch in batches])
    source = generator(seed, "data", "subset")
    drawn = torch.randperm(sum(sizes), generator=source)[:count].sort().values
    chosen = []
    start = 0
    for batch, size in zip(batches, sizes, strict=True):
        inside = drawn[(drawn >= start) & (drawn < start + size)] - start
        start += size
        if len(inside):
            chosen.append(take(batch, inside))
    return chosen


def _cut(batch: Any, size: int) -> Iterator[Any]:
    for start in range(0, row_count(batch), size):
        yield take(batch, slice(start, start + size))


def halves(batches: Batches, units: Callable[[Any], float]) -> tuple[Batches, Batches] | None:
    """The rows at even and at odd positions; None where there are no two rows to part."""
    if not all(is_stack(batch) for batch in batches.items):
        return None
    parts: tuple[list[Any], list[Any]] = ([], [])
    start = 0
    for batch in batches.items:
        rows = row_count(batch)
        position = torch.arange(start, start + rows) % 2
        start += rows
        for half in (0, 1):
            index = (position == half).nonzero().flatten()
            if len(index):
                parts[half].append(take(batch, index))
    if not (parts[0] and parts[1]):
        return None
    made = []
    for part in parts:
        counts = [float(units(batch)) for batch in part]
        kept = [(batch, count) for batch, count in zip(part, counts, strict=True) if count > 0]
        if not kept:
            return None
        total = sum(count for _, count in kept)
        made.append(
            Batches(
                items=tuple(batch for batch, _ in kept),
                shares=tuple(count / total for _, count in kept),
                rows=sum(row_count(batch) for batch, _ in kept),
                digest="",
            )
        )
    return made[0], made[1]
