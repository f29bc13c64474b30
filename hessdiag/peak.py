"""Peak memory of a stretch of work, as the device or the system counts it."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
HIGH_WATER = "5"  # what RESET takes to begin the peak anew


class PeakMemory:
    """How far memory rises above where it was when this was made.

    On CUDA, what torch has allocated there; on the CPU, what is resident. Where the system keeps
    no peak that can be begun anew, nothing is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.floor = _now(device)

    def begin(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            RESET.write_text(HIGH_WATER, encoding="ascii")
        except OSError:
            self.floor = None

    def held(self) -> int:
        """Bytes above the floor now; 0 where it is not known."""
        now = _now(self.device)
        return 0 if self.floor is None or now is None else max(now - self.floor, 0)

    def rise(self) -> int:
        """Bytes between the floor and the peak since :meth:`begin`; 0 where it is not known."""
        if self.floor is None:
            return 0
        if self.device.type == "cuda":
            return max(int(torch.cuda.max_memory_allocated(self.device)) - self.floor, 0)
        peak = _status("VmHWM")
        return 0 if peak is None else max(peak - self.floor, 0)


def _now(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS")


def _status(name: str) -> int | None:
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    except (OSError, ValueError, StopIteration):
        return None
