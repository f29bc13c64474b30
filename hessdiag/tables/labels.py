"""Names of any length as labels that fit."""

from __future__ import annotations

from rich.cells import cell_len


def shortened(names: list[str], width: int) -> list[str]:
    """``names``, those over ``width`` cut in the middle, where it keeps most of them apart."""
    cuts = [[_cut(name, head, width) for name in names] for head in range(width // 2, -1, -1)]
    return max(cuts, key=lambda labels: len(set(labels)))


def _cut(name: str, head: int, width: int) -> str:
    if cell_len(name) <= width:
        return name
    front, back = name[:head], name[len(name) - (width - 1 - head) :]
    while cell_len(front) > head:
        front = front[:-1]
    while cell_len(back) > width - 1 - head:
        back = back[1:]
    return f"{front}…{back}"
