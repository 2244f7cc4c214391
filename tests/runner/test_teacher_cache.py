"""A recipe with a cached teacher: filled once, shared, quoted before, refused when it is not the one that is meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from toy import toy_dataset
from toy_recipe import toy_recipe, toy_tokenizer

import layerdistill as ld
from layerdistill import teacher_cache
from layerdistill.caching import fill_cache
from layerdistill.core.errors import UserError
from layerdistill.models import make_student
from layerdistill.plan import show_plan
from layerdistill.recipe import load_recipe
from layerdistill.runner import run

LONG = {
    "max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 24, "logging_steps": 6,
}  # fmt: skip
SAID = Console(quiet=True)


def recipe_of(folder: Path, method: str = "ild", cache: str = "fill", output: str = "run", **teacher: Any) -> Any:
    found = toy_recipe(folder, method, training=dict(LONG), output=str(folder / output))
    found["evaluation"] = {"cost": False}
    found["teacher"] |= {"cache": cache, "cache_folder": str(folder / "cache"), **teacher}
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("method", ["kd", "ild", "cka", "rail_kd", "ted"])
def test_a_cached_teacher_teaches_what_the_live_one_does(method: str, tmp_path: Path) -> None:
    live = run(recipe_of(tmp_path, method, "off", "live"))
    cached = run(recipe_of(tmp_path, method, "fill", "cached", cache_dtype="float32"))
    assert losses(live.folder) == pytest.approx(losses(cached.folder), rel=1e-4)
    assert live.metrics == pytest.approx(cached.metrics, abs=0.05)
    rounded = run(recipe_of(tmp_path, method, "fill", "float16", cache_folder=str(tmp_path / "c16")))
    assert losses(live.folder) == pytest.approx(losses(rounded.folder), rel=1e-2)


PADDING = {
    "ild": {"distance": "padded_normalised_mse"},
    "ted": {"filters": "none", "finetune_student_first": False, "mask_padding": False},
    "rail_kd": {"include_padding": True},
    "lora_ild": {"include_padding": True, "rank": 4},
    "layer_prune": {"num_removed": 1, "loss": "paper", "count_padding": True, "calibration": {"examples": 8}},
}
"""Options with which padding counts."""


@pytest.mark.parametrize("method", list(PADDING))
def test_where_padding_counts_the_teacher_is_run(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def recipe(cache: str, output: str) -> Any:
        found = recipe_of(tmp_path, method, cache, output)
        found["method"] |= PADDING[method]
        if method == "layer_prune":
            del found["student"]
        if method == "lora_ild":
            found["teacher"]["finetune"] = {"max_steps": 2, "lora": {"rank": 4}}
            found["student"] = {"num_blocks": 2}
        return found

    with pytest.raises(UserError, match="The method counts padding"):
        run(recipe("fill", "refused"))
    live = run(recipe("off", "live"))
    auto = run(recipe("auto", "auto"), console=Console(width=500))
    assert "The teacher is not cached: The method counts padding" in capsys.readouterr().out
    assert losses(live.folder) == losses(auto.folder)
    assert not list((tmp_path / "cache").glob("**/*.safetensors"))


def test_with_batches_padded_alike_and_float32_the_losses_are_bit_identical(tmp_path: Path) -> None:
    """Of hidden states. A head's product of few rows adds in another order in another place of the batch."""
    for cache in ("off", "fill"):
        recipe = recipe_of(tmp_path, "ild", cache, cache, cache_dtype="float32")
        recipe["data"]["padding"] = "max_length"
        recipe["training"]["padding_free"] = False
        recipe["method"]["weights"] = {"task": 1.0, "logits": 0.0, "hidden": 1.0}
        run(recipe)
    assert losses(tmp_path / "off") == losses(tmp_path / "fill")
    for name, tensor in weights(tmp_path / "off").items():
        assert torch.equal(tensor, weights(tmp_path / "fill")[name])


def test_the_teacher_is_run_once_for_all_methods_and_seeds(tmp_path: Path, teacher_runs: list[int]) -> None:
    fill_cache(load_recipe(recipe_of(tmp_path, "ild")), SAID)
    assert sum(teacher_runs) == 96
    for seed in (1, 2):
        for method in ("ild", "kd"):
            recipe = {**recipe_of(tmp_path, method, "require", f"{method}-{seed}"), "seed": seed}
            run(recipe)
    assert sum(teacher_runs) == 96
    more = recipe_of(tmp_path, "ild", "fill", "reverse")
    more["method"]["layer_map"] = [[1, 1], [2, 4]]
    run(more)
    assert sum(teacher_runs) == 2 * 96, "layer 1 was lacking"
    run({**more, "output": str(tmp_path / "again"), "seed": 3})
    assert sum(teacher_runs) == 2 * 96


def test_auto_caches_from_two_passes_on_and_uses_what_is_there(tmp_path: Path, teacher_runs: list[int]) -> None:
    short = recipe_of(tmp_path, "kd", "auto", "short")
    short["training"]["max_steps"] = 12
    run(short)
    assert len(teacher_runs) == 12, "one pass: nothing would be saved"
    assert not (tmp_path / "cache").exists()
    run(recipe_of(tmp_path, "kd", "auto", "long"))
    assert len(teacher_runs) == 12 + 12
    run({**short, "output": str(tmp_path / "after"), "seed": 3})
    assert len(teacher_runs) == 12 + 12


@pytest.mark.parametrize("method", ["ild", "rail_kd", "kd"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_plan_quotes_the_size_within_five_per_cent(method: str, dtype: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, method, cache_dtype=dtype)
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(5 * (lines + lines[:40])) + "\n")
    console = Console(record=True, width=300, quiet=False, file=(tmp_path / "said").open("w"))
    show_plan(load_recipe(recipe), console)
    said = next(line for line in console.export_text().splitlines() if line.startswith("Teacher cache"))
    quoted = 1e9 * float(said.split(":")[1].split("GB")[0])
    folder = fill_cache(load_recipe(recipe), SAID)
    written = sum(path.stat().st_size for path in folder.iterdir())
    header = 8 + 300 * len(list(folder.glob("*.safetensors"))) + (folder / "manifest.json").stat().st_size
    assert quoted == pytest.approx(written - header, rel=0.05)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": {"model": "other"}}, r"teacher \('"),
        ({"data": {"max_length": 7}}, r"longest example \(12 there, 7 here\)"),
        ({"data": {"max_train_examples": 50}}, r"examples \(96 there, 50 here\)"),
        ({"teacher": {"cache_dtype": "int8"}}, r"cache_dtype \('float16' there, 'int8' here\)"),
        ({"teacher": {"dtype": "bfloat16"}}, r"cache_dtype \('float16' there, 'bfloat16' here\)"),
        ({"order": True}, r"made for something else: data \('"),
    ],
)
@pytest.mark.parametrize("cache", ["auto", "fill", "require"])
def test_a_cache_of_something_else_is_refused_and_named(
    cache: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    fill_cache(load_recipe(recipe_of(tmp_path)), SAID)
    recipe = recipe_of(tmp_path, cache=cache)
    if "order" in change:
        lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
        (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    if change.get("teacher", {}).get("model") == "other":
        other = tmp_path / "other"
        shutil.copytree(tmp_path / "teacher", other)
        changed = {name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()}
        save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
        change = {"teacher": {"model": str(other)}}
    for section in change.keys() & recipe.keys():
        recipe[section] |= change[section]
    with pytest.raises(UserError, match=said):
        run(recipe)
    assert not (tmp_path / "run" / "student").exists()


def test_require_without_a_cache_says_what_to_do(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, cache="require")
    with pytest.raises(UserError, match="layerdistill cache"):
        run(recipe)
    fill_cache(load_recipe(recipe), SAID)
    recipe["method"]["layer_map"] = "reverse"
    recipe["method"]["embeddings"] = True
    with pytest.raises(UserError, match=r"lacks layer 0; it has layer \d, layer \d"):
        run(recipe)


def test_a_recipe_that_names_no_folder_is_told_the_nearest_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "home"))
    recipe = recipe_of(tmp_path, cache_folder=None)
    folder = fill_cache(load_recipe(recipe), SAID)
    assert folder.parent == tmp_path / "home" / "cache"
    recipe["teacher"]["cache"] = "require"
    elsewhere = recipe["teacher"] | {"cache": "require", "cache_folder": str(tmp_path / "nowhere")}
    with pytest.raises(
        UserError, match=r"no cache for this recipe in .*nowhere\. .* fits, though: leave teacher\.cache"
    ):
        run({**recipe, "teacher": elsewhere})
    recipe["data"]["max_length"] = 7
    with pytest.raises(UserError, match=r"The nearest, .*, differs: longest example \(12 there, 7 here\)"):
        run(recipe)


def test_a_cache_of_other_data_is_refused_before_the_teacher_is_fine_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "home"))
    recipe = recipe_of(tmp_path, finetune={"max_steps": 2, "per_device_train_batch_size": 4})
    fill_cache(load_recipe(recipe), SAID)
    recipe["data"]["max_length"] = 7
    for command in (run, lambda given: fill_cache(load_recipe(given), SAID)):
        with pytest.raises(UserError, match=r"something else: longest example \(12 there, 7 here\), data "):
            command(recipe)
    assert len(list((tmp_path / "home" / "teachers").glob("*/config.json"))) == 1, "no second one was made"
    run({**recipe, "method": {"name": "none"}})


@pytest.mark.parametrize("cache", ["auto", "fill"])
def test_a_broken_cache_is_refused_before_training(cache: str, tmp_path: Path) -> None:
    folder = fill_cache(load_recipe(recipe_of(tmp_path)), SAID)
    break_a_shard(folder)
    with pytest.raises(UserError, match="has changed since it was written"):
        run(recipe_of(tmp_path, cache=cache))
    assert not (tmp_path / "run" / "student").exists()


def test_auto_goes_on_without_a_broken_cache_that_nobody_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "home"))
    recipe = recipe_of(tmp_path, cache="auto", cache_folder=None)
    break_a_shard(fill_cache(load_recipe(recipe), SAID))
    console = Console(record=True, width=400, file=(tmp_path / "said").open("w"))
    run(recipe, console=console)
    assert "The teacher is not cached: The shard" in console.export_text()
    assert (tmp_path / "run" / "student").exists()


def break_a_shard(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    shard.write_bytes(whole)


def test_a_disk_that_is_too_small_is_refused_with_advice_and_auto_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda place: SimpleNamespace(free=50_000))
    with pytest.raises(UserError, match=r"needs 0.000109 GB, 5e-05 GB are free.*int8.*fewer matched layers.*rail_kd"):
        fill_cache(load_recipe(recipe_of(tmp_path)), SAID)
    console = Console(record=True, width=400, file=(tmp_path / "said").open("w"))
    run(recipe_of(tmp_path, cache="auto"), console=console)
    assert "The teacher is not cached: The teacher cache needs" in console.export_text()


def test_auto_stays_within_its_limit(tmp_path: Path, teacher_runs: list[int]) -> None:
    console = Console(record=True, width=400, file=(tmp_path / "said").open("w"))
    run(recipe_of(tmp_path, cache="auto", cache_gb=1e-5), console=console)
    assert "teacher.cache_gb allows 1e-05" in console.export_text()
    assert len(teacher_runs) == 24


def test_a_method_that_reads_no_teacher_needs_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'none' reads nothing of a teacher"):
        fill_cache(load_recipe(recipe_of(tmp_path, "none")), SAID)


def test_python_code_gets_the_same_cache(tmp_path: Path, teacher_runs: list[int]) -> None:
    results = []
    for name in ("first", "second"):
        teacher, data = (
            tiny_model("bert", "sequence-classification", seed=5),
            toy_dataset("sequence-classification", 32),
        )
        student = make_student(teacher, num_blocks=2)
        args = ld.LayerDistillationConfig(output_dir=str(tmp_path / name), max_steps=12, per_device_train_batch_size=8)
        cache = ld.CacheConfig("fill", "float32", folder=tmp_path / "cache")
        found = ld.distill(teacher, student, data, None, "ild", toy_tokenizer(), args, cache=cache)
        results.append(found.student.state_dict())
    assert sum(teacher_runs) == 32
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    student = make_student(teacher, num_blocks=2)
    trainer = ld.LayerDistillationTrainer(
        student, teacher, "ild", args, data, cache=cache, processing_class=toy_tokenizer()
    )
    trainer.train()
    assert sum(teacher_runs) == 32


@pytest.mark.parametrize("method", ["kd", "ild"])
def test_likeliest_tokens_of_a_cached_teacher_teach_what_those_of_a_live_one_do(method: str, tmp_path: Path) -> None:
    found: dict[str, list[float]] = {}
    for name, cache in [("live", None), ("cached", ld.CacheConfig("fill", "float32", folder=tmp_path / "cache"))]:
        teacher = tiny_model("llama", "causal-lm", seed=5)
        student = make_student(teacher, num_blocks=2)
        args = ld.LayerDistillationConfig(
            output_dir=str(tmp_path / name), max_steps=24, per_device_train_batch_size=8, logging_steps=4, seed=3
        )
        trainer = ld.LayerDistillationTrainer(
            student, teacher, {"name": method, "logits_top_k": 4}, args, toy_dataset("causal-lm", 32), cache=cache,
            processing_class=toy_tokenizer(),
        )  # fmt: skip
        trainer.train()
        found[name] = [line["distill/logits"] for line in trainer.state.log_history if "distill/logits" in line]
    assert len(found["live"]) == 6
    assert found["cached"] == pytest.approx(found["live"], rel=1e-4)
