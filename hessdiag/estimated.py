"""What an analysis will cost: per block, and in all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class BlockEstimate:
    """What one block will cost, under all its variants.

    Attributes:
        name: Of the block.
        size: Parameters.
        skipped: Why it will not be analysed, or None.
        method: ``exact``, ``cut from whole`` (exact, from the matrix of the whole network),
            ``lanczos`` or ``power``; empty when skipped.
        engine: How its products are computed; empty when there are none.
        products: Curvature products, at most.
        noise_products: Those that measure their rounding, apart.
        seconds: In all.
        memory: Bytes at the peak, above what the process held before.
    """

    name: str
    size: int
    skipped: str | None
    method: str = ""
    engine: str = ""
    products: int = 0
    noise_products: int = 0
    seconds: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class Estimate:
    """What an analysis will cost.

    Attributes:
        blocks: In the order of the table.
        device: Where it will run.
        dtype: Of its products.
        setup_seconds: Loading data, hashing, the loss.
        selfcheck_products: Products of the self-checks, about.
        selfcheck_seconds: Measured.
        selfcheck_memory: Bytes at their peak, as for a block.
    """

    blocks: tuple[BlockEstimate, ...]
    device: str
    dtype: str
    setup_seconds: float
    selfcheck_products: int
    selfcheck_seconds: float
    selfcheck_memory: int

    @property
    def products(self) -> int:
        """Of all blocks, self-checks and noise apart."""
        return sum(block.products for block in self.blocks)

    @property
    def seconds(self) -> float:
        """From the model on loan to its return."""
        work = sum(block.seconds for block in self.blocks)
        return self.setup_seconds + self.selfcheck_seconds + work

    @property
    def memory(self) -> int:
        """Bytes at the peak: blocks come one after the other."""
        return max([self.selfcheck_memory, *(block.memory for block in self.blocks)])

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries for JSON."""
        return asdict(self) | {
            "products": self.products,
            "noise_products": sum(block.noise_products for block in self.blocks),
            "seconds": self.seconds,
            "memory": self.memory,
        }
