"""The commands: what they print, what they leave on disk, and that they end with status 0."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from method_recipe import method_recipe
from rich.console import Console
from task_recipes import task_recipe
from toy_recipe import toy_recipe

from layerdistill import cli
from layerdistill.methods.table import METHODS
from layerdistill.recipe import recipe_schema


class Terminal:
    """Runs the command line in this process, on a wide terminal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        monkeypatch.setattr(cli, "console", Console(width=400))

    def __call__(self, *arguments: str, status: int = 0) -> str:
        self.monkeypatch.setattr(sys, "argv", ["layerdistill", *arguments])
        try:
            cli.main()
            found: Any = 0
        except SystemExit as stopped:
            found = stopped.code
        printed = self.capsys.readouterr()
        assert (found or 0) == status, printed.err
        return printed.out


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Terminal:
    return Terminal(monkeypatch, capsys)


def written(folder: Path, recipe: dict[str, Any]) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def table_rows(text: str) -> list[list[str]]:
    """The cells of every row of the tables in `text`."""
    found = [re.split(r"[│|┃]", line) for line in text.splitlines() if "│" in line or "┃" in line]
    return [[cell.strip() for cell in row[1:-1]] for row in found]


def test_methods_lists_every_method_with_its_options(terminal: Terminal) -> None:
    rows = {row[0]: row for row in table_rows(terminal("methods"))}
    assert set(METHODS) <= set(rows)
    for name, method in METHODS.items():
        assert rows[name][1] == method.summary
        assert rows[name][2] == ", ".join(field for field in method.Config.model_fields if field != "name")


def test_schema_prints_nothing_but_the_schema(terminal: Terminal) -> None:
    assert json.loads(terminal("schema")) == json.loads(json.dumps(recipe_schema()))


@pytest.mark.parametrize("command", [[], ["train"], ["plan"], ["evaluate"], ["demo"]])
def test_help_says_what_a_command_does(command: list[str], terminal: Terminal) -> None:
    text = terminal(*command, "--help")
    assert "Usage" in text
    if not command:
        assert all(name in text for name in ("train", "plan", "evaluate", "methods", "schema", "demo"))


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded or trained")

    monkeypatch.setattr(transformers.Trainer, "train", fail)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)


def test_plan_shows_the_layers_in_both_index_forms(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(tmp_path, "ild")
    recipe["method"] = {"name": "ild", "embeddings": True, "weights": {"hidden": 3.0}}
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    path = written(tmp_path, recipe)
    no_training(monkeypatch)
    text = terminal("plan", path, "--set", "training.max_steps=11")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == sorted([*before, path]), "no run folder is made"
    rows = table_rows(text)
    assert ["student layer", "teacher layer", "student block (from 0)", "teacher block (from 0)"] in rows
    for expected in (["0", "0", "embeddings", "embeddings"], ["1", "2", "0", "1"], ["2", "4", "1", "3"]):
        assert expected in rows
    assert "1 × task, 1 × logits, 1 × hidden per pair" in text, "3 over three pairs"
    assert f"Helpers (projections, filters): {3 * 16 * 32:,} parameters, trained and thrown away." in text
    assert "teacher and student have the same token ids; 60 ids are compared" in text
    assert "Labels: 3 (LABEL_0, LABEL_1, LABEL_2)" in text
    assert "Stage distill (11 steps): 1 × task, 1 × logits" in text
    assert "steps of 8 examples on one process, 12 per epoch" in text
    assert re.search(r"Memory: about \d+\.\d\d GB while training", text)
    assert "Nothing was trained." in text
    assert "temperature: 2.0" in text, "the recipe is printed with its defaults"
    assert ["train", "96"] in [row[:2] for row in rows]


def test_plan_counts_parameters_as_the_models_have_them(tmp_path: Path, terminal: Terminal) -> None:
    recipe = toy_recipe(tmp_path)
    rows = {row[0]: row for row in table_rows(terminal("plan", written(tmp_path, recipe)))}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher")
    assert rows["teacher"][1:4] == ["4", "32", f"{model.num_parameters():,}"]
    assert rows["student"][1:3] == ["2", "16"]
    terminal("train", written(tmp_path, recipe))
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert rows["student"][3] == f"{student.num_parameters():,}"


def test_plan_says_where_vocabularies_are_padded(tmp_path: Path, terminal: Terminal) -> None:
    text = terminal("plan", written(tmp_path, task_recipe(tmp_path, "causal-lm", "cka")))
    assert "the same token ids; 60 ids are compared" in text


@pytest.mark.parametrize("method", METHODS)
def test_plan_works_for_every_method(method: str, tmp_path: Path, terminal: Terminal) -> None:
    text = terminal("plan", written(tmp_path, method_recipe(tmp_path, method)))
    assert f"Method: {method}, {METHODS[method].summary}" in text
    assert "Stage " in text
    assert not (tmp_path / "run").exists()


def test_train_then_evaluate(tmp_path: Path, terminal: Terminal) -> None:
    recipe = written(tmp_path, toy_recipe(tmp_path, "cka"))
    text = terminal("train", recipe, "--set", "training.max_steps=3")
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    rows = {row[0]: row[1:] for row in table_rows(text)}
    assert rows["accuracy"] == [f"{result[name]['accuracy']:.4f}" for name in ("student", "teacher")]
    parameters = [f"{result['cost'][name]['parameters']['total']:,}" for name in ("student", "teacher")]
    assert rows["parameters"] == parameters
    assert str(tmp_path / "run" / "student") in text

    again = " ".join(terminal("train", recipe, "--set", "training.max_steps=3").split())
    assert "is finished; it is not run again (--again does)." in again

    found = json.loads(terminal("evaluate", str(tmp_path / "run"), recipe))
    assert found["model"] == pytest.approx(result["student"], rel=1e-6)
    assert found["cost"]["model"]["parameters"] == result["cost"]["student"]["parameters"]
    of_teacher = json.loads(terminal("evaluate", str(tmp_path / "teacher"), recipe, "--set", "evaluation.cost=false"))
    assert of_teacher == {
        "split": "validation", "model": pytest.approx(result["teacher"], rel=1e-6), "chance": result["chance"],
    }  # fmt: skip


def test_again_on_the_command_line(tmp_path: Path, terminal: Terminal) -> None:
    recipe = written(tmp_path, toy_recipe(tmp_path, "none", evaluation={"cost": False}))
    terminal("train", recipe, "--set", "training.max_steps=1")
    terminal("train", recipe, "--set", "training.max_steps=2", status=2)
    terminal("train", recipe, "--set", "training.max_steps=2", "--again")
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]["max_steps"] == 2
