"""A run that is there: what `plan` says of it, and what may not have changed when it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from toy_recipe import toy_recipe

from layerdistill.core.errors import UserError
from layerdistill.plan import show_plan
from layerdistill.recipe import load_recipe
from layerdistill.runner import run

SAID = Console(quiet=True)


def recipe_of(folder: Path) -> dict[str, Any]:
    training = {"max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 6}
    found = toy_recipe(folder, "kd", training=training)
    found["evaluation"] = {"cost": False}
    found["teacher"]["cache"] = "off"
    return found


def planned(recipe: dict[str, Any], folder: Path) -> str:
    with (folder / "said").open("w") as file:
        console = Console(record=True, width=2000, file=file)
        show_plan(load_recipe(recipe), console)
    return console.export_text()


def unfinished(recipe: dict[str, Any]) -> Path:
    """The folder of a run that ended before its evaluation."""
    folder = run(recipe, console=SAID).folder
    (folder / "evaluation.json").unlink()
    return folder


def test_a_run_that_is_there_is_found(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    assert "was begun" not in planned(recipe, tmp_path)
    run(recipe)
    folder = Path(recipe["output"])
    assert f"{folder} is finished: `train` would only show its result" in planned(recipe, tmp_path)
    other = recipe | {"seed": 5}
    text = planned(other, tmp_path)
    assert f"`train` would refuse this: {folder} holds a run of another recipe" in text and "5 now" in text
    (folder / "evaluation.json").unlink()
    assert f"{folder} was begun: `train` goes on with it (stage distill done)." in planned(recipe, tmp_path)


def test_how_far_a_run_came_is_said(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    run(recipe)
    folder = Path(recipe["output"])
    (folder / "evaluation.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "distill" / "finished")
    assert "goes on with it (nothing is trained yet)." in planned(recipe, tmp_path)
    state = folder / "checkpoints" / "distill" / "checkpoint-6"
    state.mkdir()
    (state / "trainer_state.json").write_text(json.dumps({"global_step": 6, "max_steps": 24}))
    assert "goes on with it (stage distill at step 6 of 24)." in planned(recipe, tmp_path)


@pytest.mark.parametrize("what", ["the training data", "the teacher"])
def test_a_run_does_not_go_on_with_other_content(what: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    folder = unfinished(recipe)
    data, weights = tmp_path / "data" / "train.jsonl", tmp_path / "teacher" / "model.safetensors"
    before = data.read_bytes(), weights.read_bytes()
    if what == "the training data":
        data.write_text("\n".join(data.read_text().splitlines()[:-1]) + "\n")
    else:
        save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=f"begun with other content under the same recipe: {what} changed since"):
        run(recipe, console=SAID)
    assert ("begun with other content" in planned(recipe, tmp_path)) == (what == "the training data")
    data.write_bytes(before[0])
    weights.write_bytes(before[1])
    assert "`train` goes on with it" in planned(recipe, tmp_path)
    run(recipe, console=SAID)
    data.write_text("\n".join(data.read_text().splitlines()[:-1]) + "\n")
    run(recipe, again=True, console=SAID)
    assert json.loads((folder / "environment.json").read_text())["examples"]["train"] == 95


def test_content_that_was_trained_on_nowhere_may_change(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    folder = unfinished(recipe)
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "student")
    data = tmp_path / "data" / "train.jsonl"
    data.write_text("\n".join(data.read_text().splitlines()[:-1]) + "\n")
    run(recipe, console=SAID)
