"""The stage runner: states that were saved are read back, whatever names an architecture saves them under."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tiny_models import FITTING, tiny_model
from torch import nn
from toy_recipe import toy_recipe

from layerdistill import run_folder
from layerdistill.core.errors import UserError
from layerdistill.runner import run
from layerdistill.train.composite import Composite
from layerdistill.train.stage import newest_checkpoint
from layerdistill.train.trainer import load_stage, save_student

QUIET = Console(quiet=True)
HEADS = ("sequence-classification", "causal-lm")
PAIRS = [(family, head) for head in HEADS for family in FITTING[head]]


@pytest.mark.parametrize(("family", "head"), PAIRS, ids=[f"{family}-{head}" for family, head in PAIRS])
def test_a_saved_student_is_read_back_into_its_modules(tmp_path: Path, family: str, head: str) -> None:
    saved = tiny_model(family, head, num_layers=2, seed=1)
    save_student(saved, tmp_path)
    other = tiny_model(family, head, num_layers=2, seed=2)
    load_stage(Composite(other, nn.ModuleList()), tmp_path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    model = tiny_model("bert", "sequence-classification")
    save_student(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_stage(Composite(model, nn.ModuleList()), tmp_path)


def test_half_deleted_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for step in (2, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert newest_checkpoint(tmp_path) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_the_best_checkpoint_by_a_metric_is_what_is_kept(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "kd")
    recipe["training"] |= {
        "max_steps": 12, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy", "learning_rate": 5e-3,
    }  # fmt: skip
    recipe["evaluation"] = {"metrics": ["accuracy"], "cost": False}
    result = run(recipe, console=QUIET)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
    assert len(evaluated) == 4
    assert result.metrics["accuracy"] == pytest.approx(max(evaluated))


@pytest.mark.parametrize("newest", [12, 9], ids=["after its last step", "before it"])
def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(newest: int, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "kd")
    recipe["training"] |= {
        "max_steps": 12, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 5e-3, "save_total_limit": 4,
    }  # fmt: skip
    recipe["evaluation"] = {"cost": False}
    whole = run(recipe, console=QUIET)
    weights = (whole.student / "model.safetensors").read_bytes()
    moved = whole.folder.rename(tmp_path / "moved")
    checkpoints = moved / "checkpoints" / "distill"
    state = json.loads((checkpoints / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_global_step"] < 12
    for path in (moved / "student", checkpoints / "finished", *checkpoints.glob("checkpoint-*")):
        if path.name in ("student", "finished") or int(path.name.split("-")[1]) > newest:
            shutil.rmtree(path)
    (moved / "evaluation.json").unlink()
    again = run(recipe | {"output": str(moved)}, console=QUIET)
    assert (again.student / "model.safetensors").read_bytes() == weights


def test_data_in_memory(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "kd")
    rows = {
        split: [json.loads(line) for line in Path(recipe["data"][split]).read_text().splitlines()]
        for split in ("train", "validation")
    }
    from_files = run({**recipe, "output": str(tmp_path / "files")}, console=QUIET)
    recipe["data"] = {key: value for key, value in recipe["data"].items() if key != "validation"} | {
        "train": "in-memory"
    }
    memory = {"train": Dataset.from_list(rows["train"]), "validation": rows["validation"]}
    in_memory = run(recipe, memory=memory, console=QUIET)
    assert in_memory.metrics == from_files.metrics


def test_a_kill_while_an_old_run_is_deleted_leaves_nothing_to_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(tmp_path, "none")
    run(recipe, console=QUIET)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "sweep_partials", killed)
    with pytest.raises(KeyboardInterrupt):
        run({**recipe, "seed": 8}, again=True, console=QUIET)
    monkeypatch.undo()
    left = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert not left & {"student", "checkpoints", "evaluation.json"}
    fresh = run({**recipe, "seed": 8, "output": str(tmp_path / "fresh")}, console=QUIET)
    again = run({**recipe, "seed": 8}, console=QUIET)
    assert (again.student / "model.safetensors").read_bytes() == (fresh.student / "model.safetensors").read_bytes()


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "none")
    recipe["training"] = {"num_train_epochs": 1, "per_device_train_batch_size": 500, "dataloader_drop_last": True}
    with pytest.raises(UserError, match="Not one step would be trained"):
        run(recipe, console=QUIET)
