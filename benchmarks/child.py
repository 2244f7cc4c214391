"""One arm on one work in a process of its own: says when it is ready, then does blocks of steps on command.

Commands come line by line on standard input (`run 20`, `stop`), answers go as JSON lines to standard output; whatever
libraries print goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import benchmarks.image_operators  # noqa: F401  before anything that imports transformers
from benchmarks.arms.table import Arm, find_arm
from benchmarks.memory import Memory
from benchmarks.setting import Running, Setting, Stop
from benchmarks.works import WORKS, Collate, make_examples, tiny


class Channel:
    """The lines between this process and the one that started it."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def say(self, answer: dict[str, Any]) -> None:
        """Write one answer."""
        self.out.write(json.dumps(answer) + "\n")

    def command(self) -> int:
        """Wait for a command and return how many steps to do; raises Stop when there is no more to do."""
        words = sys.stdin.readline().split()
        if len(words) != 2 or words[0] != "run":
            raise Stop
        return int(words[1])


class Blocks:
    """Counts optimisation steps: after the warm-up, and after each block, it answers and waits."""

    def __init__(
        self, running: Running, channel: Channel, memory: Memory, collate: Collate, warmup: int, ready: dict[str, Any]
    ) -> None:
        self.running, self.channel, self.memory, self.collate, self.ready = running, channel, memory, collate, ready
        self.left, self.size = warmup, 0
        self.began: dict[str, float] | None = None

    def __call__(self) -> None:
        """Count a step; at the end of a block answer, and wait for the next command."""
        self.left -= 1
        if self.left > 0:
            return
        self.memory.synchronise()
        self.channel.say(self.ready if self.began is None else self.block(self.began))
        self.left = self.size = self.channel.command()
        self.memory.forget_peak()
        self.began = self.clocks()

    def clocks(self) -> dict[str, float]:
        """Return what grows with the steps: seconds, tokens, and the seconds of parts where an arm counts them."""
        now = {"wall": time.perf_counter(), "cpu": time.process_time()}
        parts = {f"cpu of {name}": seconds for name, seconds in getattr(self.running, "parts", {}).items()}
        return {**now, "tokens": self.collate.real, "positions": self.collate.positions, **parts}

    def block(self, began: dict[str, float]) -> dict[str, Any]:
        """Return what the block took: seconds, bytes at the peak, and tokens."""
        taken = {name: now - began[name] for name, now in self.clocks().items()}
        return {**taken, "steps": self.size, "peak": self.memory.peak()}


def one_step() -> None:
    """Stop after the first step."""
    raise Stop


def versions(arm: Arm) -> dict[str, str]:
    """Return the versions that matter."""
    found = {}
    for name in ("torch", "transformers", arm.package or "layerdistill"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def without_dropout(model: nn.Module) -> None:
    """Make a model's forward pass the same each time, so that first losses can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--work", required=True, choices=list(WORKS))
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="models and texts of a few dozen numbers, for tests")
    parser.add_argument("--check", action="store_true", help="one step without dropout on one batch; say its losses")
    given = parser.parse_args()
    channel = Channel()
    torch.set_num_threads(given.threads)
    work = tiny(WORKS[given.work]) if given.tiny else WORKS[given.work]
    arm = find_arm(given.arm)
    made = arm.load()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        collate = Collate(work)
        examples = make_examples(work, 1 if given.check else given.batches)
        running = made(Setting(work, examples, collate, given.device, Path(folder)))
        memory = Memory(given.device)
        if given.check:
            without_dropout(running.student)
            step_done = one_step
        else:
            memory.settle()
            ready = {"base": memory.now(), "versions": versions(arm), "device": memory.device_name()}
            step_done = Blocks(running, channel, memory, collate, given.warmup, ready)
        with suppress(Stop):
            running.train(step_done)
        if given.check:
            channel.say({name: float(value) for name, value in running.losses.items()})


if __name__ == "__main__":
    main()
