"""Bytes in use and at the peak, of the process or of its GPU."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """Resident memory of the process (Linux can forget a peak, elsewhere it is that of the whole run) or of the GPU."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"

    def device_name(self) -> str:
        """Return the name of the GPU, `cpu` without one."""
        return torch.cuda.get_device_name() if self.on_gpu else "cpu"

    def synchronise(self) -> None:
        """Wait until the device has done what it was told."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def now(self) -> int:
        """Return the bytes in use."""
        if self.on_gpu:
            return torch.cuda.memory_allocated()
        return read_status("VmRSS") if STATUS.exists() else largest()

    def settle(self) -> None:
        """Give back what was used on the way here, so that it is neither base nor a reserve for what comes."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)

    def peak(self) -> int:
        """Return the bytes at the peak since it was last forgotten."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        return read_status("VmHWM") if STATUS.exists() else largest()

    def forget_peak(self) -> None:
        """Begin a new peak."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif CLEAR.exists():
            CLEAR.write_text("5")


def read_status(name: str) -> int:
    """Return a line of the kernel's account of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def largest() -> int:
    """Return the largest resident size so far; macOS counts bytes, others kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
