"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
"""Instruction sets that decide what a processor does fast."""


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory, system and the commit that was measured."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    names = re.findall(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    listed = re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    have = set(listed[0].split()) if listed else set()
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in have],
        "cores": os.cpu_count(),
        "memory_gb": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "commit": commit(),
    }


def commit() -> str:
    """Return the short hash of the checkout, with a mark when files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
