"""The record of what an analysis ran on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("hessdiag", "torch", "numpy", "scipy", "h5py")


def environment(
    device: torch.device,
    switches: Mapping[str, Any],
    checks: Mapping[str, Any],
    engines: Mapping[str, str],
    tried: Mapping[str, Mapping[str, float]],
    timings: Mapping[str, float],
    failed: list[str],
) -> dict[str, Any]:
    """Versions, device, global switches, self-checks, engines (also tried ones), seconds."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": str(device),
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "switches": dict(switches),
        "checks": dict(checks),
        "engine": dict(engines),
        "engine_timings": {row: dict(seconds) for row, seconds in tried.items()},
        "seconds": dict(timings),
        "failed": list(failed),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
