"""A linear computation recorded once, operation by operation, and run again on other inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from hessdiag.curvature.modes import EagerMode

aten: Any = torch.ops.aten
_SAME = {aten.detach.default, aten.alias.default}
"""Operations that hand on their argument: no number is computed, and nothing is recorded."""
_SHAPES = {aten.is_same_size.default, aten._has_same_storage_numel.default}
"""Operations whose answer depends on shapes alone."""


class CannotRecord(Exception):
    """The computation does something that a tape cannot play again."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One operation: its arguments, those that vary by their register, and where results go.

    Attributes:
        function: Of aten.
        given: The positional arguments, None where a register stands in; with ``layout`` all
            arguments flattened.
        keywords: The other arguments.
        layout: How they nest, where registers stand inside of lists or behind keywords.
        places: Position in ``given`` and register.
        result: Register of what it returns.
        several: Registers of the parts of what it returns; None where that is one tensor.
        last: Registers that no later step reads.
    """

    function: Callable[..., Any]
    given: list[Any]
    keywords: dict[str, Any]
    layout: Any
    places: tuple[tuple[int, int], ...]
    result: int
    several: tuple[int, ...] | None
    last: tuple[int, ...]


@dataclass(frozen=True)
class Tape:
    """What a linear function of tensors computes, without what does not depend on them.

    Attributes:
        steps: In order.
        inputs: Registers of the arguments.
        outputs: Registers of the results; None where a result is zero.
        zeros: Zeros of the results' shapes, without memory.
        registers: How many.
    """

    steps: tuple[_Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    zeros: tuple[Tensor, ...]
    registers: int

    def __call__(
        self, inputs: Sequence[Tensor], *, narrow: torch.dtype | None = None
    ) -> list[Tensor]:
        """The results for other inputs of the same shapes.

        Args:
            inputs: As they were recorded.
            narrow: Do each operation in this type instead, to see what rounding does.
        """
        held: list[Any] = [None] * self.registers
        for place, tensor in zip(self.inputs, inputs, strict=True):
            held[place] = tensor
        with torch.no_grad():
            for step in self.steps:
                given = step.given.copy()
                for position, register in step.places:
                    given[position] = held[register]
                if narrow is not None:
                    given = tree_map(lambda value: _cast(value, narrow), given)
                if step.layout is None:
                    found = step.function(*given, **step.keywords)
                else:
                    arguments, keywords = tree_unflatten(given, step.layout)
                    found = step.function(*arguments, **keywords)
                if step.several is None:
                    held[step.result] = found
                else:
                    for register, part in zip(step.several, found, strict=True):
                        held[register] = part
                for register in step.last:
                    held[register] = None
            return [
                zero if output is None else held[output]
                for output, zero in zip(self.outputs, self.zeros, strict=True)
            ]

    def constants(self) -> dict[int, int]:
        """Bytes of the storages that the steps hold, by address."""
        return {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for step in self.steps
            for value in tree_leaves((step.given, step.keywords))
            if _has_storage(value)
        }


def record(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Tape:
    """Run ``function`` and keep what it does to ``inputs``, which it must be linear in.

    Args:
        function: Uses ``inputs`` as they stand, and returns its results.
        inputs: Tensors with a storage of their own each.
    Raises:
        CannotRecord: It reads a number of theirs, writes into what does not depend on them, or
            hides an operation.
    Cost:
        The function, and about ten microseconds per operation.
    """
    recorder = _Recorder(inputs)
    with recorder:
        results = function()
    return recorder.tape(results)


@dataclass
class _Recorded:
    function: Any
    given: list[Any]
    keywords: dict[str, Any]
    layout: Any
    places: dict[int, int]
    results: tuple[int, ...]
    listed: bool
    writes: set[int] = field(default_factory=set)


class _Recorder(EagerMode):
    """Notes every operation that an input enters, directly or through others."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.register: dict[int, int] = {}
        self.storage: dict[int, int] = {}  # of each register, its address
        self.alive: list[Tensor] = []  # so that no id and no address is used twice
        self.done: list[_Recorded] = []
        self.used: set[int] = set()  # storages of the constants that operations read
        self.count = 0
        self.inputs = tuple(self._track(tensor) for tensor in inputs)
        self.protected = set(self.storage.values())
        self.varying = set(self.protected)

    def _track(self, tensor: Tensor) -> int:
        self.register[id(tensor)] = self.count
        self.storage[self.count] = _address(tensor)
        self.alive.append(tensor)
        self.count += 1
        return self.count - 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given, structure = tree_flatten((args, kwargs))
        layout: Any = structure
        if func not in _SAME and any(map(_is_empty, given)):
            if any(map(_is_empty, _written(func, args, kwargs))):
                raise CannotRecord(f"{func} writes into what does not depend on the vector")
            given = [torch.zeros_like(v) if _is_empty(v) else v for v in given]
            args, kwargs = tree_unflatten(given, layout)
        places = self._places(given)
        written = _written(func, args, kwargs)
        if not places:
            self._check_constants(func, given, written)
            return func(*args, **kwargs)
        for tensor in written:
            known = self.register.get(id(tensor))
            if known is None or self.storage[known] in self.protected:
                raise CannotRecord(f"{func} writes into what does not depend on the vector")
        found = func(*args, **kwargs)
        if func in _SHAPES:
            return found
        if func in _SAME:
            (register,) = places.values()
            self.register[id(found)] = register
            self.alive.append(found)
            return found
        listed = isinstance(found, (tuple, list))
        results = tuple(self._result(func, part) for part in (found if listed else (found,)))
        self.varying.update(self.storage[r] for r in results if r in self.storage)
        for position, value in enumerate(given):
            if position not in places and _has_storage(value):
                self.used.add(_address(value))
        keywords: dict[str, Any] = {}
        direct = self._places(args)
        if len(direct) == len(places):
            given, keywords, layout, places = list(args), kwargs, None, direct
        given = [None if position in places else value for position, value in enumerate(given)]
        writes = {self.storage[self.register[id(tensor)]] for tensor in written}
        self.done.append(_Recorded(func, given, keywords, layout, places, results, listed, writes))
        return found

    def _places(self, given: Sequence[Any]) -> dict[int, int]:
        return {
            position: self.register[id(value)]
            for position, value in enumerate(given)
            if isinstance(value, Tensor) and id(value) in self.register
        }

    def _result(self, func: Any, part: Any) -> int:
        if part is None or _is_empty(part):  # a register that nothing can read
            self.count += 1
            return self.count - 1
        if not isinstance(part, Tensor):
            raise CannotRecord(f"{func} turns the vector into a number")
        known = self.register.get(id(part))
        return self._track(part) if known is None else known

    def _check_constants(self, func: Any, given: list[Any], written: list[Tensor]) -> None:
        for value in given:
            if _has_storage(value) and value.numel() and _address(value) in self.varying:
                raise CannotRecord(f"{func} reads a copy of the vector that was made out of sight")
        if any(_address(tensor) in self.used for tensor in written if _has_storage(tensor)):
            raise CannotRecord(f"{func} changes what an earlier operation has read")

    def tape(self, results: Sequence[Tensor]) -> Tape:
        """The operations that the results need."""
        outputs = tuple(self.register.get(id(result)) for result in results)
        needed = {register for register in outputs if register is not None}
        storages = {self.storage[register] for register in needed}
        live: list[_Recorded] = []
        for operation in reversed(self.done):
            reads = any(register in needed for register in operation.results)
            if reads or operation.writes & storages:
                live.append(operation)
                needed.update(operation.places.values())
                storages.update(self.storage[r] for r in operation.places.values())
        live.reverse()
        kept = {register for register in outputs if register is not None}
        last: dict[int, int] = {}
        for index, operation in enumerate(live):
            for register in (*operation.places.values(), *operation.results):
                if register not in kept:
                    last[register] = index
        ends: dict[int, list[int]] = {}
        for register, index in last.items():
            ends.setdefault(index, []).append(register)
        steps = tuple(
            _Step(
                operation.function,
                # Without the graph that a constant may be part of.
                tree_map(_alone, operation.given),
                tree_map(_alone, operation.keywords),
                operation.layout,
                tuple(operation.places.items()),
                operation.results[0] if operation.results else 0,
                operation.results if operation.listed else None,
                tuple(ends.get(index, ())),
            )
            for index, operation in enumerate(live)
        )
        zeros = tuple(result.detach().new_zeros(()).expand(result.shape) for result in results)
        return Tape(steps, self.inputs, outputs, zeros, self.count)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if _has_storage(tensor) else -1


def _has_storage(value: Any) -> bool:
    """Whether a value is a tensor with numbers in memory of its own."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value._is_zerotensor()
    )


def _alone(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _is_empty(value: Any) -> bool:
    """Whether a value is one of torch's zeros without memory: kernels crash on these."""
    return isinstance(value, Tensor) and value._is_zerotensor()


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes into."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for position, declared in enumerate(schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(declared.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _cast(value: Any, dtype: torch.dtype) -> Any:
    wide = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if wide else value
