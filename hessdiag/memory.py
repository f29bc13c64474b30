"""How much memory is free on a device."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from hessdiag.distributed.group import Group


def free_memory(device: torch.device) -> int:
    """Bytes free for new tensors on the device (CPU: what the system calls available)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        free = available * 1024
    except (OSError, ValueError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free, _container_limit())


def shared_memory(device: torch.device, group: Group) -> int:
    """Bytes that every rank can count on, the same number on all: they share machines."""
    return int(group.agreed(group.share_of(free_memory(device), device=device.type)))


def _container_limit() -> int:
    """Bytes left in this control group, which the system's own figure does not know."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or the limit is the word "max"
        return sys.maxsize
    return max(limit - used, 0)
