"""An environment of its own for each of the tools compared with, so that none decides another's versions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import ROOT, Say

BESIDE = ("transformers", "accelerate", "datasets", "requests")
"""What a tool is used with; ModelOpt imports requests without asking for it."""


def prepare(packages: Sequence[str], folder: Path, say: Say) -> tuple[dict[str | None, str], dict[str, str]]:
    """Return the interpreter of each package, and for those that do not install the reason."""
    pythons: dict[str | None, str] = {None: sys.executable}
    missing: dict[str, str] = {}
    for package in packages:
        place = folder / package
        python = place / "bin" / "python"
        if not (place / "installed").exists():
            say(f"installing {package} into {place}")
            if reason := install(package, place, python):
                missing[package] = f"does not install: {reason}"
                say(f"{package} {missing[package]}")
                continue
            (place / "installed").touch()
        pythons[package] = str(python)
    return pythons, missing


def install(package: str, place: Path, python: Path) -> str | None:
    """Make an environment with a package by its name, torch first and at our versions; return why that failed."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    constrained = [*pip, "-c", str(ROOT / "constraints.txt")]
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(place)],
        [*constrained, "torch"],
        [*constrained, "torch", *BESIDE, package],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
            return lines[-1].strip() if lines else f"{command[0]} ended with status {done.returncode}"
    return None
