"""Run a recipe, kill it somewhere, give the same command again, compare the student with an uninterrupted run's.

A program of its own, because it forks: the parent imports everything once and never trains, so that each run costs a
second, not ten. Prints one JSON line per trial. Usage: kill_and_resume.py FOLDER TRIALS METHOD...
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from method_recipe import method_recipe
from rich.console import Console

from layerdistill.runner import run

DEADLINE = 120


def start(recipe: dict[str, Any]) -> int:
    """Fork a run and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        run(recipe, console=Console(quiet=True))
        status = 0
    finally:
        os._exit(status)


def finish(child: int) -> int:
    """Wait for a run and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> str:
    """Kill at a moment."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    finish(child)
    return f"after {seconds:.2f} s"


def kill_in_a_save(child: int, folder: Path, number: int, patience: float) -> str:
    """Kill while the `number`-th unfinished folder is being written; where none is caught, kill anyway."""
    seen: set[str] = set()
    ends = time.monotonic() + patience
    while time.monotonic() < ends:
        found = unfinished(folder)
        seen |= found
        if len(seen) >= number and found:
            os.kill(child, signal.SIGKILL)
            finish(child)
            left = [path.name for path in folder.rglob(".partial-*")]
            return f"in a save, leaving {left}"
        time.sleep(0.0005)
    return kill_after(child, 0.0)


def unfinished(folder: Path) -> set[str]:
    """The unfinished folders that lie there now."""
    try:
        return {str(path) for path in folder.rglob(".partial-*") if path.is_dir()}
    except FileNotFoundError:  # a folder was renamed or deleted under the walk
        return set()


def student_hash(folder: Path) -> str:
    """The bytes of the finished student."""
    return hashlib.sha256((folder / "student" / "model.safetensors").read_bytes()).hexdigest()


def logged_steps(folder: Path) -> list[tuple[str, int]]:
    """The stage and step of every logged loss: a step of the same number comes again in another stage."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines if "loss" in line]


def history(folder: Path) -> tuple[list[tuple[str, int]], Any]:
    """The logged steps, and what the method has chosen (None for one that chooses nothing)."""
    path = folder / "decisions.json"
    return logged_steps(folder), json.loads(path.read_text()) if path.exists() else None


def shortened(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with many saves, and about 24 steps in all its stages together."""
    steps = {"ted": 8, "layer_prune": 12, "iskd": 9}.get(recipe["method"]["name"], 24)
    recipe["training"] |= {"save_steps": 2, "max_steps": steps}
    recipe["evaluation"] = {"cost": False}
    return recipe


def main(folder: Path, trials: int, method: str) -> None:
    """Run the trials."""
    generator = random.Random(20)
    recipe = shortened(method_recipe(folder, method))
    began = time.monotonic()
    assert finish(start({**recipe, "output": str(folder / "whole")})) == 0
    whole_time = time.monotonic() - began
    expected = student_hash(folder / "whole")
    for trial in range(trials):
        output = folder / f"trial-{trial}"
        child = start({**recipe, "output": str(output)})
        if trial % 3 == 2:
            how = kill_in_a_save(child, output, generator.randint(1, 8), 3 * whole_time)
        else:
            how = kill_after(child, generator.uniform(0.1, 0.95) * whole_time)
        found = sorted(path.name for path in output.glob("checkpoints/*/checkpoint-*"))
        finished_before = (output / "evaluation.json").exists()
        status = finish(start({**recipe, "output": str(output)}))
        same = status == 0 and student_hash(output) == expected
        steps = logged_steps(output)
        left = [str(path) for path in output.rglob(".partial-*")]
        print(
            json.dumps(
                {
                    "method": method, "trial": trial, "killed": how, "checkpoints": found,
                    "finished_before": finished_before, "status": status, "same": same,
                    "steps_once": len(steps) == len(set(steps)), "left": left,
                    "as_whole": history(output) == history(folder / "whole"),
                }
            ),
            flush=True,
        )  # fmt: skip
        shutil.rmtree(output)


if __name__ == "__main__":
    gc.freeze()  # or every child copies what was imported, only because the collector looks at it
    for each in sys.argv[3:]:
        main(Path(sys.argv[1]) / each, int(sys.argv[2]), each)
