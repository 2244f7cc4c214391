"""A teacher fitted to the task is made once, kept by what made it, and reused by every later run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from task_recipes import task_recipe
from toy_recipe import toy_recipe, write_data, write_teacher

from layerdistill import finetune
from layerdistill.core.errors import UserError
from layerdistill.core.types import Stage
from layerdistill.measurement import evaluate_folder
from layerdistill.prepare import prepare
from layerdistill.recipe import load_recipe
from layerdistill.runner import run
from layerdistill.train.stage import StageInput
from layerdistill.train.trainer import StageTrainer

QUIET = Console(quiet=True)
FINETUNE = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


class Trainings:
    """Notes every fine-tuning of a teacher, then lets it happen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dtypes: list[torch.dtype] = []
        self.seeds: list[int] = []
        self.really = finetune.run_stage
        monkeypatch.setattr(finetune, "run_stage", self.note)

    def note(self, stage: Stage, given: StageInput, teacher: Any) -> None:
        assert stage.name == "teacher"
        assert teacher is None
        self.dtypes.append(next(stage.student.parameters()).dtype)
        self.seeds.append(given.seed)
        self.really(stage, given, teacher)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "teachers"


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    return Trainings(monkeypatch)


def tuned_recipe(folder: Path, method: str = "kd", output: str = "run", **changes: Any) -> dict[str, Any]:
    recipe = toy_recipe(folder, method, output=str(folder / output), evaluation={"cost": False}, **changes)
    recipe["teacher"]["finetune"] = dict(FINETUNE)
    recipe["training"] = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    return recipe


def kept(home: Path) -> list[Path]:
    return sorted(path for path in home.iterdir() if path.is_dir() and path.suffix != ".work")


def test_a_teacher_is_kept_and_reused_by_other_methods_and_seeds(
    tmp_path: Path, home: Path, trainings: Trainings
) -> None:
    first = run(tuned_recipe(tmp_path), console=QUIET)
    folder = kept(home)[0]
    before = (folder / "model.safetensors").read_bytes()
    for number, (method, seed) in enumerate([("cka", 7), ("ild", 8), ("none", 9)]):
        result = run(tuned_recipe(tmp_path, method, str(number), seed=seed), console=QUIET)
        assert result.teacher_metrics == first.teacher_metrics
    assert len(trainings.dtypes) == 1
    assert kept(home) == [folder]
    assert (folder / "model.safetensors").read_bytes() == before, "a teacher in use is not changed"
    found = evaluate_folder(str(folder), load_recipe(tuned_recipe(tmp_path)))
    assert found["model"] == first.teacher_metrics, "it is what was measured as the teacher"
    made_from = json.loads((folder / "made_from.json").read_text())
    assert made_from["finetune"] == FINETUNE
    assert made_from["model"] == str(tmp_path / "teacher")


def test_the_original_is_left_alone_and_the_kept_one_has_learned(tmp_path: Path, home: Path) -> None:
    recipe = tuned_recipe(tmp_path)
    before = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    run(recipe, console=QUIET)
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == before
    original = load_file(tmp_path / "teacher" / "model.safetensors")
    tuned = load_file(kept(home)[0] / "model.safetensors")
    assert original.keys() == tuned.keys()
    assert sum(not torch.equal(original[name], tuned[name]) for name in original) > 0.9 * len(original)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"distill"}, "the run's own log is of its own training"


def name_of(recipe: dict[str, Any], *overrides: str) -> str:
    """The name of the folder in which a recipe's teacher would be kept."""
    prepared = prepare(load_recipe(recipe, list(overrides)))
    assert prepared.recipe.teacher is not None
    return finetune.teacher_fingerprint(prepared, finetune.starting_model(prepared, prepared.recipe.teacher))


def test_whatever_makes_another_teacher_gets_another_folder(
    tmp_path: Path, home: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tuned_recipe(tmp_path)
    run(recipe, console=QUIET)
    names = [name_of(recipe)]
    assert kept(home) == [home / names[0]]
    assert name_of(recipe, "training.learning_rate=1", "student.num_blocks=1", "evaluation.cost=true") == names[0]
    names.append(name_of(recipe, "teacher.finetune.learning_rate=1e-3"))
    names.append(name_of(recipe, "teacher.finetune.seed=3"))
    names.append(name_of(recipe, "data.max_length=6"))
    names.append(name_of(recipe, "data.padding=max_length"))
    before = name_of(recipe, "teacher.finetune.train_sampling_strategy=group_by_length")
    assert before == names[0], "it is the default"
    with monkeypatch.context() as changed:
        changed.setattr(finetune, "own_defaults", lambda: {"train_sampling_strategy": "random"})
        names.append(name_of(recipe))
    write_data(tmp_path / "data", seed=5)
    names.append(name_of(recipe))
    write_teacher(tmp_path / "teacher", seed=6)
    names.append(name_of(recipe))
    assert len(set(names)) == 8
    run(recipe, ["teacher.finetune.seed=3", f"output={tmp_path / 'other'}"], console=QUIET)
    assert trainings.seeds == [finetune.DEFAULT_SEED, 3]
    assert len({(folder / "model.safetensors").read_bytes() for folder in kept(home)}) == 2


def test_what_the_teacher_is_run_in_does_not_make_another(tmp_path: Path, home: Path, trainings: Trainings) -> None:
    recipe = tuned_recipe(tmp_path)
    recipe["teacher"]["dtype"] = "bfloat16"
    recipe["evaluation"] = {"latency": False}
    result = run(recipe, console=QUIET)
    assert trainings.dtypes == [torch.float32], "bf16 weights would lose small updates"
    assert {tensor.dtype for tensor in load_file(kept(home)[0] / "model.safetensors").values()} == {torch.float32}
    assert result.cost["teacher"]["dtype"] == "bfloat16"
    assert result.cost["student"]["dtype"] == "float32"
    run(tuned_recipe(tmp_path, output="float32"), console=QUIET)
    assert len(trainings.dtypes) == 1


def test_the_recipes_seed_has_no_part_in_the_teacher(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tuned_recipe(tmp_path), console=QUIET)
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "another home"))
    run(tuned_recipe(tmp_path, "ild", "other", seed=99), console=QUIET)
    here, there = kept(home)[0], kept(tmp_path / "another home" / "teachers")[0]
    assert here.name == there.name
    assert (here / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()


def test_a_head_for_other_labels_is_replaced(tmp_path: Path, home: Path) -> None:
    recipe = tuned_recipe(tmp_path)
    write_teacher(tmp_path / "teacher", num_labels=5)
    result = run(recipe, console=QUIET)
    assert load_file(kept(home)[0] / "model.safetensors")["classifier.weight"].shape == (3, 32)
    assert set(result.teacher_metrics) == {"accuracy", "macro_f1"}


def test_a_headless_teacher_is_refused_unless_it_is_trained(tmp_path: Path, home: Path) -> None:
    recipe = tuned_recipe(tmp_path)
    write_teacher(tmp_path / "teacher", head="base", id2label={number: str(number) for number in range(3)})
    del recipe["teacher"]["finetune"]
    with pytest.raises(UserError, match=r"has no trained head for this task .*teacher\.finetune"):
        run(recipe, console=QUIET)
    none = {**recipe, "method": {"name": "none"}, "output": str(tmp_path / "none")}
    assert run(none, console=QUIET).metrics, "nothing is learned from it"
    recipe["teacher"]["finetune"] = dict(FINETUNE)
    assert run(recipe, console=QUIET).metrics, "the advice is followed in the same folder"


def test_a_language_model_without_its_head_is_refused_and_a_tied_one_is_not(tmp_path: Path) -> None:
    recipe = task_recipe(tmp_path, "causal-lm")
    write_teacher(tmp_path / "gpt2", "gpt2", "base")
    assert run(recipe, console=QUIET).metrics, "the head is the embedding"
    write_teacher(tmp_path / "llama", "llama", "base")
    recipe |= {"teacher": {"model": str(tmp_path / "llama")}, "output": str(tmp_path / "untied")}
    with pytest.raises(UserError, match=r"has no trained head for this task \(new weights: lm_head\.weight\)"):
        run(recipe, console=QUIET)
    with pytest.raises(UserError, match="has no trained head"):
        evaluate_folder(str(tmp_path / "llama"), load_recipe(recipe))


def test_fine_tuning_that_was_stopped_goes_on_and_ends_the_same(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_home = tmp_path / "whole"
    monkeypatch.setenv("LAYERDISTILL_HOME", str(whole_home))
    often = ["teacher.finetune.save_steps=2"]
    run(tuned_recipe(tmp_path, output="whole-run"), often, console=QUIET)
    monkeypatch.setenv("LAYERDISTILL_HOME", str(home.parent))
    steps = 0
    really = StageTrainer.compute_loss

    def stop_at_the_fourth(self: StageTrainer, *args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise MemoryError("the machine went down")
        return really(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "compute_loss", stop_at_the_fourth)
        with pytest.raises(MemoryError):
            run(tuned_recipe(tmp_path), often, console=QUIET)
    assert kept(home) == [], "half a teacher is not kept"
    counted = 0

    def count(self: StageTrainer, *args: Any, **options: Any) -> Any:
        nonlocal counted
        counted += 1
        return really(self, *args, **options)

    monkeypatch.setattr(StageTrainer, "compute_loss", count)
    run(tuned_recipe(tmp_path), often, console=QUIET)
    assert counted == 4 + 2, "steps 3 to 6 of the teacher, and the student's two"
    ours, theirs = kept(home)[0], kept(whole_home / "teachers")[0]
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
