"""Which parameters form a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from hessdiag.errors import InputError, OptionError
from hessdiag.names import layer_of, named_parameters

WHOLE = "whole"


@dataclass(frozen=True)
class Block:
    """A group of parameters, by their first names in :func:`hessdiag.names.named_parameters`.

    Attributes:
        name: Row of the table.
        parameters: Names in the order of the network; each counts once, also when tied.
        size: Number of values.
        skipped: Why there is nothing to analyse, or None.
    """

    name: str
    parameters: tuple[str, ...]
    size: int
    skipped: str | None = None


@dataclass(frozen=True)
class _Parameters:
    """The network's parameters, seen once."""

    first: dict[str, str]  # every name, aliases too -> first name
    size: dict[str, int]  # first name -> number of values
    frozen: frozenset[str]  # first names

    def block(self, name: str, names: Sequence[str]) -> Block:
        """The block of all ``names``; skipped where none of them can be analysed."""
        canonical = list(dict.fromkeys(self.first[n] for n in names))
        if name == WHOLE and set(canonical) != set(self.size):
            name = f"layer {WHOLE}"  # the network's own row has that name
        active = tuple(n for n in self.size if n in canonical and n not in self.frozen)
        size = sum(self.size[n] for n in active)
        if active and size == 0:
            return Block(name, (), 0, "its parameters hold no values (a dimension is 0)")
        if active:
            return Block(name, active, size)
        return Block(name, (), 0, "all its parameters are frozen (requires_grad=False)")


def find_blocks(model: nn.Module, specification: Sequence[str]) -> list[Block]:
    """The blocks that ``--blocks`` asks for, in the order of the network, ``whole`` last.

    Raises:
        InputError: No parameter is trainable.
        OptionError: A glob matches nothing, or two blocks have one name.
    """
    known = _look(model)
    _check_something(known)
    layers = _layers(known)
    found: list[Block] = []
    whole = False
    for item in specification:
        if item == "layer":
            found += layers
            whole = True
        elif item == "parameter":
            found += [known.block(name, [name]) for name in known.size]
        elif item == WHOLE:
            whole = True
        elif "=" in item:
            found.append(_named(item, known))
        else:
            found += _matching(item, layers)
    if whole:
        found.append(known.block(WHOLE, list(known.size)))
    unique = list(dict.fromkeys(found))
    names = [block.name for block in unique]
    for name in (*names, *known.size):
        _check_storable(name)
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"two blocks are named {name!r}; give one of them another NAME=GLOB")
    return unique


def _check_something(known: _Parameters) -> None:
    if not set(known.size) - known.frozen:
        raise InputError(
            "the model has no trainable parameter; nothing has curvature to analyse "
            "(set requires_grad=True on those that should)"
        )
    if not any(size for name, size in known.size.items() if name not in known.frozen):
        raise InputError(
            "no trainable parameter of the model holds a value (a dimension is 0 in each); "
            "nothing has curvature to analyse"
        )


def _check_storable(name: str) -> None:
    if "\0" in name or name != name.encode(errors="replace").decode():
        raise InputError(
            f"the name {name!r} cannot be stored: a run file holds no null character and no "
            "lone surrogate; rename the module"
        )


def _look(model: nn.Module) -> _Parameters:
    first_of: dict[int, str] = {}
    first: dict[str, str] = {}
    size: dict[str, int] = {}
    frozen: set[str] = set()
    for name, parameter in named_parameters(model, aliases=True):
        owner = first_of.setdefault(id(parameter), name)
        first[name] = owner
        if owner == name:
            size[name] = parameter.numel()
            if not parameter.requires_grad:
                frozen.add(name)
    return _Parameters(first, size, frozenset(frozen))


def _layers(known: _Parameters) -> list[Block]:
    """A block per module that owns parameters; the root's own stand for themselves."""
    owned: dict[str, list[str]] = {}
    for name in known.first:
        owned.setdefault(layer_of(name), []).append(name)
    # Named_parameters lists a module's own parameters before its children's, so the first
    # appearance of each owner is the order of named_modules().
    blocks = []
    for layer, names in owned.items():
        own = [name for name in names if known.first[name] == name]
        if own:
            blocks.append(known.block(layer, own))
        else:
            elsewhere = ", ".join(dict.fromkeys(known.first[name] for name in names))
            reason = f"all its parameters are tied; they count where they stand first: {elsewhere}"
            blocks.append(Block(layer, (), 0, reason))
    return blocks


def _matching(glob: str, layers: Sequence[Block]) -> list[Block]:
    found = [block for block in layers if fnmatchcase(block.name, glob)]
    if not found:
        names = [block.name for block in layers]
        raise OptionError(f"no layer matches {glob!r}{_near(glob, names)}; layers: {_some(names)}")
    return found


def _named(item: str, known: _Parameters) -> Block:
    name, _, glob = item.partition("=")
    if not name or not glob or name == WHOLE:
        raise OptionError(
            f"{item!r} does not name a block; write NAME=GLOB, NAME being anything but 'whole'"
        )
    names = [parameter for parameter in known.first if fnmatchcase(parameter, glob)]
    if not names:
        every = list(known.first)
        raise OptionError(f"no parameter matches {glob!r}{_near(glob, every)}; {_some(every)}")
    return known.block(name, names)


def _near(wanted: str, names: Sequence[str]) -> str:
    near = get_close_matches(wanted, names, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _some(names: Sequence[str], count: int = 8) -> str:
    more = f", … ({len(names)} in all)" if len(names) > count else ""
    return ", ".join(names[:count]) + more
