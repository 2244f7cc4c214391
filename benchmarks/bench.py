"""The command line: `python -m benchmarks.bench`, or `make bench`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms.table import ARMS, Arm, packages
from benchmarks.environments import prepare
from benchmarks.machine import describe_machine
from benchmarks.measure import ROOT, Options, measure_work
from benchmarks.page import work_table, write_page
from benchmarks.works import WORKS, tiny

QUICK = {"works": "W1", "peers": "none", "rounds": 3, "steps": 4, "warmup": 1}
"""What `--quick` stands for, where nothing else is given."""
QUICK_ARMS = ("naive loop", "layerdistill", "layerdistill, best")
FULL = {"works": ",".join(WORKS), "peers": "all", "rounds": 7, "steps": 20, "warmup": 3}
SHORTER = {"gpt2": 4}
"""By how much blocks are shorter where a step takes seconds."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what is not given depends on `--quick`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--works", help=f"which to measure, of {','.join(WORKS)}; all")
    parser.add_argument("--arms", help="names of arms, separated by semicolons; all that --peers leaves")
    parser.add_argument("--peers", help=f"all, none, or some of {','.join(packages())}; all")
    parser.add_argument("--rounds", type=int, help="how often the arms take turns; 7")
    parser.add_argument("--steps", type=int, help="optimisation steps in a block (a quarter for W3); 20")
    parser.add_argument("--warmup", type=int, help="steps before the first block; 3")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--venvs", type=Path, default=ROOT / "benchmarks" / ".venvs", help="where tools are installed")
    parser.add_argument("--output", type=Path, help="everything measured; benchmarks/results.json, none with --quick")
    parser.add_argument("--keep", action="store_true", help="leave the works in --output that are not measured now")
    parser.add_argument("--page", type=Path, help="the page to write; docs/benchmarks.md, none with --quick")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds to wait for an arm's answer; 1800")
    parser.add_argument("--quick", action="store_true", help="W1, ours against the naive loop, in two minutes")
    parser.add_argument("--tiny", action="store_true", help="models of a few dozen numbers, to try the commands")
    given = parser.parse_args(arguments)
    for name, value in (QUICK if given.quick else FULL).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if not given.quick and not given.tiny:
        given.page = given.page or ROOT / "docs" / "benchmarks.md"
        given.output = given.output or ROOT / "benchmarks" / "results.json"
    given.works = given.works.split(",")
    if unknown := set(given.works) - set(WORKS):
        parser.error(f"no work is called {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    return given


def chosen_arms(given: argparse.Namespace) -> list[Arm]:
    """Return the arms that the command line leaves; exits for a name that none has."""
    peers = {"all": packages(), "none": []}.get(given.peers, given.peers.split(","))
    own = QUICK_ARMS if given.quick else [arm.name for arm in ARMS if arm.package is None]
    names = [arm.name for arm in ARMS if arm.name in own or arm.package in peers]
    if given.arms is not None:
        names = [name.strip() for name in given.arms.split(";")]
    if unknown := set(names) - {arm.name for arm in ARMS}:
        sys.exit(f"no arm is called {', '.join(sorted(unknown))}; there are: {'; '.join(arm.name for arm in ARMS)}")
    return [arm for arm in ARMS if arm.name in names]


def refuse_another_machine(kept: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Exit where works that are kept were measured in another way: figures are computed from several of them."""
    for name in ("threads", "device"):
        if kept and kept[name] != result[name]:
            sys.exit(f"--keep: the works kept were measured with {name} {kept[name]}, not {result[name]}.")
    if kept and kept["machine"]["processor"] != result["machine"]["processor"]:
        sys.exit(f"--keep: the works kept were measured on {kept['machine']['processor']}, which is another processor.")


def say(sentence: str) -> None:
    """Tell what is going on."""
    sys.stderr.write(f"{datetime.now():%H:%M:%S} {sentence}\n")


def main(arguments: Sequence[str]) -> None:
    """Install, measure, and write results and page; results are written after each work."""
    given = parse(arguments)
    arms = chosen_arms(given)
    needed = list(dict.fromkeys(arm.package for arm in arms if arm.package is not None))
    result: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": describe_machine(), "threads": given.threads,
        "device": given.device, "rounds": given.rounds, "about": {}, "works": {},
        "command": shlex.join(["python", "-m", "benchmarks.bench", *arguments]),
    }  # fmt: skip
    kept = json.loads(given.output.read_text()) if given.keep and given.output and given.output.exists() else {}
    refuse_another_machine(kept, result)
    result = {**kept, **result, "about": kept.get("about", {}), "works": kept.get("works", {})}
    pythons, missing = prepare(needed, given.venvs, say)
    with tempfile.TemporaryDirectory(prefix="bench-logs-") as logs:
        for name in given.works:
            work = tiny(WORKS[name]) if given.tiny else WORKS[name]
            steps = max(1, given.steps // SHORTER.get(work.family, 1))
            options = Options(
                given.rounds, steps, given.warmup, given.threads, given.device, given.timeout, given.tiny, Path(logs),
                pythons, missing,
            )  # fmt: skip
            taking_part = [arm for arm in arms if name in arm.works]
            result["about"][name] = {
                "title": work.title, "words": work.words, "steps": steps, "rounds": given.rounds,
                "date": result["date"], "commit": result["machine"]["commit"], "load": result["machine"]["load"],
            }  # fmt: skip
            result["works"][name] = measure_work(name, taking_part, options, say)
            if given.output is not None:
                given.output.write_text(json.dumps(result, indent=1) + "\n")
            sys.stdout.write(f"\n{name}: {work.words}\n\n{work_table(result['works'][name], given.device != 'cpu')}\n")
    if given.page is not None:
        write_page(result, given.page)
        say(f"wrote {given.page}")


if __name__ == "__main__":
    main(sys.argv[1:])
