"""A recipe becomes a finished run folder, and what the folder says can be found again from the folder alone."""

from __future__ import annotations

import json
import math
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from rich.console import Console
from safetensors.torch import load_file
from task_recipes import TASKS, task_recipe
from toy_recipe import toy_recipe, toy_tokenizer, write_teacher

from layerdistill import runner
from layerdistill.core.errors import UserError
from layerdistill.measurement import evaluate_folder
from layerdistill.prepare import prepare
from layerdistill.recipe import load_recipe
from layerdistill.report.run_table import print_result
from layerdistill.run_folder import RunResult, lock
from layerdistill.runner import run

QUIET = Console(quiet=True)
METHODS = dict(zip(TASKS, ("cka", "ild", "kd", "ild", "cka"), strict=True))
METRICS = {
    "sequence-classification": {"accuracy", "macro_f1"},
    "pairs": {"accuracy", "macro_f1"},
    "multi-label-classification": {"f1", "macro_f1", "accuracy"},
    "regression": {"pearson", "spearman"},
    "causal-lm": {"perplexity"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], RunResult]]:
    """One finished run of every task, with its recipe."""
    found = {}
    for task in TASKS:
        recipe = task_recipe(tmp_path_factory.mktemp(task), task, METHODS[task])
        recipe["training"]["learning_rate"] = 5e-3
        found[task] = recipe, run(recipe, console=QUIET)
    return found


def small(folder: Path, method: str = "none", **changes: Any) -> dict[str, Any]:
    """A recipe whose run takes half a second."""
    recipe = toy_recipe(folder, method, **changes)
    recipe["training"] = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    recipe["evaluation"] = {"cost": False}
    return recipe


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raw_rows(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(recipe["data"]["validation"]).read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_the_folder_holds_what_the_design_says(task: str, runs: dict[str, Any]) -> None:
    recipe, result = runs[task]
    assert result.folder == Path(recipe["output"])
    assert {path.name for path in result.folder.iterdir()} == {
        ".lock", "recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "student", "predictions.parquet",
        "predictions-teacher.parquet", "evaluation.json",
    }  # fmt: skip
    assert {path.suffix for path in result.student.iterdir()} <= {".json", ".safetensors"}, "no pickle"
    evaluation = json.loads((result.folder / "evaluation.json").read_text())
    assert set(evaluation) == {"split", "student", "teacher", "chance", "cost", "thrown_away_parameters"}
    assert evaluation["split"] == "validation"
    assert set(evaluation["student"]) == set(evaluation["teacher"]) == METRICS[task]
    assert set(evaluation["cost"]) == {"student", "teacher"}
    assert (result.metrics, result.teacher_metrics) == (evaluation["student"], evaluation["teacher"])
    assert result.cost == evaluation["cost"]
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["examples"]["train"] > 0
    assert environment["packages"]["torch"] == version("torch")
    steps = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [2, 4, 6, 8]
    assert {"distill/task", "distill/logits"} <= set(steps[0])


@pytest.mark.parametrize("task", TASKS)
def test_the_cost_is_that_of_the_files(task: str, runs: dict[str, Any]) -> None:
    recipe, result = runs[task]
    for name, folder in (("student", result.student), ("teacher", Path(recipe["teacher"]["model"]))):
        tensors = load_file(folder / "model.safetensors")
        assert result.cost[name]["parameters"]["total"] == sum(tensor.numel() for tensor in tensors.values())
    assert result.cost["student"]["size_mb"] == (result.student / "model.safetensors").stat().st_size / 1e6
    assert result.cost["student"]["parameters"]["total"] < result.cost["teacher"]["parameters"]["total"]


@pytest.mark.parametrize("task", [task for task in TASKS if task != "causal-lm"])
def test_plain_transformers_gives_the_logits_that_were_recorded(task: str, runs: dict[str, Any]) -> None:
    recipe, result = runs[task]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(result.student).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.student)
    table = pq.read_table(result.folder / "predictions.parquet").to_pylist()
    rows = raw_rows(recipe)
    assert [row["example_id"] for row in table] == list(range(len(rows)))
    for row, recorded in zip(rows, table, strict=True):
        texts = [row["text"], row["second"]] if task == "pairs" else [row["text"]]
        with torch.no_grad():
            logits = model(**tokenizer(*texts, return_tensors="pt")).logits[0]
        torch.testing.assert_close(logits, torch.tensor(recorded["logits"]), atol=1e-6, rtol=1e-5)


def test_accuracy_follows_from_the_recorded_predictions(runs: dict[str, Any]) -> None:
    for task in ("sequence-classification", "pairs"):
        recipe, result = runs[task]
        for file, metrics in (("predictions", result.metrics), ("predictions-teacher", result.teacher_metrics)):
            table = pq.read_table(result.folder / f"{file}.parquet").to_pylist()
            assert [row["label"] for row in table] == [row["label"] for row in raw_rows(recipe)]
            right = [int(np.argmax(row["logits"])) == row["label"] for row in table]
            assert metrics["accuracy"] == sum(right) / len(right)
            assert [row["prediction"] == row["label"] for row in table] == right


def test_f1_of_several_labels_follows_from_the_recorded_predictions(runs: dict[str, Any]) -> None:
    recipe, result = runs["multi-label-classification"]
    names = transformers.AutoConfig.from_pretrained(result.student).id2label
    right = []
    for file, metrics in (("predictions", result.metrics), ("predictions-teacher", result.teacher_metrics)):
        both = wrong = 0
        for row, raw in zip(
            pq.read_table(result.folder / f"{file}.parquet").to_pylist(), raw_rows(recipe), strict=True
        ):
            for number, logit in enumerate(row["logits"]):
                given, true = logit > 0, names[number] in raw["label"]
                both, wrong = both + (given and true), wrong + (given != true)
        assert metrics["f1"] == pytest.approx(2 * both / (2 * both + wrong))
        right.append(both)
    assert max(right) > 0, "or 0 equals 0"


def test_correlation_follows_from_the_recorded_predictions(runs: dict[str, Any]) -> None:
    recipe, result = runs["regression"]
    table = pq.read_table(result.folder / "predictions.parquet").to_pylist()
    given = np.array([row["prediction"] for row in table])
    true = np.array([row["label"] for row in raw_rows(recipe)])
    by_hand = ((given - given.mean()) * (true - true.mean())).mean() / given.std() / true.std()
    assert result.metrics["pearson"] == pytest.approx(by_hand, abs=1e-6)


def test_perplexity_is_that_of_the_saved_student_in_float64(runs: dict[str, Any]) -> None:
    recipe, result = runs["causal-lm"]
    model = transformers.AutoModelForCausalLM.from_pretrained(result.student).eval().double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.student)
    stream: list[int] = []
    for row in raw_rows(recipe):
        stream += [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    nats, tokens = 0.0, 0
    for start in range(0, len(stream), 16):
        window = torch.tensor(stream[start : start + 16])
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0]
        for position in range(len(window) - 1):
            scores = logits[position].tolist()
            largest = max(scores)
            normaliser = largest + math.log(sum(math.exp(score - largest) for score in scores))
            nats += normaliser - scores[int(window[position + 1])]
            tokens += 1
    table = pq.read_table(result.folder / "predictions.parquet")
    assert sum(table["tokens"].to_pylist()) == tokens
    assert sum(table["nll"].to_pylist()) == pytest.approx(nats, rel=1e-6)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_evaluating_the_folder_gives_the_runs_own_numbers(task: str, runs: dict[str, Any]) -> None:
    recipe, result = runs[task]
    before = contents(result.folder)
    chance = json.loads((result.folder / "evaluation.json").read_text())["chance"]
    for model in (result.folder, result.student):
        found = evaluate_folder(str(model), load_recipe(recipe, ["evaluation.cost=false"]))
        assert found == {"split": "validation", "model": pytest.approx(result.metrics, rel=1e-6), "chance": chance}
    assert contents(result.folder) == before, "evaluating writes nothing"


@pytest.mark.parametrize("task", TASKS)
def test_the_run_takes_as_many_steps_as_were_announced(task: str, runs: dict[str, Any]) -> None:
    recipe, result = runs[task]
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == prepare(load_recipe(recipe)).total_steps == 8
    assert [path.name for path in (result.folder / "checkpoints" / "distill").iterdir()] == ["finished"]


def test_steps_of_epochs_are_announced_rightly(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    recipe["training"] = {"num_train_epochs": 1.5, "per_device_train_batch_size": 10, "gradient_accumulation_steps": 3}
    run(recipe, console=QUIET)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (
        lines[-1]["step"] == prepare(load_recipe(recipe)).total_steps == 6
    )  # 96 examples: 10 batches, 4 steps an epoch


# The folder's own recipe


def test_the_folders_recipe_runs_again_elsewhere_and_gives_the_same(runs: dict[str, Any], tmp_path: Path) -> None:
    _, result = runs["sequence-classification"]
    again = run(result.folder / "recipe.yaml", [f"output={tmp_path / 'again'}"], console=QUIET)
    assert again.metrics == result.metrics
    assert contents(again.student) == contents(result.student)
    written = yaml.safe_load((result.folder / "recipe.yaml").read_text())
    assert set(written) == {"teacher", "student", "data", "method", "training", "evaluation", "output", "seed"}
    assert written["method"]["temperature"] == 2.0, "defaults are written out"


def test_the_folders_recipe_goes_on_with_the_run_itself(runs: dict[str, Any]) -> None:
    _, result = runs["regression"]
    before = contents(result.folder)
    assert run(result.folder / "recipe.yaml", console=QUIET).metrics == result.metrics
    assert contents(result.folder) == before


def test_a_student_of_its_own_and_its_recipe(tmp_path: Path) -> None:
    write_teacher(tmp_path / "other", num_layers=3, hidden_size=16, num_heads=2, seed=9)
    recipe = small(tmp_path, "ild", student={"model": str(tmp_path / "other")})
    recipe["training"]["learning_rate"] = 1e-9
    result = run(recipe, console=QUIET)
    start, end = (load_file(folder / "model.safetensors") for folder in (tmp_path / "other", result.student))
    for name, tensor in start.items():
        torch.testing.assert_close(end[name], tensor, atol=1e-6, rtol=0, msg=name)
    again = run(result.folder / "recipe.yaml", [f"output={tmp_path / 'again'}"], console=QUIET)
    assert contents(again.student) == contents(result.student)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", "float16")])
def test_a_student_cut_out_of_a_teacher_has_the_dtype_that_was_asked_for(
    dtype: str, expected: str, tmp_path: Path
) -> None:
    recipe = small(tmp_path)
    recipe["teacher"]["dtype"] = "float16"
    recipe["student"]["dtype"] = dtype
    result = run(recipe, console=QUIET)
    kinds = {tensor.dtype for tensor in load_file(result.student / "model.safetensors").values()}
    assert kinds == {getattr(torch, expected)}
    assert json.loads((result.student / "config.json").read_text())["dtype"] == expected


# Splits


def test_the_test_split_is_what_is_reported(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    rows = Path(recipe["data"]["validation"]).read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(rows[:7]) + "\n")
    recipe["data"]["test"] = str(tmp_path / "test.jsonl")
    result = run(recipe, console=QUIET)
    assert json.loads((result.folder / "evaluation.json").read_text())["split"] == "test"
    assert pq.read_table(result.folder / "predictions.parquet").num_rows == 7


def test_without_held_out_data_there_is_a_student_and_its_cost(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    del recipe["data"]["validation"]
    recipe["evaluation"] = {"latency": False}
    result = run(recipe, console=QUIET)
    assert (result.metrics, result.teacher_metrics) == ({}, {})
    assert set(result.cost) == {"student", "teacher"}
    assert not list(result.folder.glob("*.parquet"))


def test_a_teacher_with_other_tokens_is_not_measured_on_the_students(tmp_path: Path) -> None:
    write_teacher(tmp_path / "other", num_layers=2, vocab_size=120)
    toy_tokenizer([f"w{number}" for number in range(110, -1, -1)]).save_pretrained(tmp_path / "other")
    recipe = small(tmp_path, "none", student={"model": str(tmp_path / "other")})
    recipe["evaluation"] = {"latency": False}
    result = run(recipe, console=QUIET)
    assert set(result.metrics) == {"accuracy", "macro_f1"}
    assert result.teacher_metrics == {}, "it would be read ids that mean other words to it"
    assert set(result.cost) == {"student", "teacher"}


def test_a_model_without_a_head_for_the_task_is_not_evaluated(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    write_teacher(tmp_path / "headless", head="base", num_labels=3)
    with pytest.raises(UserError, match="has no trained head for this recipe's task"):
        evaluate_folder(str(tmp_path / "headless"), load_recipe(recipe))


# One command at a time, and nothing is lost


def test_a_second_command_on_the_folder_is_refused(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    with lock(tmp_path / "run"):
        with pytest.raises(UserError, match=rf"Another command is working in {tmp_path / 'run'}"):
            run(recipe, console=QUIET)
        with pytest.raises(UserError, match="Another command"):
            run(recipe, again=True, console=QUIET)
    assert run(recipe, console=QUIET).metrics, "afterwards the folder is free"


def test_the_folder_is_free_again_after_a_failure(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        run(recipe, ["data.train=./nowhere.jsonl"], console=QUIET)
    assert run(recipe, console=QUIET).metrics


def test_again_starts_anew_and_leaves_foreign_files_alone(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    first = run(recipe, console=QUIET)
    (first.folder / "notes.txt").write_text("precious")
    other = run(recipe, ["seed=8", "method.name=kd"], again=True, console=QUIET)
    assert (first.folder / "notes.txt").read_text() == "precious"
    assert yaml.safe_load((other.folder / "recipe.yaml").read_text())["seed"] == 8
    lines = (other.folder / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"loss"' in line or "train_loss" in line]) <= 2, "the first run's are gone"


def test_again_with_a_wrong_recipe_deletes_nothing(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    first = run(recipe, console=QUIET)
    before = contents(first.folder)
    for mistake in ("data.train=./nowhere.jsonl", "student.num_blocks=9", "evaluation.metrics=[perplexity]"):
        with pytest.raises(UserError):
            run(recipe, [mistake], again=True, console=QUIET)
        assert contents(first.folder) == before
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(UserError, match="damaged"):
        run(recipe, again=True, console=QUIET)
    assert contents(first.folder) == before


def test_a_run_that_stopped_before_its_evaluation_only_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(tmp_path, "ild")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "measure", lambda *_: (_ for _ in ()).throw(MemoryError("killed")))
        with pytest.raises(MemoryError):
            run(recipe, console=QUIET)
    folder = tmp_path / "run"
    assert not (folder / "evaluation.json").exists(), "its presence means that the run is finished"
    student, steps = contents(folder / "student"), (folder / "metrics.jsonl").read_bytes()
    result = run(recipe, console=QUIET)
    assert contents(result.student) == student
    assert (folder / "metrics.jsonl").read_bytes() == steps, "nothing was trained again"
    whole = run(recipe, [f"output={tmp_path / 'whole'}"], console=QUIET)
    assert result.metrics == whole.metrics
    shutil.rmtree(whole.folder)


def test_a_run_of_an_older_version_is_known_though_keys_came_since(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "kd")
    first = run(recipe)
    stored = yaml.safe_load((first.folder / "recipe.yaml").read_text())
    del stored["teacher"]["cache"], stored["teacher"]["cache_dtype"], stored["student"]["vocabulary"]
    (first.folder / "recipe.yaml").write_text(yaml.safe_dump(stored))
    before = (first.folder / "evaluation.json").stat().st_mtime_ns
    assert run(recipe).metrics == first.metrics
    assert (first.folder / "evaluation.json").stat().st_mtime_ns == before, "finished, not run again"
    with pytest.raises(UserError, match=r"teacher.cache: 'auto' there, 'off' now"):
        run({**recipe, "teacher": {**recipe["teacher"], "cache": "off"}})


def test_evaluating_on_nothing_is_refused_and_training_without_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy_recipe(tmp_path, "kd", evaluation={"cost": False})
    del recipe["data"]["validation"]
    result = run(recipe, console=QUIET)
    print_result(result, Console())
    assert "There are no metrics: data.validation and data.test are missing." in capsys.readouterr().out
    with pytest.raises(UserError, match=r"nothing to evaluate on: data\.validation and data\.test are missing"):
        evaluate_folder(str(result.folder), load_recipe(recipe))
