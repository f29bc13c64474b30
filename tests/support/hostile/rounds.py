"""How much of the fuzz is run: a sample in the ordinary suite, all of it by ``make fuzz``."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable

ROUNDS = int(os.environ.get("HESSDIAG_FUZZ", "0"))
"""Random cases of each kind; 0 for the few of the ordinary suite."""


def sample(cases: Iterable[str], few: int) -> list[str]:
    """Names of the cases to run: all of them, or ``few``, always the same."""
    names = sorted(cases)
    return names if ROUNDS else sorted(random.Random(few).sample(names, few))


def seeds(few: int) -> range:
    """Seeds of the random cases to run."""
    return range(ROUNDS or few)
