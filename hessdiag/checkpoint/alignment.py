"""The names of a file renamed to those of a model: wrappers and prefixes taken off, no guesses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Components that torch's wrappers put into names, also of submodules."""

PARALLEL = "module"
"""What DataParallel and its kin put before every name; a submodule may be called so too."""


@dataclass(frozen=True)
class Alignment:
    """How the names of a file become names of a model.

    Attributes:
        renamed: Of each name that stays, the new one, which is the model's where it fits.
        removed: Prefixes that were taken off, as a person would write them.
        outside: Names that are not under the prefix that was taken off.
        rivals: Prefixes that fit the model equally well; then none was taken off.
        added: The prefix that the file lacks, with its dot.
    """

    renamed: dict[str, str]
    removed: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    added: str = ""


def align(
    names: Iterable[str], wanted: Iterable[str], *, embedded: bool = False, base: str = ""
) -> Alignment:
    """Rename ``names`` so that as many as possible are among ``wanted``.

    Args:
        names: Of the file.
        wanted: Of the model.
        embedded: The network may be one part of what the file holds, so the prefix that leads to
            it need not be that of every name.
        base: A prefix that files of this kind of model may lack (``transformer.``).
    """
    own, theirs = list(names), list(wanted)
    best = Alignment({name: name for name in own})
    best_score = len(set(own) & set(theirs))
    for here in _unwrapped(own):
        for there, added in _targets(theirs, base):
            back = dict(zip(there, theirs, strict=True))
            score = len(set(here) & set(back))
            if score > best_score and len(set(here)) == len(here) and len(back) == len(theirs):
                best_score = score
                renamed = {name: back.get(new, new) for name, new in zip(own, here, strict=True)}
                best = Alignment(renamed, _removed(own, here), added=added)
    return _without_prefix(own, theirs, embedded, best, best_score)


def _without_prefix(
    own: list[str], theirs: list[str], embedded: bool, best: Alignment, best_score: int
) -> Alignment:
    """Take off the one prefix under which most of the model is; ``best`` if there is none."""
    plain = dict(zip(own, map(_bare, own), strict=True))
    back = dict(zip(map(_bare, theirs), theirs, strict=True))
    if len(set(plain.values())) < len(own) or len(back) < len(theirs):
        return best
    scores = Counter(
        prefix for name in plain.values() for prefix, rest in _cuts(name) if rest in back
    )
    if not embedded:
        for prefix in list(scores):
            if not all(name.startswith(prefix) for name in plain.values()):
                del scores[prefix]
    top = max(scores.values(), default=0)
    if top <= best_score or 2 * top < len(theirs):
        return best
    leaders = [prefix for prefix, score in scores.items() if score == top]
    if len(leaders) > 1:
        return Alignment(best.renamed, best.removed, rivals=tuple(leaders))
    prefix = leaders[0]
    renamed = {}
    for name, bare in plain.items():
        if bare.startswith(prefix):
            rest = bare.removeprefix(prefix)
            renamed[name] = back.get(rest, rest)
    wrappers = _removed(own, list(plain.values()))
    outside = tuple(name for name in own if name not in renamed)
    return Alignment(renamed, (f"'{prefix}'", *wrappers), outside)


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a dotted name into a prefix with its dot, and the rest."""
    start = name.find(".")
    while start >= 0:
        yield name[: start + 1], name[start + 1 :]
        start = name.find(".", start + 1)


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ANYWHERE)


def _unwrapped(names: Sequence[str]) -> Iterator[list[str]]:
    """The names as they are, without wrappers, and without one, two, … common ``module.``."""
    yield list(names)
    bare = [_bare(name) for name in names]
    yield bare
    while bare and all(name.startswith(f"{PARALLEL}.") for name in bare):
        bare = [name.removeprefix(f"{PARALLEL}.") for name in bare]
        yield bare


def _targets(names: Sequence[str], base: str) -> Iterator[tuple[list[str], str]]:
    """The model's names unwrapped, and without the prefix that the file may lack."""
    for unwrapped in _unwrapped(names):
        yield unwrapped, ""
    if base:
        yield [name.removeprefix(base) for name in names], base


def _removed(before: Sequence[str], after: Sequence[str]) -> tuple[str, ...]:
    """The wrappers that are in some name before and not after, as a person would write them."""
    lost: dict[str, None] = {}
    for old, new in zip(before, after, strict=True):
        for part in (PARALLEL, *ANYWHERE):
            if old.split(".").count(part) > new.split(".").count(part):
                lost[f"'{part}.'"] = None
    return tuple(lost)
