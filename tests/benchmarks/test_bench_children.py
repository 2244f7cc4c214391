"""The benchmark's processes: they compute the same thing, obey, and their result becomes a page."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench import parse, refuse_another_machine
from benchmarks.summary import disagreements, not_the_students

ROOT = Path(__file__).resolve().parent.parent.parent


def start(*arguments: str) -> subprocess.Popen[str]:
    """A child on the work W1 at its tiniest."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.child", "--work", "W1", "--tiny", *arguments],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_first_losses_agree_with_the_loop_written_by_hand() -> None:
    children = [start("--check", "--arm", arm) for arm in ("naive loop", "layerdistill")]
    naive, ours = (json.loads(child.communicate(timeout=200)[0]) for child in children)
    assert naive.keys() == ours.keys() == {"task", "logits", "hidden"}
    assert ours == pytest.approx(naive, rel=1e-3)


def test_a_child_says_how_long_its_teacher_and_its_hidden_terms_took() -> None:
    child = start("--arm", "layerdistill, cached", "--batches", "3", "--warmup", "1")
    said, errors = child.communicate("run 2\nstop\n", timeout=200)
    assert child.returncode == 0, errors
    block = json.loads(said.splitlines()[-1])
    assert block["cpu of teacher"] > 0
    assert block["cpu of hidden"] > 0
    assert block["cpu of teacher"] + block["cpu of hidden"] < block["cpu"]


def test_a_child_does_as_many_steps_as_it_is_told() -> None:
    child = start("--arm", "naive loop", "--batches", "4", "--warmup", "1")
    said, errors = child.communicate("run 2\nrun 3\nstop\n", timeout=200)
    answers = [json.loads(line) for line in said.splitlines()]
    assert child.returncode == 0, errors
    ready, *blocks = answers
    assert ready["base"] > 0
    assert ready["versions"]["torch"] != "not installed"
    assert [block["steps"] for block in blocks] == [2, 3]
    assert all(block["peak"] > 0 and block["wall"] > 0 and block["cpu"] > 0 for block in blocks)
    assert blocks[0]["tokens"] <= blocks[0]["positions"] <= 2 * 4 * 16


def block(cpu: float, peak: int, **parts: float) -> dict[str, Any]:
    """Two steps that took `cpu` seconds."""
    return {"cpu": cpu, "wall": 2 * cpu, "steps": 2, "peak": peak, "tokens": 60, "positions": 80, **parts}


def arm(*seconds: float, peak: int = 3_000_000, parts: tuple[float, ...] = (), **more: Any) -> dict[str, Any]:
    """What was measured of an arm; `parts` are the seconds of teacher and hidden terms in each block."""
    losses = {"task": 0.7, "logits": 0.1}
    named = {f"cpu of {part}": seconds for part, seconds in zip(("teacher", "hidden"), parts, strict=False)}
    return {
        "note": "", "tolerance": 1e-3, "base": 1_000_000, "losses": losses,
        "blocks": [block(second, peak, **named) for second in seconds], **more,
    }  # fmt: skip


def small_result() -> dict[str, Any]:
    """A result as the benchmark writes it."""
    works = {
        name: {
            "naive loop": arm(2.0, 4.0, 4.0),
            "floor": arm(0.5, 1.0, 1.0),
            "layerdistill": arm(1.0, 1.0, 2.0, peak=2_000_000),
            "layerdistill, cached": arm(*(0.5 * slower for _ in range(3)), parts=(0.025, 0.05)),
            "torchdistill": arm(2.0, 4.0, 4.0, losses={"task + logits": 0.9}),
            "TextBrewer": {**arm(), "failed": "does not install: no such package"},
        }
        for name, slower in (("W1", 1.0), ("W2", 1.25), ("W4-kd", 1.0), ("W4-cosine", 1.0))
    }
    machine = {
        "processor": "a processor", "flags": ["amx_bf16"], "cores": 2, "memory_gb": 24.0, "system": "Linux",
        "python": "3.11", "load": 0.0, "commit": "abc",
    }  # fmt: skip
    about = {
        name: {
            "title": "a title",
            "words": "Some words.",
            "steps": 2,
            "rounds": 3,
            "date": "2026-01-01",
            "commit": "abc",
        }
        for name in works
    }
    return {
        "date": "2026-01-01", "machine": machine, "threads": 1, "device": "cpu", "rounds": 3, "command": "a command",
        "about": about, "works": works,
    }  # fmt: skip


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    result, page = tmp_path / "results.json", tmp_path / "page.md"
    result.write_text(json.dumps(small_result()))
    subprocess.run([sys.executable, "-m", "benchmarks.page", str(result), str(page)], cwd=ROOT, check=True)
    lines = page.read_text().splitlines()
    ours = next(line for line in lines if line.startswith("| layerdistill |"))
    # Blocks of two steps, paired: 1/2, 1/4, 2/4. Medians, memory over the base, and the share beyond 0.25 of 0.5.
    assert (
        ours
        == "| layerdistill | 500 | 0.50 [0.25-0.50] | 1,000 | 0.50 [0.25-0.50] | 40 | 1 | 0.50 | 50% |  |  | "
        + ("first losses agree |")
    )
    cached = next(line for line in lines if line.startswith("| layerdistill, cached |"))
    assert " | 5.0% | 10.0% | first losses agree |" in cached, "0.025 of 0.5 s went into reading, 0.05 into the terms"
    # On W2 a cached step takes 1.25 of what it takes without hidden terms.
    hidden = [line for line in lines[lines.index("## What hidden terms cost") :] if line.startswith("| W2")]
    assert hidden == ["| W2 | naive loop |  | 0.0% |  |", "| W2 | layerdistill, cached | 8.0% | 20.0% |  |"]
    assert "task + logits 0.9, not 0.8" in next(line for line in lines if line.startswith("| torchdistill |"))
    assert "**failed:** does not install: no such package" in next(line for line in lines if "TextBrewer" in line)
    assert "a processor, 2 cores, 24.0 GB; amx_bf16" in page.read_text()
    # Four methods of 15 passes of 2,105 steps of 2 s and of 0.5 s.
    study = [line for line in lines[lines.index("## W4: a study") :] if line.startswith("|")]
    assert study[2:] == ["| naive loop | 70.2 | 1.00 |  |", "| layerdistill | 17.5 | 0.25 |  |"], (
        "a first pass is lacking"
    )


def test_a_study_that_was_run_has_its_table(tmp_path: Path) -> None:
    ways = ("naive loop", "layerdistill", "layerdistill, best", "layerdistill, cached")
    methods = ("kd", "ild", "ild, cosine", "cka")
    seconds = {way: dict.fromkeys(methods, 10.0 / (number + 1)) for number, way in enumerate(ways)}
    study = {"batches": 10, "machine": {"commit": "abc", "load": 0.5}, "seconds": seconds}
    result, page = tmp_path / "results.json", tmp_path / "page.md"
    result.write_text(json.dumps({**small_result(), "study": study}))
    subprocess.run([sys.executable, "-m", "benchmarks.page", str(result), str(page)], cwd=ROOT, check=True)
    assert "epochs over 320 examples" in page.read_text()
    assert "| layerdistill | 5 | 5 | 5 | 5 | 20 | 0.50 |  |" in page.read_text().splitlines()


def test_one_method_of_the_study_is_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.study", "--tiny", "--batches", "1", "--way", "naive loop", "--work", "W2",
         "--folder", str(tmp_path)], cwd=ROOT, text=True, capture_output=True, check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert float(done.stdout.splitlines()[-1]) > 0


def test_losses_that_are_not_numbers_or_not_there_do_not_agree() -> None:
    results = {
        "naive loop": arm(1.0), "nan": arm(1.0, losses={"task": math.nan, "logits": 0.1}),
        "none": arm(1.0, losses={}), "other": arm(1.0, losses={"task": 0.7, "whole": 0.8}), "same": arm(1.0),
    }  # fmt: skip
    assert disagreements(results, "nan") == ["task nan, not 0.7"]
    assert disagreements(results, "none") == ["task, logits not compared"]
    assert disagreements(results, "other") == ["logits not compared"]
    assert disagreements(results, "same") == []


def test_a_floor_over_other_batches_says_nothing() -> None:
    results = {"naive loop": arm(4.0), "floor": arm(1.0), "same": arm(2.0), "shorter": arm(2.0)}
    results["shorter"]["blocks"][0]["positions"] = 60
    assert not_the_students(results, "same", "cpu") == 0.5
    assert not_the_students(results, "shorter", "cpu") is None


def test_a_quick_look_leaves_the_results_alone() -> None:
    assert parse(["--quick"]).output is None and parse(["--tiny"]).page is None
    assert parse([]).output == ROOT / "benchmarks" / "results.json"


def test_works_of_another_machine_are_not_kept() -> None:
    kept = small_result()
    refuse_another_machine(kept, small_result())
    refuse_another_machine({}, kept)
    with pytest.raises(SystemExit, match="with threads 1, not 2"):
        refuse_another_machine(kept, {**kept, "threads": 2})
    with pytest.raises(SystemExit, match="another processor"):
        refuse_another_machine(kept, {**kept, "machine": {**kept["machine"], "processor": "faster"}})
