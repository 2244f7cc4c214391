"""Two processes started by torchrun and by accelerate: one student, one table, and the same result as one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from toy_recipe import toy_recipe, toy_tokenizer

from layerdistill.runner import run

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
    # Without MPI, `accelerate launch --cpu` starts one process whatever their number; --multi_gpu starts them all.
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m",
    ],
}  # fmt: skip
"""`torchrun` and `accelerate launch`, as modules so that they are those of this environment."""
TEACHERS = {"torchrun": [], "accelerate": ["--set", "teacher.cache=fill", "--set", "teacher.cache_dtype=float32"]}
"""The teacher at every step, and one that the two processes asked beforehand, each about its share of the examples."""


def launch(launcher: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours in two processes."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LAYERDISTILL_HOME": str(home),
        "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], "layerdistill", *arguments],
        capture_output=True, text=True, check=False, timeout=240, env=environment,
    )  # fmt: skip


def test_both_launchers_give_the_student_of_a_single_process(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "cka", evaluation={"cost": False})
    # Plain steps, in which rounding is not amplified, and a teacher that the two processes have to make together.
    recipe["training"] |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    recipe["teacher"]["finetune"] = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    file, home = tmp_path / "recipe.yaml", tmp_path / "home"
    file.write_text(yaml.safe_dump(recipe))
    # 2 x 4 examples, where the single process has 8.
    halved = ["train", str(file), "--set", "training.per_device_train_batch_size=4", "--set"]
    for launcher in LAUNCHERS:
        done = launch(launcher, home, *halved, f"output={tmp_path / launcher}", *TEACHERS[launcher])
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("The student is in") == 1, "the main process alone prints"
        teachers = [path for path in (home / "teachers").iterdir() if path.is_dir() and path.suffix != ".work"]
        assert len(teachers) == 1, "one teacher, also after the second run, and nothing half written beside it"

    (manifest,) = (home / "cache").glob("*/manifest.json")
    shares = [shard["examples"] for shard in json.loads(manifest.read_text())["content"]["shards"]]
    examples = len((tmp_path / "data" / "train.jsonl").read_text().splitlines())
    assert len(shares) == 2 and sum(shares) == examples and min(shares) > examples / 4, "each process filled its share"

    single = run({**recipe, "teacher": {"model": str(teachers[0])}}, console=Console(quiet=True))
    expected = load_file(single.student / "model.safetensors")
    teacher = load_file(teachers[0] / "model.safetensors")
    start = {name: teacher[name][tuple(map(slice, tensor.shape))] for name, tensor in expected.items()}
    moved = [(tensor - start[name]).abs().max().item() for name, tensor in expected.items() if name.endswith("bias")]
    assert max(moved) > 0.01, "the students have learned something, or being equal means nothing"
    for launcher in LAUNCHERS:
        folder = tmp_path / launcher
        found = load_file(folder / "student" / "model.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0, msg=f"{launcher}: {name}")
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert evaluation["teacher"] == single.teacher_metrics
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["processes"] == 2
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == [2, 4, 6, 8], "every line is written once"


@pytest.mark.slow
def test_a_trimmed_student_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    student = {"num_blocks": 2, "init": "copy", "vocabulary": "trimmed"}
    recipe = toy_recipe(tmp_path, "ild", student=student, evaluation={"cost": False})
    recipe["training"] |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    recipe["teacher"] |= {"cache": "fill", "cache_dtype": "float32"}
    data = tmp_path / "data" / "train.jsonl"
    data.write_text(re.sub(r"\bw(7|11|30)\b", "w1", data.read_text()))
    file, home = tmp_path / "recipe.yaml", tmp_path / "home"
    file.write_text(yaml.safe_dump(recipe))
    halved = ["train", str(file), "--set", "training.per_device_train_batch_size=4"]
    done = launch("torchrun", home, *halved, "--set", f"output={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-3000:]
    single = run({**recipe, "output": str(tmp_path / "one")}, console=Console(quiet=True))
    folders = (single.folder, tmp_path / "two")
    expected, found = (load_file(folder / "student" / "model.safetensors") for folder in folders)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0, msg=name)
    vocabularies = [
        json.loads((folder / "student" / "tokenizer.json").read_text())["model"]["vocab"] for folder in folders
    ]
    assert vocabularies[0] == vocabularies[1]
    assert len(vocabularies[0]) < len(toy_tokenizer())
