"""Groups of columns over the same rows: beside each other where they fit, else below."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from hessdiag.tables.columns import GAP, Shape, aligned, shape_of
from hessdiag.tables.marks import Mark

BETWEEN = GAP + " "
"""Groups stand this far apart."""
BEST = "*"
EMPTY = Mark("")


@dataclass(frozen=True, slots=True)
class Column:
    """Two header lines and the cells below them, with the widths that these need."""

    header: tuple[str, str]
    cells: tuple[Mark, ...]
    shape: Shape


def column(header: tuple[str, str], cells: Sequence[Mark]) -> Column:
    """A column as wide as its header and its cells."""
    return Column(header, tuple(cells), shape_of(header, [c for c in cells if c != EMPTY]))


@dataclass(frozen=True, slots=True)
class Group:
    """Columns under a title; the first ``repeated`` begin every part of a group that is split."""

    title: str
    columns: tuple[Column, ...]
    repeated: int = 0

    @property
    def columns_width(self) -> int:
        """Of the columns side by side."""
        columns = sum(c.shape.total for c in self.columns)
        return columns + len(GAP) * (len(self.columns) - 1)

    @property
    def width(self) -> int:
        """Of a line."""
        return max(len(self.title), self.columns_width)


def panels(groups: Sequence[Group], room: int) -> Iterator[list[Group]]:
    """The groups, in their order, as many beside each other as fit into ``room``.

    A group that does not fit alone is split; where not even one column fits beside those to be
    repeated, nothing is.
    """
    panel: list[Group] = []
    left = room
    for group in groups:
        for part in _split(group, room):
            if panel and part.width + len(BETWEEN) > left:
                yield panel
                panel, left = [], room
            panel.append(part)
            left -= part.width + len(BETWEEN)
    if panel:
        yield panel


def _split(group: Group, room: int) -> Iterator[Group]:
    """Parts of nearly equal numbers of columns, as few as fit."""
    for front in (group.columns[: group.repeated], ()):
        rest = group.columns[len(front) :]
        count = len(rest)
        for parts in range(1, count + 1):
            cuts = [round(count * k / parts) for k in range(parts + 1)]
            found = [
                Group(
                    f"{group.title} ({k}/{parts})" if parts > 1 else group.title,
                    (*front, *rest[cuts[k - 1] : cuts[k]]),
                )
                for k in range(1, parts + 1)
            ]
            if all(part.width + len(BETWEEN) <= room for part in found):
                yield from found
                return
    yield from found


def panel_lines(
    panel: Sequence[Group], labels: Sequence[str], rules: Collection[int]
) -> Iterator[Text]:
    """The lines of a panel: headers, a rule, the rows, and a rule before each of ``rules``."""
    front = max(map(cell_len, ("block", *labels)))
    yield _line("", [group.title.ljust(group.width) for group in panel], front, "bold")
    for level in (0, 1):
        if any(column.header[level] for group in panel for column in group.columns):
            heads = [_heads(group, level) for group in panel]
            yield _line("block" if level else "", heads, front, "bold")
    rule = _line("─" * front, ["─" * group.width for group in panel], front, "dim")
    yield rule
    padding = [" " * (group.width - group.columns_width) for group in panel]
    for row, label in enumerate(labels):
        if all(column.cells[row] == EMPTY for group in panel for column in group.columns):
            continue
        if row in rules:
            yield rule
        line = Text(label + " " * (front - cell_len(label)))
        for group, after in zip(panel, padding, strict=True):
            start = BETWEEN
            for column in group.columns:
                mark = column.cells[row]
                text = " " * column.shape.total if mark == EMPTY else aligned(mark, column.shape)
                line.append(start)
                line.append(text, style="bold" if mark.tail.endswith(BEST) else "")
                start = GAP
            line.append(after)
        yield line


def _heads(group: Group, level: int) -> str:
    heads = [column.header[level].rjust(column.shape.total) for column in group.columns]
    return GAP.join(heads).ljust(group.width)


def _line(label: str, parts: Sequence[str], front: int, style: str) -> Text:
    return Text(BETWEEN.join([label.ljust(front), *parts]), style=style)
