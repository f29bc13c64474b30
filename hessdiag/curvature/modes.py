"""Dispatch modes that do not bring torch's compiler into the process."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class EagerMode(TorchDispatchMode):
    """A mode whose handler is not marked for the compiler, the import of which takes seconds.

    Nothing is compiled during an analysis, so that there is nothing to keep out of it.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
