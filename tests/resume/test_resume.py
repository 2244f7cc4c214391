"""The same command again goes on with a run: after Ctrl-C, after a kill, also in the middle of a save."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from toy_recipe import toy_recipe

from layerdistill.core.errors import UserError
from layerdistill.runner import run

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def kill_trials(folder: Path, trials: int, *methods: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_and_resume.py"), str(folder), str(trials), *methods],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def assert_all_same(trials: list[dict]) -> None:
    for trial in trials:
        assert trial["status"] == 0, trial
        assert trial["same"], trial
        assert trial["steps_once"], trial
        assert trial["as_whole"], trial
        assert trial["left"] == [], trial


def test_killed_in_a_stage_or_between_stages_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    methods = ("cka", "ted", "layer_prune")
    trials = kill_trials(tmp_path, 3, *methods)
    assert [trial["method"] for trial in trials] == [method for method in methods for _ in range(3)]
    assert_all_same(trials)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", ["none", "ild", "lora_ild", "ted", "iskd", "layer_prune"])
def test_twenty_random_kills(tmp_path: Path, method: str) -> None:
    trials = kill_trials(tmp_path, 20, method)
    assert len(trials) == 20
    assert_all_same(trials)
    assert sum("in a save" in trial["killed"] for trial in trials) >= 4, "kills inside saves must have happened"
    assert sum(bool(trial["checkpoints"]) and not trial["finished_before"] for trial in trials) >= 5


@pytest.fixture(scope="module")
def interruptible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of several seconds, which has been run once without being interrupted, in the folder `whole`."""
    folder = tmp_path_factory.mktemp("interruptible")
    recipe = toy_recipe(folder, "ild")
    recipe["training"] |= {"max_steps": 200, "save_steps": 1000, "logging_steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run({**recipe, "output": str(folder / "whole")}, console=Console(quiet=True))
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_its_state_says_how_to_go_on_and_does(
    interruptible: Path, number: signal.Signals
) -> None:
    output = interruptible / number.name
    recipe = [str(interruptible / "recipe.yaml"), "--set", f"output={output}"]
    command = [sys.executable, "-m", "layerdistill", "train", *recipe]
    metrics = output / "metrics.jsonl"
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    ends = time.monotonic() + 120
    while time.monotonic() < ends and not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        time.sleep(0.02)
    running.send_signal(number)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors[-2000:]
    assert "Give the same command again to go on" in errors
    assert "Traceback" not in errors
    assert list((output / "checkpoints" / "distill").glob("checkpoint-*"))
    assert not (output / "evaluation.json").exists()

    again = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert again.returncode == 0, again.stderr[-2000:]
    ours = (output / "student" / "model.safetensors").read_bytes()
    theirs = (interruptible / "whole" / "student" / "model.safetensors").read_bytes()
    assert hashlib.sha256(ours).digest() == hashlib.sha256(theirs).digest()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert steps == sorted(set(steps)), "every step is logged once"


def test_a_finished_run_is_not_run_again_unless_asked(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "none")
    first = run(recipe, console=Console(quiet=True))
    written = (first.student / "model.safetensors").stat().st_mtime_ns
    second = run(recipe, console=Console(quiet=True))
    assert (second.student / "model.safetensors").stat().st_mtime_ns == written
    assert second.metrics == first.metrics
    third = run(recipe, again=True, console=Console(quiet=True))
    assert (third.student / "model.safetensors").stat().st_mtime_ns > written
    assert third.metrics == first.metrics


def test_only_an_unfinished_run_goes_on_with_another_way_of_measuring(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "none")
    finished = run(recipe, console=Console(quiet=True))
    other = {**recipe, "evaluation": {"batch_size": 3, "latency": False, "latency_seq": 4}}
    with pytest.raises(
        UserError, match=r"another recipe \(evaluation\.batch_size: 64 there, 3 now; evaluation\.latency"
    ):
        run(other, console=Console(quiet=True))
    written = (finished.student / "model.safetensors").read_bytes()
    (finished.folder / "evaluation.json").unlink()
    assert run(other, console=Console(quiet=True)).cost["student"]["seq"] == 4
    assert (finished.student / "model.safetensors").read_bytes() == written
    assert yaml.safe_load((finished.folder / "recipe.yaml").read_text())["evaluation"]["batch_size"] == 3
    (finished.folder / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"evaluation\.metrics"):
        run({**recipe, "evaluation": {"metrics": ["accuracy"]}}, console=Console(quiet=True))


def test_a_folder_with_another_recipes_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "none")
    first = run(recipe, console=Console(quiet=True))
    before = (first.folder / "evaluation.json").read_text()
    with pytest.raises(UserError, match=r"holds a run of another recipe \(.*seed: 7 there, 8 now"):
        run({**recipe, "seed": 8}, console=Console(quiet=True))
    assert (first.folder / "evaluation.json").read_text() == before
