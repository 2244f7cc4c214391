"""W4 run, not computed, on few examples: `python -m benchmarks.study`, after `make bench`, into its results and page.

Every way to do the study runs each method as often as there are seeds, a process for each method (a step costs the same
whatever the seed, so it is one seed). What is counted is the
process time from making the models to the last step: a cache's filling, its checks and each run's setting up with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

import benchmarks.image_operators  # noqa: F401  before anything that imports transformers
from benchmarks.arms.table import find_arm
from benchmarks.machine import describe_machine
from benchmarks.measure import ROOT
from benchmarks.page import run_section, write_page
from benchmarks.setting import Setting, Stop
from benchmarks.summary import STUDY_EPOCHS, STUDY_METHODS, STUDY_RUN_WAYS, STUDY_SEEDS
from benchmarks.works import WORKS, Collate, make_examples, tiny


class Steps:
    """Counts optimisation steps and ends a run after the last."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> None:
        """Count one; raises Stop after the last."""
        self.left -= 1
        if not self.left:
            raise Stop


def run_method(way: str, work_name: str, batches: int, folder: Path, small: bool) -> float:
    """Return the process seconds of one method: every seed, every epoch."""
    work = tiny(WORKS[work_name]) if small else WORKS[work_name]
    examples, made = make_examples(work, batches), find_arm(way).load()
    began = time.process_time()
    for _ in range(STUDY_SEEDS):
        running = made(Setting(work, examples, Collate(work), "cpu", folder))
        with suppress(Stop):
            running.train(Steps(batches * STUDY_EPOCHS))
    return time.process_time() - began


def run_study(batches: int, small: bool) -> dict[str, dict[str, float]]:
    """Return the seconds of every way and method; the ways take turns, so that a change of the machine meets all."""
    found: dict[str, dict[str, float]] = {way: {} for way in STUDY_RUN_WAYS}
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="bench-study-") as root:
        for method, work in STUDY_METHODS.items():
            for number, way in enumerate(STUDY_RUN_WAYS):
                folder = Path(root) / str(number)
                folder.mkdir(exist_ok=True)
                command = [sys.executable, "-m", "benchmarks.study", "--batches", str(batches), "--folder", str(folder)]
                command += ["--way", way, "--work", work, *(["--tiny"] if small else [])]
                done = subprocess.run(
                    command, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE,
                    check=True,
                )  # fmt: skip
                found[way][method] = float(done.stdout.splitlines()[-1])
                sys.stderr.write(f"{method}, {way}: {found[way][method]:.0f} s\n")
    return found


def main(arguments: Sequence[str]) -> None:
    """Run the study, or (with `--way`) one method of it in this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--batches", type=int, default=8, help="batches of 32 examples in a pass; 8")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results.json", help="what to add it to")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the page to write anew")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the command; writes nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.way is not None:
        sys.stdout.write(f"\n{run_method(given.way, given.work, given.batches, given.folder, given.tiny)}\n")
        return
    results, machine = json.loads(given.results.read_text()), describe_machine()
    results["study"] = {"batches": given.batches, "machine": machine, "seconds": run_study(given.batches, given.tiny)}
    if given.tiny:
        sys.stdout.write(f"{run_section(results['study'])}\n")
        return
    given.results.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results, given.page)


if __name__ == "__main__":
    main(sys.argv[1:])
