"""What `plan` says of a run and a cache that are there already, against what a run then does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from task_recipes import task_recipe
from toy_recipe import toy_recipe

from layerdistill import plan_cache
from layerdistill.caching import fill_cache
from layerdistill.core.errors import UserError
from layerdistill.plan import show_plan
from layerdistill.recipe import load_recipe
from layerdistill.runner import run

SAID = Console(quiet=True)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "home"))


def recipe_of(folder: Path, method: str = "ild", steps: int = 24, **teacher: Any) -> dict[str, Any]:
    training = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 6}
    found = toy_recipe(folder, method, training=training)
    found["evaluation"] = {"cost": False}
    found["teacher"] |= teacher
    return found


def planned(recipe: dict[str, Any], folder: Path) -> str:
    with (folder / "said").open("w") as file:
        console = Console(record=True, width=2000, file=file)
        show_plan(load_recipe(recipe), console)
    return console.export_text()


def said_by_run(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    run(recipe, console=Console(width=2000))
    return capsys.readouterr().out


@pytest.mark.parametrize("named", [True, False])
def test_a_cache_that_is_there_is_found(named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = {"cache_folder": str(tmp_path / "cache")} if named else {}
    recipe = recipe_of(tmp_path, **where)
    assert "A run keeps what is lacking before the first step that reads it." in planned(recipe, tmp_path)
    folder = fill_cache(load_recipe(recipe), SAID)
    assert f"{folder} holds all of it for these data. (A run compares" in planned(recipe, tmp_path)
    other = recipe_of(tmp_path, **where)
    other["method"]["layer_map"] = [[1, 1], [2, 4]]
    assert f"{folder} holds all of it but layer 1 for these data" in planned(other, tmp_path)
    assert f"The teacher is read from {folder}" in said_by_run(recipe, capsys)


def test_the_states_of_a_language_model_stand_for_its_logits(tmp_path: Path) -> None:
    recipe = task_recipe(tmp_path, "causal-lm", "cka")
    folder = fill_cache(load_recipe(recipe), SAID)
    assert f"{folder} holds all of it for" in planned(recipe, tmp_path)


@pytest.mark.parametrize("change", [{"data": {"max_train_examples": 50}}, {"teacher": {"cache_dtype": "int8"}}])
@pytest.mark.parametrize("named", [True, False])
def test_a_cache_of_something_else_is_refused_where_it_is_named(
    named: bool, change: dict[str, Any], tmp_path: Path
) -> None:
    where = {"cache_folder": str(tmp_path / "cache")} if named else {}
    recipe = recipe_of(tmp_path, **where)
    folder = fill_cache(load_recipe(recipe), SAID)
    for section, values in change.items():
        recipe[section] |= values
    text = planned(recipe, tmp_path)
    assert " holds " not in text
    assert (f"A run would refuse this: The teacher cache in {folder} was made for something else" in text) == named
    if named:
        with pytest.raises(UserError, match="made for something else"):
            run(recipe)


def test_a_broken_manifest_is_named_or_passed_over(tmp_path: Path) -> None:
    for where in ({"cache_folder": str(tmp_path / "cache")}, {}):
        recipe = recipe_of(tmp_path, **where)
        folder = fill_cache(load_recipe(recipe), SAID)
        manifest = folder / "manifest.json"
        manifest.write_bytes(manifest.read_bytes().replace(b"complete", b"Complete"))
        text = planned(recipe, tmp_path)
        assert " holds " not in text
        assert ("is broken: it is not as it was written" in text) == bool(where)


def test_what_auto_would_not_keep_is_said_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = recipe_of(tmp_path, steps=12)
    assert (
        "The teacher would be run at every step, and not kept: 1 passes over the data are fewer than 1.5."
        in planned(short, tmp_path)
    )
    small = recipe_of(tmp_path, cache_gb=1e-9)
    assert "GB are needed, and teacher.cache_gb allows 1e-09." in planned(small, tmp_path)
    for recipe in (short, small):
        assert "The teacher is read from" not in said_by_run(recipe | {"output": str(tmp_path / "other")}, capsys)
        shutil.rmtree(tmp_path / "other")
    assert "not be kept" not in planned(recipe_of(tmp_path), tmp_path)
    monkeypatch.setattr(plan_cache, "free_at", lambda place: 10)
    assert "not kept: 0.000109 GB are needed, 1e-08 GB are free." in planned(recipe_of(tmp_path), tmp_path)
    assert "A run would refuse this: 0.000109 GB are needed, 1e-08 GB are free." in planned(
        recipe_of(tmp_path, cache="fill"), tmp_path
    )
    assert "A run would refuse this, for not all of it is there." in planned(
        recipe_of(tmp_path, cache="require"), tmp_path
    )


def test_a_run_that_is_there_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, "kd", cache="off")
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
    recipe = recipe_of(tmp_path, "kd", cache="off")
    run(recipe)
    folder = Path(recipe["output"])
    (folder / "evaluation.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "distill" / "finished")
    assert "goes on with it (nothing is trained yet)." in planned(recipe, tmp_path)
    state = folder / "checkpoints" / "distill" / "checkpoint-6"
    state.mkdir()
    (state / "trainer_state.json").write_text(json.dumps({"global_step": 6, "max_steps": 24}))
    assert "goes on with it (stage distill at step 6 of 24)." in planned(recipe, tmp_path)
