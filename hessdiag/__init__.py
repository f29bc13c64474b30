"""Why does this network train slowly? Hessian conditioning with certificates, for PyTorch.

``import hessdiag`` is all a user types; heavy modules load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hessdiag.analysis import analyze as analyze
    from hessdiag.quantity import Quantity as Quantity
    from hessdiag.recorder import Recorder as Recorder
    from hessdiag.run import Run as Run
    from hessdiag.store.journal import open_run as open_run
    from hessdiag.task import Task as Task

_LAZY = {
    "Quantity": ("hessdiag.quantity", "Quantity"),
    "Recorder": ("hessdiag.recorder", "Recorder"),
    "Run": ("hessdiag.run", "Run"),
    "Task": ("hessdiag.task", "Task"),
    "analyze": ("hessdiag.analysis", "analyze"),
    "open_run": ("hessdiag.store.journal", "open_run"),
}

__all__ = ["Quantity", "Recorder", "Run", "Task", "__version__", "analyze", "open_run"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hessdiag' has no attribute {name!r}; it has {__all__}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
