"""A recipe whose training data are a stream: the same student as from memory, through stops, with a teacher cache."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from test_teacher_cache import losses, weights
from toy_recipe import toy_recipe, write_teacher

from layerdistill.caching import fill_cache
from layerdistill.core.errors import UserError
from layerdistill.data import streamed
from layerdistill.diagnosis import rows_to_show
from layerdistill.plan import show_plan
from layerdistill.prepare import prepare
from layerdistill.recipe import load_recipe
from layerdistill.runner import run

STEPS = 24
"""About three passes over the data."""


def recipe_of(folder: Path, output: str = "run", data: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    recipe = toy_recipe(folder, "ild", output=str(folder / output))
    if not (folder / "lm").exists():
        write_teacher(folder / "lm", "gpt2", "causal-lm")
    recipe["teacher"] = {"model": str(folder / "lm"), "cache": "off"}
    recipe["data"] = {
        "task": "causal-lm", "train": str(folder / "data" / "train.jsonl"), "text": "text", "max_length": 16,
        "validation": str(folder / "data" / "validation.jsonl"), "streaming": True, **(data or {}),
    }  # fmt: skip
    recipe["training"] |= {"max_steps": STEPS, "save_steps": 5, "per_device_train_batch_size": 6}
    for section, fields in changes.items():
        recipe[section] = {**recipe.get(section, {}), **fields}
    return recipe


def breaking_after(left: int, error: Exception) -> Callable[..., Iterator[str]]:
    """What reads texts, until it has read so many, in however many passes."""
    texts = streamed._texts

    def breaking(*given: Any) -> Iterator[str]:
        nonlocal left
        for text in texts(*given):
            left -= 1
            if left < 0:
                raise error
            yield text

    return breaking


def test_it_trains_the_student_that_the_same_data_in_memory_train(tmp_path: Path) -> None:
    ordered = run(recipe_of(tmp_path, "stream", {"shuffle_buffer": 0}, training={"max_steps": 7}))
    in_order = {"max_steps": 7, "train_sampling_strategy": "sequential"}
    listed = run(recipe_of(tmp_path, "list", {"streaming": False}, training=in_order))
    assert losses(ordered.folder) == losses(listed.folder)
    for name, tensor in weights(listed.folder).items():
        assert tensor.equal(weights(ordered.folder)[name]), name
    assert ordered.metrics == listed.metrics
    environment = json.loads((ordered.folder / "environment.json").read_text())
    assert environment["examples"] == {"validation": 10, "train": None}


def test_data_loader_workers_change_nothing(tmp_path: Path) -> None:
    plain = run(recipe_of(tmp_path, "plain", {"shuffle_buffer": 20}, training={"max_steps": 7}))
    workers = {"max_steps": 7, "dataloader_num_workers": 2}
    helped = run(recipe_of(tmp_path, "helped", {"shuffle_buffer": 20}, training=workers))
    assert losses(plain.folder) == losses(helped.folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_refused_in_the_middle_is_said_in_one_sentence(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_texts", breaking_after(200, UserError("data.train holds 5 in row 7, not text.")))
    training = {"dataloader_num_workers": workers, "logging_steps": 1}
    with pytest.raises(UserError, match=r"^data\.train holds 5 in row 7, not text\.$"):
        run(recipe_of(tmp_path, training=training))
    assert losses(tmp_path / "run"), "training had begun"


def test_ted_learns_from_a_stream_what_it_learns_from_a_list(tmp_path: Path) -> None:
    steps = {"max_steps": 4, "logging_steps": 1}
    found = []
    for name, data, training in (
        ("stream", {"shuffle_buffer": 0}, {}),
        ("list", {"streaming": False}, {"train_sampling_strategy": "sequential"}),
    ):
        recipe = recipe_of(tmp_path, name, data, training={**steps, **training})
        recipe["student"] = {"num_blocks": 2, "init": "copy"}
        recipe["method"] = {"name": "ted", "stage_one": {"record_gb": 0}}
        found.append(losses(run(recipe).folder))
    assert found[0] == found[1]
    assert len(found[0]) == 4 * 4, "four stages of four steps"


def test_a_stopped_run_goes_on_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(recipe_of(tmp_path, "whole", {"shuffle_buffer": 20}))
    with monkeypatch.context() as broken:
        broken.setattr(streamed, "_texts", breaking_after(200, RuntimeError("the connection is gone")))
        with pytest.raises(RuntimeError, match="the connection is gone"):
            run(recipe_of(tmp_path, "stopped", {"shuffle_buffer": 20}))
    assert list((tmp_path / "stopped" / "checkpoints" / "distill").glob("checkpoint-*"))
    again = run(recipe_of(tmp_path, "stopped", {"shuffle_buffer": 20}))
    assert all(tensor.equal(weights(again.folder)[name]) for name, tensor in weights(whole.folder).items())


def test_the_teacher_is_run_once_for_each_block(tmp_path: Path, teacher_runs: list[int]) -> None:
    kept = {"cache": "fill", "cache_folder": str(tmp_path / "cache"), "cache_dtype": "float32"}
    blocks = prepare(load_recipe(recipe_of(tmp_path, data={"streaming": False}))).datasets["train"]
    run(recipe_of(tmp_path, "filled", teacher=kept))
    assert len(blocks) <= sum(teacher_runs) < 6 * STEPS
    teacher_runs.clear()
    run(recipe_of(tmp_path, "required", teacher={**kept, "cache": "require"}))
    assert teacher_runs == []
    ours, theirs = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("filled", "required"))
    assert ours.keys() == theirs.keys()
    with pytest.raises(UserError, match="kept while it is trained on"):
        fill_cache(load_recipe(recipe_of(tmp_path, teacher=kept)), Console(quiet=True))


@pytest.mark.parametrize("mode", ["auto", "fill", "require"])
def test_the_plan_says_that_it_is_a_stream(mode: str, tmp_path: Path) -> None:
    said = io.StringIO()
    console = Console(file=said, width=120)
    show_plan(load_recipe(recipe_of(tmp_path, teacher={"cache": mode, "cache_gb": 3.0})), console)
    text = " ".join(said.getvalue().split())
    assert "train │ a stream" in text
    assert f"{STEPS} of a stream" in text
    assert f"Teacher cache ({mode})" in text
    assert ("up to 3 GB" in text) == (mode == "fill")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"max_steps": -1}}, "training.max_steps is missing"),
        ({"teacher": {"finetune": {"max_steps": 2}}}, "passes over all training data"),
        ({"student": {"vocabulary": "trimmed"}}, "counts the tokens of all training data"),
        ({"data": {"train": "nowhere.jsonl"}}, "there is no such file or folder"),
        ({"data": {"text": "words", "validation": None}}, "no column 'words'"),
        ({"data": {"max_length": 999}}, "positions for 128"),
    ],
)
def test_what_needs_all_of_the_data_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare(load_recipe(recipe_of(tmp_path, **changes)))


def test_a_method_that_draws_rows_to_choose_by_needs_another_split(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    recipe["method"] = {"name": "layer_prune", "calibration": {"examples": 4}}
    del recipe["student"]
    with pytest.raises(UserError, match=r"draws rows of train.*method\.calibration\.split"):
        prepare(load_recipe(recipe))


def test_a_diagnosis_looks_at_other_data(tmp_path: Path) -> None:
    prepared = prepare(load_recipe(recipe_of(tmp_path)))
    assert rows_to_show(prepared, 4)[0] == "validation"
    with pytest.raises(UserError, match=r"Add data\.validation"):
        rows_to_show(prepare(load_recipe(recipe_of(tmp_path, data={"validation": None}))), 4)
