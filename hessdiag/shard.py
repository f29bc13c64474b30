"""A shard: one of the parts that an analysis is split into, by its blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hessdiag.errors import OptionError
from hessdiag.run import Run

WRITTEN = re.compile(r"\s*([0-9]{1,6})\s*/\s*([0-9]{1,6})\s*")


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``count`` of an analysis, from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def sentence(self, own: int, every: int) -> str:
        """How many of the blocks are the shard's ``own``."""
        if own:
            return f"shard {self} holds {own} of {every} blocks; `hessdiag merge` joins the shards"
        return (
            f"shard {self} holds none of the {every} blocks, which are fewer than the shards; "
            "`hessdiag merge` takes it all the same"
        )


def parse_shard(text: object) -> Shard:
    """The shard that ``I/N`` names.

    Raises:
        OptionError: It is not written so, or I is not in 1 to N.
    """
    match = WRITTEN.fullmatch(text) if isinstance(text, str) else None
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise OptionError(
            f"shard is {text!r}; it must be I/N, part I of N with I from 1 to N, such as 2/8"
        )
    return Shard(number, count)


def shard_of(run: Run) -> Shard | None:
    """The shard that a run is; None for a run of all blocks."""
    text = run.provenance.config.get("shard")
    return None if text is None else parse_shard(text)


def blocks_of(run: Run) -> list[str]:
    """All blocks of the analysis, in the order of the table, whichever the run holds."""
    own = [block.name for block in run.blocks]
    return list(run.provenance.environment.get("blocks", own))


def shard_sentence(run: Run) -> str | None:
    """How much of its analysis a run is; None for a run of all blocks."""
    shard = shard_of(run)
    return None if shard is None else shard.sentence(len(run.blocks), len(blocks_of(run)))
