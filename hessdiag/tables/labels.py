"""Names of any length as labels that fit."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from hessdiag.plain import printable


def shortened(names: list[str], width: int) -> list[str]:
    """``names``, those over ``width`` cut in the middle, where it keeps most of them apart."""
    cuts = [[_cut(name, head, width) for name in names] for head in range(width // 2, -1, -1)]
    return max(cuts, key=lambda labels: len(set(labels)))


def told_apart(names: Sequence[str], widths: Sequence[int]) -> list[str]:
    """``names`` in print, cut to the first of ``widths`` that tells them apart, or to the last."""
    plain = [printable(name) for name in names]
    for width in widths:
        labels = shortened(plain, width)
        if len(set(labels)) == len(set(plain)):
            return labels
    return labels


def some_of(names: Sequence[str], most: int, width: int) -> str:
    """The first few names in print, and how many more there are."""
    shown = ", ".join(shortened([printable(name) for name in names[:most]], width))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _cut(name: str, head: int, width: int) -> str:
    if cell_len(name) <= width:
        return name
    front, back = name[:head], name[len(name) - (width - 1 - head) :]
    while cell_len(front) > head:
        front = front[:-1]
    while cell_len(back) > width - 1 - head:
        back = back[1:]
    return f"{front}…{back}"
