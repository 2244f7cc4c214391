"""Wrong recipes and inputs: status 2, one clear message with what was given and what to do, nothing on disk is lost."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toy_recipe import WORDS, toy_recipe, toy_tokenizer, write_teacher

from layerdistill import cli
from layerdistill.recipe import dump_recipe, load_recipe

Spoil = Callable[[dict[str, Any], Path], "dict[str, Any] | None"]


def put(path: str, value: Any) -> Spoil:
    """Set one key of the recipe."""

    def spoil(recipe: dict[str, Any], folder: Path) -> None:
        target = recipe
        *sections, last = path.split(".")
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value

    return spoil


def drop(section: str) -> Spoil:
    """Leave out a section."""
    return lambda recipe, folder: {key: value for key, value in recipe.items() if key != section}


def rows(split: str, lines: list[dict[str, Any]]) -> Spoil:
    """Replace a split's rows."""

    def spoil(recipe: dict[str, Any], folder: Path) -> None:
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return spoil


def file(name: str, content: bytes) -> Spoil:
    """Train on a file with this content."""

    def spoil(recipe: dict[str, Any], folder: Path) -> None:
        (folder / name).write_bytes(content)
        recipe["data"]["train"] = str(folder / name)

    return spoil


def spoil_teacher(change: Callable[[Path], Any]) -> Spoil:
    """Change the teacher's folder."""
    return lambda recipe, folder: change(folder / "teacher") and None


def truncate(teacher: Path) -> None:
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def pickle_only(teacher: Path) -> None:
    torch.save(load_file(teacher / "model.safetensors"), teacher / "pytorch_model.bin")
    (teacher / "model.safetensors").unlink()


def nan_teacher(teacher: Path) -> None:
    weights = load_file(teacher / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})


def other_student(recipe: dict[str, Any], folder: Path) -> None:
    write_teacher(folder / "other", num_layers=2)
    toy_tokenizer(WORDS[::-1]).save_pretrained(folder / "other")
    recipe["student"] = {"model": str(folder / "other")}


def other_recipe_there(recipe: dict[str, Any], folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(dump_recipe(load_recipe({**recipe, "seed": 99})))


def output_is_a_file(recipe: dict[str, Any], folder: Path) -> None:
    (folder / "file").write_text("precious")
    recipe["output"] = str(folder / "file")


def wordy(text: str | None, label: Any) -> list[dict[str, Any]]:
    return [{"text": "w1 w2 w3", "label": 0}, {"text": "w2 w4", "label": 1}, {"text": text, "label": label}]


CASES: dict[str, tuple[Spoil, list[str]]] = {
    # The recipe itself.
    "unknown-section": (put("trainig", {}), ["trainig", "training"]),
    "unknown-key": (put("data.max_len", 8), ["data.max_len", "max_length"]),
    "unknown-training-key": (put("training.lerning_rate", 1), ["lerning_rate", "learning_rate"]),
    "training-not-a-mapping": (put("training", [1, 2]), ["training"]),
    "training-wrong-type": (put("training.learning_rate", "fast"), ["training.learning_rate", "fast"]),
    "training-negative-rate": (put("training.learning_rate", -1.0), ["learning_rate", "-1.0", "greater than 0"]),
    "training-zero-batch": (put("training.per_device_train_batch_size", 0), ["per_device_train_batch_size", "0"]),
    "training-reserved": (put("training.output_dir", "x"), ["training.output_dir", "output"]),
    "training-unknown-schedule": (put("training.lr_scheduler_type", "cosin"), ["cosin", "cosine"]),
    "training-fp16-on-a-processor": (put("training.fp16", True), ["fp16", "bf16"]),
    "no-data": (drop("data"), ["data", "missing"]),
    "no-student": (drop("student"), ["student", "missing"]),
    "no-method": (drop("method"), ["method", "missing"]),
    "unknown-method": (put("method", {"name": "ckd"}), ["ckd", "cka"]),
    "method-without-name": (put("method", {"temperature": 2.0}), ["method.name", "kd"]),
    "option-of-another-method": (put("method", {"name": "none", "temperature": 2.0}), ["method.temperature"]),
    "negative-temperature": (put("method", {"name": "kd", "temperature": -1}), ["method.temperature", "-1"]),
    "negative-weight": (put("method", {"name": "kd", "weights": {"logits": -1}}), ["method.weights.logits", "-1"]),
    "kd-without-logits": (put("method", {"name": "kd", "weights": {"logits": 0}}), ["method.weights.logits", "none"]),
    "sqrt-of-debiased": (put("method", {"name": "cka", "form": "sqrt", "debiased": True}), ["debiased", "sqrt"]),
    "no-teacher": (drop("teacher"), ["teacher is missing"]),
    "seed-out-of-range": (put("seed", -3), ["seed", "-3"]),
    # Layers and shapes.
    "layer-out-of-range": (put("method", {"name": "ild", "layer_map": [[1, 9]]}), ["9", "4"]),
    "student-layer-out-of-range": (put("method", {"name": "cka", "layer_map": [[3, 4]]}), ["3", "2"]),
    "layer-that-is-no-layer": (put("method", {"name": "cka", "layer_map": [["top", 4]]}), ["top"]),
    "unknown-layer-map": (put("method", {"name": "cka", "layer_map": "foward"}), ["foward", "forward"]),
    "stack-that-is-not-there": (put("method", {"name": "cka", "layer_map": [["decoder.1", "decoder.2"]]}), ["decoder"]),
    "identity-between-widths": (put("method", {"name": "ild", "projection": "identity"}), ["16", "32", "linear"]),
    "student-deeper": (put("student.num_blocks", 5), ["5", "4"]),
    "student-wider": (put("student.hidden_size", 64), ["64", "32"]),
    "width-that-cuts-heads": (put("student.hidden_size", 20), ["20", "16", "24"]),
    "copy-into-another-width": (put("student.init", "copy"), ["copy", "truncate"]),
    "student-model-and-shape": (put("student.model", "somewhere"), ["student", "model", "num_blocks"]),
    # Data.
    "missing-file": (put("data.train", "nowhere/train.csv"), ["nowhere/train.csv"]),
    "missing-column": (put("data.text", "texd"), ["texd", "text"]),
    "unknown-task": (put("data.task", "classification"), ["classification", "sequence-classification"]),
    "empty-split": (rows("train", []), ["train"]),
    "empty-text": (rows("train", wordy("  ", 1)), ["text", "2"]),
    "null-text": (rows("train", wordy(None, 1)), ["text", "2"]),
    "null-label": (rows("train", wordy("w1", None)), ["label", "2"]),
    "label-unknown-in-validation": (rows("validation", wordy("w1", 7)), ["7"]),
    "one-class-only": (rows("train", [{"text": "w1", "label": 0}]), ["label"]),
    "corrupt-parquet": (file("bad.parquet", b"PAR1 nonsense"), ["bad.parquet"]),
    "corrupt-json": (file("bad.jsonl", b'{"text": "w1", "label"'), ["bad.jsonl"]),
    "unknown-format": (file("data.docx", b"x"), ["data.docx"]),
    "max-length-beyond-positions": (put("data.max_length", 5000), ["5000"]),
    "metric-of-another-task": (put("evaluation.metrics", ["perplexity"]), ["perplexity", "accuracy"]),
    "unknown-metric": (put("evaluation.metrics", ["acuracy"]), ["acuracy", "accuracy"]),
    # Models.
    "missing-model": (put("teacher.model", "./nowhere/model"), ["nowhere/model"]),
    "missing-package": (put("teacher.model", "package:no_such_package/model"), ["no_such_package", "pip install"]),
    "pickle-checkpoint": (spoil_teacher(pickle_only), ["pytorch_model.bin", "safetensors"]),
    "truncated-weights": (spoil_teacher(truncate), ["model.safetensors"]),
    "broken-config": (spoil_teacher(lambda f: (f / "config.json").write_text("{") and None), ["config.json"]),
    "no-config": (spoil_teacher(lambda f: (f / "config.json").unlink()), ["config.json"]),
    "no-tokenizer": (spoil_teacher(lambda f: (f / "tokenizer.json").unlink()), ["tokenizer"]),
    "label-count-mismatch": (spoil_teacher(lambda f: write_teacher(f, num_labels=5) and None), ["5", "3", "finetune"]),
    "teacher-without-head": (
        spoil_teacher(lambda f: write_teacher(f, head="base", num_labels=3) and None),
        ["head", "finetune"],
    ),
    "different-tokenizers": (other_student, ["w0", "vocabulary"]),
    "nan-in-the-teacher": (spoil_teacher(nan_teacher), ["nan"]),
    # The output.
    "output-of-another-recipe": (other_recipe_there, ["another recipe", "seed", "--again"]),
    "output-is-a-file": (output_is_a_file, ["file"]),
}


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Run the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["layerdistill", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    toy_recipe(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_wrong_recipe(
    name: str, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    spoil, expected = CASES[name]
    recipe = toy_recipe(tmp_path, "ild")
    recipe["training"]["logging_steps"] = 1
    recipe = spoil(recipe, tmp_path) or recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    before = contents(tmp_path)
    status, _, errors = call(["train", str(path)], monkeypatch, capsys)
    assert status == 2, errors
    assert "Traceback" not in errors
    files = 2 if name == "missing-column" else 1
    assert errors.count("error: ") == files, f"one mistake, one message (per file): {errors}"
    for fragment in expected:
        assert fragment in errors, errors
    after = contents(tmp_path)
    assert {key: after.get(key) for key in before} == before, "nothing already on disk is lost or changed"


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "no-recipe-file": (["train", "nowhere.yaml"], ["nowhere.yaml"]),
    "recipe-is-no-yaml": (["train", "{bad}"], ["YAML"]),
    "recipe-is-no-mapping": (["train", "{listed}"], ["mapping"]),
    "set-without-value": (["train", "{good}", "--set", "training.max_steps"], ["training.max_steps", "key=value"]),
    "set-below-a-value": (["train", "{good}", "--set", "seed.x=1"], ["seed"]),
    "unknown-command": (["trian"], ["trian"]),
    "missing-argument": (["train"], ["recipe"]),
    "unknown-option": (["train", "{good}", "--agian"], ["--agian"]),
    "evaluate-nothing": (["evaluate", "./no/model", "{good}"], ["no/model"]),
    "plan-of-a-wrong-recipe": (["plan", "{good}", "--set", "student.num_blocks=9"], ["9", "4"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    places = {"good": tmp_path / "good.yaml", "bad": tmp_path / "bad.yaml", "listed": tmp_path / "listed.yaml"}
    places["good"].write_text(yaml.safe_dump(toy_recipe(tmp_path, "kd")))
    places["bad"].write_text("a: [1, 2")
    places["listed"].write_text("- 1\n- 2\n")
    arguments, expected = COMMANDS[name]
    filled = [argument.format(**places) for argument in arguments]
    status, _, errors = call(filled, monkeypatch, capsys)
    assert status == 2
    assert "Traceback" not in errors
    for fragment in expected:
        assert fragment in errors, errors


def test_every_problem_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = toy_recipe(tmp_path, "kd")
    recipe["data"]["max_len"] = 3
    recipe["training"]["lerning_rate"] = 3
    recipe["method"]["temperatur"] = 3
    recipe["studnet"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, _, errors = call(["train", str(tmp_path / "recipe.yaml")], monkeypatch, capsys)
    assert status == 2
    for word in ("data.max_len", "training.lerning_rate", "method.temperatur", "studnet"):
        assert word in errors
    assert errors.count("error: ") == 4


def test_there_are_enough_cases() -> None:
    assert len(CASES) + len(COMMANDS) >= 40
