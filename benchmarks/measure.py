"""Starts the children and interleaves their blocks: A B C A B C, so that a change of the machine meets all alike."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.arms.table import Arm

ROOT = Path(__file__).resolve().parent.parent
Say = Callable[[str], None]


class ArmFailed(Exception):
    """An arm could not be run; the message is the reason."""


@dataclass(frozen=True)
class Options:
    """How much is measured, and where.

    `pythons` maps a package to the interpreter that has it; `missing` one that could not be installed to the reason.
    """

    rounds: int
    steps: int
    warmup: int
    threads: int
    device: str
    timeout: float
    tiny: bool
    logs: Path
    pythons: Mapping[str | None, str]
    missing: Mapping[str, str]


class Child:
    """A process with one arm on one work."""

    def __init__(self, arm: Arm, work: str, options: Options, more: Sequence[str]) -> None:
        if arm.package in options.missing:
            raise ArmFailed(options.missing[arm.package])
        name = f"{work}-{arm.name}-{'check' if '--check' in more else 'run'}".replace(" ", "-").replace(",", "")
        self.log = options.logs / f"{name}.log"
        self.timeout = options.timeout
        command = [
            options.pythons[arm.package], "-m", "benchmarks.child", "--arm", arm.name, "--work", work,
            "--threads", str(options.threads), "--device", options.device, *(["--tiny"] if options.tiny else []), *more,
        ]  # fmt: skip
        settings = {
            "OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **settings}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, bufsize=0,
            )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """Return the child's next line; raises ArmFailed when it ends or takes longer than the timeout."""
        assert self.process.stdout is not None
        found, _, _ = select.select([self.process.stdout], [], [], self.timeout)
        line = self.process.stdout.readline() if found else b""
        if not line:
            self.process.kill()
            self.process.wait()
            raise ArmFailed(self.reason() if found else f"no answer within {self.timeout:g} s")
        return json.loads(line)

    def reason(self) -> str:
        """Return the last line that the child wrote, which is the message of an exception."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else f"it ended with status {self.process.returncode} and said nothing"

    def run(self, steps: int) -> dict[str, Any]:
        """Have the child do a block of steps."""
        self.tell(f"run {steps}")
        return self.answer()

    def stop(self) -> None:
        """Have the child end."""
        self.tell("stop")
        try:
            self.process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def tell(self, command: str) -> None:
        """Write one command; a child that has ended is noticed when it does not answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{command}\n".encode())
        except BrokenPipeError:
            return


def first_losses(arm: Arm, work: str, options: Options) -> dict[str, float]:
    """Return an arm's terms on the first batch, without dropout."""
    child = Child(arm, work, options, ["--check"])
    losses = child.answer()
    child.stop()
    return losses


def measure_work(work: str, arms: Sequence[Arm], options: Options, say: Say) -> dict[str, dict[str, Any]]:
    """Return what each arm did: its first losses, versions, base memory and blocks, or why it failed."""
    results: dict[str, dict[str, Any]] = {}
    children: dict[str, Child] = {}
    batches = options.warmup + options.rounds * options.steps + 1
    more = ["--batches", str(batches), "--warmup", str(options.warmup)]
    for arm in arms:
        results[arm.name] = {"note": arm.note, "tolerance": arm.tolerance, "blocks": []}
        try:
            results[arm.name]["losses"] = first_losses(arm, work, options)
            child = Child(arm, work, options, more)
            results[arm.name] |= child.answer()
            children[arm.name] = child
        except ArmFailed as failure:
            results[arm.name]["failed"] = str(failure)
        say(f"{work}: {arm.name}: {results[arm.name].get('failed', 'ready')}")
    for number in range(options.rounds):
        began = time.perf_counter()
        for name in list(children):
            try:
                results[name]["blocks"].append(children[name].run(options.steps))
            except ArmFailed as failure:
                results[name]["failed"] = str(failure)
                del children[name]
        say(f"{work}: round {number + 1} of {options.rounds} in {time.perf_counter() - began:.0f} s")
    for child in children.values():
        child.stop()
    return results
