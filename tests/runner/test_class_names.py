"""Whose class is whose: a trained head and the data have the same classes in the same order, and names are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from toy_recipe import toy_recipe, toy_tokenizer, write_teacher

from layerdistill.core.errors import UserError
from layerdistill.measurement import evaluate_folder
from layerdistill.recipe import load_recipe
from layerdistill.runner import run

QUIET = Console(quiet=True)
HEAD = ("Neutral", "entailment", "contradiction")
"""The order of a natural-language inference model; by the alphabet the last would be the first."""

HEAD_IN_DATA = [name.lower() for name in HEAD]


def named_recipe(folder: Path, words: bool, names: tuple[str, ...] = HEAD) -> dict[str, Any]:
    """A recipe whose teacher has named classes, with data that hold words (in small letters) or numbers."""
    recipe = toy_recipe(folder, "kd", evaluation={"cost": False})
    write_teacher(folder / "teacher")
    config = folder / "teacher" / "config.json"
    named = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    for split in ("train", "validation"):
        path = folder / "data" / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [{**row, "label": HEAD[row["label"]].lower() if words else row["label"]} for row in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return recipe


def advised_names(error: UserError) -> list[str]:
    """What YAML reads in the line that the message advises."""
    line = re.search(r"data\.(label_names: \[.*?\])\.", str(error))
    assert line is not None, error
    return list(yaml.safe_load(line[1])["label_names"])


def names_of(folder: Path) -> list[str]:
    return list(json.loads((folder / "config.json").read_text())["id2label"].values())


def test_another_order_is_refused_with_the_right_one(tmp_path: Path) -> None:
    recipe = named_recipe(tmp_path, words=True)
    ordered = ["neutral", "entailment", "contradiction"]
    with pytest.raises(UserError) as refusal:
        run(recipe, console=QUIET)
    assert advised_names(refusal.value) == ordered
    none = {**recipe, "method": {"name": "none"}, "student": {"model": str(tmp_path / "teacher")}}
    with pytest.raises(UserError, match="classes in another order"):
        run(none, console=QUIET)
    del none["teacher"]
    with pytest.raises(UserError, match="classes in another order"):
        evaluate_folder(str(tmp_path / "teacher"), load_recipe(none))
    recipe["data"]["label_names"] = ordered
    result = run(recipe, console=QUIET)
    assert names_of(result.student) == ordered

    numbers = run(named_recipe(tmp_path / "numbers", words=False), console=QUIET)
    assert numbers.teacher_metrics == result.teacher_metrics, "the same rows, the same classes"


@pytest.mark.parametrize("names", [("yes", "no", "maybe"), ("2", "1", "0"), ("c: d", "b, a", "#1")])
def test_the_advice_is_what_a_recipe_can_hold(names: tuple[str, ...], tmp_path: Path) -> None:
    recipe = named_recipe(tmp_path, words=True, names=names)
    for split in ("train", "validation"):
        path = tmp_path / "data" / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [{**row, "label": names[HEAD_IN_DATA.index(row["label"])]} for row in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError) as refusal:
        run(recipe, console=QUIET)
    recipe["data"]["label_names"] = advised_names(refusal.value)
    assert names_of(run(recipe, console=QUIET).student) == list(names)


def test_classes_of_other_names_are_told_for_they_go_by_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = named_recipe(tmp_path, words=True, names=("good", "bad", "neither"))
    run(recipe, console=QUIET)
    told = "calls its classes good, bad, neither, the data call them contradiction, entailment, neutral"
    assert f"The teacher {tmp_path / 'teacher'} {told}" in caplog.text
    caplog.clear()
    evaluate_folder(str(tmp_path / "teacher"), load_recipe({**recipe, "method": {"name": "none"}}))
    assert told in caplog.text
    caplog.clear()
    evaluate_folder(recipe["output"], load_recipe(recipe))
    run(named_recipe(tmp_path / "numbers", words=False), console=QUIET)
    assert "calls its classes" not in caplog.text


def test_a_teacher_that_cannot_read_the_data_may_have_any_order(tmp_path: Path) -> None:
    recipe = named_recipe(tmp_path, words=True)
    write_teacher(tmp_path / "own", num_layers=2)
    toy_tokenizer([f"v{number}" for number in range(55)]).save_pretrained(tmp_path / "own")
    recipe |= {"student": {"model": str(tmp_path / "own")}, "method": {"name": "none"}}
    assert run(recipe, console=QUIET).teacher_metrics == {}


def test_numbers_have_no_names_and_the_teachers_are_kept(tmp_path: Path) -> None:
    result = run(named_recipe(tmp_path, words=False), console=QUIET)
    assert names_of(result.student) == list(HEAD)


def test_names_of_a_task_that_the_teacher_was_not_made_for_are_not(tmp_path: Path) -> None:
    recipe = named_recipe(tmp_path, words=False)
    recipe["teacher"]["finetune"] = {"max_steps": 2, "per_device_train_batch_size": 4}
    assert names_of(run(recipe, console=QUIET).student) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_a_student_of_its_own_gets_the_teachers_names(tmp_path: Path) -> None:
    recipe = named_recipe(tmp_path, words=False)
    write_teacher(tmp_path / "own", num_layers=2)
    toy_tokenizer().save_pretrained(tmp_path / "own")
    recipe["student"] = {"model": str(tmp_path / "own")}
    assert names_of(run(recipe, console=QUIET).student) == list(HEAD)


def test_names_that_the_recipe_gave_to_numbers_are_not_to_be_exchanged(tmp_path: Path) -> None:
    recipe = named_recipe(tmp_path, words=False)
    recipe["data"]["label_names"] = sorted(name.lower() for name in HEAD)
    with pytest.raises(UserError, match=r"label_names only says what they mean: bring the data themselves"):
        run(recipe, console=QUIET)


def test_other_names_are_the_datas_and_go_by_number(tmp_path: Path) -> None:
    result = run(named_recipe(tmp_path, words=True, names=("a", "b", "c")), console=QUIET)
    assert names_of(result.student) == sorted(name.lower() for name in HEAD)


def test_a_teacher_that_is_fine_tuned_learns_the_datas_order(tmp_path: Path) -> None:
    recipe = named_recipe(tmp_path, words=True)
    recipe["teacher"]["finetune"] = {"max_steps": 2, "per_device_train_batch_size": 4}
    assert names_of(run(recipe, console=QUIET).student) == sorted(name.lower() for name in HEAD)
