"""What `plan` says of a run and a cache that are there already, against what a run then does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from method_recipe import method_recipe
from rich.console import Console
from safetensors.torch import load_file, save_file
from task_recipes import task_recipe
from toy_recipe import toy_recipe

from layerdistill import plan_cache
from layerdistill.caching import fill_cache
from layerdistill.core.errors import UserError
from layerdistill.plan import show_plan
from layerdistill.recipe import load_recipe
from layerdistill.runner import run
from layerdistill.signals.cache_folder import manifest_text, read_manifest

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


def chosen_later(folder: Path, method: str, **teacher: Any) -> dict[str, Any]:
    """A recipe whose method chooses by importance what it reads of the teacher."""
    found = method_recipe(folder, method)
    found["training"] = {"max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    found["evaluation"] = {"cost": False}
    found["teacher"] |= teacher
    found["method"] |= (
        {"order": "importance", "calibration": {"examples": 16}} if method == "iskd" else {"num_removed": 1}
    )
    return found


@pytest.mark.parametrize("method", ["iskd", "layer_prune"])
def test_layers_that_are_chosen_later_are_not_promised(method: str, tmp_path: Path) -> None:
    recipe = chosen_later(tmp_path, method, cache="fill")
    with pytest.raises(UserError, match="chooses blocks while it runs"):
        fill_cache(load_recipe(recipe), SAID)
    text = planned(recipe, tmp_path)
    assert "Teacher cache (fill): about " in text and "these are those of one choice." in text
    with pytest.raises(UserError, match="there is no cache for this recipe"):
        run(recipe | {"teacher": recipe["teacher"] | {"cache": "require"}})
    run(recipe, console=SAID)
    text = planned(recipe, tmp_path)
    assert " holds layer " in text and "all of it" not in text
    required = recipe | {"teacher": recipe["teacher"] | {"cache": "require"}, "output": str(tmp_path / "required")}
    assert "is refused at a stage that reads something else." in planned(required, tmp_path)
    run(required, console=SAID)


def test_a_run_that_may_only_read_goes_on_when_it_may_fill(tmp_path: Path) -> None:
    recipe = chosen_later(tmp_path, "iskd", cache="fill")
    whole = run(recipe, console=SAID)
    kept = tmp_path / "kept"
    whole.folder.rename(kept)
    cache = next((tmp_path / "home" / "cache").iterdir())
    manifest = read_manifest(cache / "manifest.json")
    numbers = sorted(name for name in manifest["complete"] if name.isdigit())
    later = next(name for name in numbers[::-1] if name not in manifest["shards"][0]["signals"])
    manifest["complete"].remove(later)
    (cache / "manifest.json").write_text(manifest_text(manifest))
    with pytest.raises(UserError, match=f"lacks layer {later}.*The same command with teacher.cache: fill goes on."):
        run(recipe | {"teacher": recipe["teacher"] | {"cache": "require"}}, console=SAID)
    assert list((tmp_path / "run" / "checkpoints").glob("*/finished")), "a stage was trained before"
    again = run(recipe, console=SAID)
    assert (again.student / "model.safetensors").read_bytes() == (kept / "student/model.safetensors").read_bytes()


def test_what_is_lacking_of_a_cache_is_told_with_what_follows(tmp_path: Path) -> None:
    fill_cache(load_recipe(recipe_of(tmp_path)), SAID)
    for cache, steps, said in (
        ("require", 24, "A run would refuse this, for not all of it is there."),
        ("auto", 12, "The teacher would be run at every step, and not kept: 1 passes"),
        ("auto", 24, "A run keeps what is lacking before the first step that reads it."),
    ):
        recipe = recipe_of(tmp_path, cache=cache, steps=steps)
        assert said not in planned(recipe, tmp_path), "all of it is there"
        recipe["method"]["layer_map"] = [[1, 1], [2, 4]]
        text = planned(recipe, tmp_path)
        assert "holds all of it but layer 1 for" in text and said in text


def test_stages_are_quoted_one_by_one(tmp_path: Path) -> None:
    recipe = chosen_later(tmp_path, "iskd", cache="auto", cache_gb=7e-5)
    recipe["method"]["order"] = [1, 3]
    assert "A run keeps what is lacking before the first step that reads it." in planned(recipe, tmp_path)
    run(recipe, console=SAID)
    text = planned(recipe, tmp_path)
    assert "holds all of it for" in text and "A run keeps" not in text


@pytest.mark.parametrize("how", ["fine-tuned", "no dtype in its config"])
def test_the_dtype_that_is_kept_is_that_of_the_loaded_teacher(how: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, dtype="auto")
    weights, config = tmp_path / "teacher" / "model.safetensors", tmp_path / "teacher" / "config.json"
    halved = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(halved, weights, metadata={"format": "pt"})
    content = {name: value for name, value in json.loads(config.read_text()).items() if name != "dtype"}
    config.write_text(json.dumps(content | ({"dtype": "bfloat16"} if how == "fine-tuned" else {})))
    if how == "fine-tuned":
        recipe["teacher"]["finetune"] = {"max_steps": 2}
    text = planned(recipe, tmp_path)
    run(recipe, console=SAID)
    kept = "float16" if how == "fine-tuned" else "bfloat16"
    assert f" GB in {kept} for " in text
    assert "holds all of it for" in planned(recipe, tmp_path)


def test_folders_that_a_run_refuses(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, cache_folder=str(tmp_path / "data"))
    assert "A run would refuse this: The teacher cache needs a folder of its own" in planned(recipe, tmp_path)
    for where in ({"cache_folder": str(tmp_path / "cache")}, {}):
        recipe = recipe_of(tmp_path, **where)
        folder = fill_cache(load_recipe(recipe), SAID)
        next(folder.glob("*.safetensors")).unlink()
        text = planned(recipe, tmp_path)
        assert " holds " not in text
        assert ("A run would refuse this: " in text and " lacks " in text) == bool(where)


@pytest.mark.parametrize("cache", ["auto", "fill", "require"])
def test_a_method_that_counts_padding_is_refused_where_it_must_be_kept(cache: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, cache=cache)
    recipe["method"]["distance"] = "padded_normalised_mse"
    text = planned(recipe, tmp_path)
    assert "none, for the method counts padding." in text
    assert ("A run would refuse this" in text) == (cache != "auto")
