"""Whether torchrun started this process as one of several; known without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

# torchrun alone sets it; RANK and WORLD_SIZE other launchers set, also for a single process.
_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several that torchrun started."""
    return _BY_TORCHRUN in environment and int(environment.get("WORLD_SIZE", "1")) > 1


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The rank of this process; 0 of one that was started alone."""
    return int(environment.get("RANK", "0")) if launched(environment) else 0
