"""What a cross-check finds: values by several methods, and how far each is from the certified."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from hessdiag.options import Options
from hessdiag.quantity import Quantity, QuantityJson


@dataclass(frozen=True)
class Deviation:
    """How far a value is from the certified one.

    Attributes:
        relative: To the certified value itself; None where that is zero or unresolved.
        at_least: What is certain of that: the deviation from the nearest number that the
            certificate allows; 0 inside the interval. None where nothing is certified.
    """

    relative: float | None
    at_least: float | None


@dataclass(frozen=True)
class Entry:
    """One quantity by one method.

    Attributes:
        quantity: ``lambda_max`` or ``trace``.
        method: In words.
        found: The value, with what the method itself says of its error.
        products: Curvature products over the whole dataset.
        seconds: In which they and all else the method does were done.
        deviation: From the certified value; None where the method failed.
        failure: What it raised, or why it has no value, or None.
    """

    quantity: str
    method: str
    found: Quantity
    products: int
    seconds: float
    deviation: Deviation | None = None
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the five fields of the quantity beside the rest."""
        found: QuantityJson = self.found.to_json()
        rest = {"products": self.products, "seconds": self.seconds, "failure": self.failure}
        deviation = None if self.deviation is None else asdict(self.deviation)
        named = {"quantity": self.quantity, "method": self.method}
        return named | dict(found) | {"deviation": deviation} | rest


@dataclass(frozen=True)
class Crosscheck:
    """All entries, the certified ones last of each quantity.

    Attributes:
        task: Its name.
        checkpoint: File name, or None.
        size: Parameters of the whole network that are not frozen.
        device: Where it ran.
        engine: Of our products.
        options: Of the analysis.
        setup_seconds: Self-checks, the engine and the rounding of its products; in no entry.
        entries: In the order of the table.
        notes: What a reader must know to compare them.
    """

    task: str
    checkpoint: str | None
    size: int
    device: str
    engine: str
    options: Options
    setup_seconds: float
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The document of ``crosscheck --json``."""
        names = ("curvature", "dtype", "seed", "steps", "probes", "tolerance")
        return {
            "format": "hessdiag-crosscheck",
            "version": "1.0.0",
            "task": self.task,
            "checkpoint": self.checkpoint,
            "size": self.size,
            "device": self.device,
            "engine": self.engine,
            **{name: getattr(self.options, name) for name in names},
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "setup_seconds": self.setup_seconds,
            "entries": [entry.to_dict() for entry in self.entries],
            "notes": list(self.notes),
        }


def deviation_of(found: Quantity, truth: Quantity) -> Deviation | None:
    """How far ``found`` is from the certified ``truth``; None where there is no value."""
    if found.value is None:
        return None
    relative = None
    if truth.value is not None and truth.value != 0:
        relative = abs(found.value - truth.value) / abs(truth.value)
    low, high = truth.low, truth.high
    if low is None or high is None:
        return Deviation(relative, None)
    if low <= found.value <= high:
        return Deviation(relative, 0.0)
    away = low - found.value if found.value < low else found.value - high
    # Relative to whichever number of the interval makes it least.
    if low * high > 0:
        return Deviation(relative, min(abs(found.value - end) / abs(end) for end in (low, high)))
    size = max(abs(low), abs(high))
    return Deviation(relative, away / size if size > 0 else None)
