"""Wrong options of methods are found before anything trains, the teacher's fine-tuning included, and said clearly."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from method_recipe import method_recipe
from safetensors.torch import load_file
from task_recipes import task_recipe
from toy_recipe import toy_recipe, write_teacher

from layerdistill import cli
from layerdistill.models.modeling_compact import CompactBlock
from layerdistill.signals.language_head import LanguageHead

Recipe = dict[str, Any]
Spoil = Callable[[Recipe, Path], Any]


def options(**given: Any) -> Spoil:
    """Give the method these options beside its name, and no others."""
    return lambda recipe, folder: recipe.update(method={"name": recipe["method"]["name"], **given})


def section(name: str, **given: Any) -> Spoil:
    """Put keys into a section."""
    return lambda recipe, folder: recipe.setdefault(name, {}).update(given)


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""
    return lambda recipe, folder: [spoil(recipe, folder) for spoil in spoils]


def pruning(**given: Any) -> Spoil:
    """Give layer_prune these options, and fewer rows to choose by than there are."""
    return options(calibration={"examples": 16}, **given)


def only_frozen(recipe: Recipe, folder: Path) -> None:
    recipe["student"] = {"freeze_embeddings": True}


def without_a_student(recipe: Recipe, folder: Path) -> None:
    del recipe["student"]


def without_adapters(recipe: Recipe, folder: Path) -> None:
    del recipe["teacher"]["adapters"]


def pickled_adapters(recipe: Recipe, folder: Path) -> None:
    file = Path(recipe["teacher"]["adapters"]) / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def foreign_adapters(recipe: Recipe, folder: Path) -> None:
    write_teacher(folder / "teacher", "roberta")


def tuned_with_lora(**lora: Any) -> Spoil:
    return both(without_adapters, section("teacher", finetune={"max_steps": 1, "lora": lora}))


def one_matrix_for_three(recipe: Recipe, folder: Path) -> None:
    write_teacher(folder / "gpt2", "gpt2", num_layers=2)
    recipe["student"] = {"model": str(folder / "gpt2")}


def language_model(**student: Any) -> Spoil:
    def spoil(recipe: Recipe, folder: Path) -> None:
        recipe.update({key: task_recipe(folder, "causal-lm")[key] for key in ("teacher", "data")})
        if student:
            recipe["student"] = student

    return spoil


def every_row_twice(recipe: Recipe, folder: Path) -> None:
    """The training rows are the validation rows in another order, and with other labels."""
    lines = [json.loads(line) for line in Path(recipe["data"]["validation"]).read_text().splitlines()]
    random.Random(0).shuffle(lines)
    turned = [{"text": line["text"], "label": (line["label"] + 1) % 3} for line in lines]
    Path(recipe["data"]["train"]).write_text("".join(json.dumps(line) + "\n" for line in turned))


CASES: dict[str, tuple[str, Spoil, list[str]]] = {
    # rail_kd
    "rail-layer-out-of-range": ("rail_kd", options(layer_map=[[1, 9]]), ["method.layer_map", "9", "4"]),
    "rail-redraws-what-is-not-drawn": (
        "rail_kd", options(layer_map="forward", redraw="epoch"), ["redraw", "epoch", "forward"],
    ),
    "rail-no-width": ("rail_kd", options(projection_size=0), ["method.projection_size", "0"]),
    "rail-unknown-form": ("rail_kd", options(form="layer-wise"), ["layer-wise", "layerwise"]),
    # lora_ild and the teacher's adapters
    "ranks-differ": (
        "lora_ild", both(tuned_with_lora(rank=16), options(rank=8)),
        ["method.rank is 8", "rank 16", "write method.rank: 16"],
    ),
    "ranks-differ-in-a-folder": ("lora_ild", options(), ["method.rank is 32", "rank 4", "write method.rank: 4"]),
    "no-adapters": (
        "lora_ild", without_adapters, ["the teacher has none", "teacher.finetune", "teacher.adapters", "svd"],
    ),
    "adapters-missing": ("lora_ild", section("teacher", adapters="no/where"), ["no/where"]),
    "adapters-in-a-pickle": ("lora_ild", pickled_adapters, ["teacher.adapters", "adapter_model.safetensors"]),
    "adapters-of-another-model": ("lora_ild", foreign_adapters, ["has no adapter at roberta.encoder.layer.0"]),
    "adapters-and-finetune": (
        "lora_ild", section("teacher", finetune={"max_steps": 1}), ["teacher.adapters", "no finetune"],
    ),
    "lora-of-rank-0": ("lora_ild", tuned_with_lora(rank=0), ["teacher.finetune.lora", "rank", "greater than 0"]),
    "lora-unknown-key": ("lora_ild", tuned_with_lora(r=4), ["teacher.finetune.lora", "'r'", "rank, alpha, dropout"]),
    "svd-of-a-lora": (
        "lora_ild", both(tuned_with_lora(rank=4), options(teacher_adapters="svd")), ["svd", "full fine-tuning"],
    ),
    "svd-without-finetune": (
        "lora_ild", both(without_adapters, options(teacher_adapters="svd"), section("teacher", finetune=None)),
        ["svd", "teacher.finetune"],
    ),
    "adapters-of-embeddings": ("lora_ild", options(rank=4, layer_map=[[0, 0]]), ["embedding output (0)", "from 1"]),
    "three-matrices-and-one": ("lora_ild", one_matrix_for_three, ["c_attn", "query, key, value", "architecture"]),
    "curriculum-and-weights": (
        "lora_ild", options(rank=4, curriculum={"start": 1}, weights={"task": 1.0}),
        ["method.weights", "method.curriculum.start", "Leave one out"],
    ),
    "curriculum-after-the-end": (
        "lora_ild", both(tuned_with_lora(rank=4), options(rank=4, curriculum={"start": 3})),
        ["method.curriculum.start is 3", "1 epochs", "at most 0"],
    ),
    # ted
    "filters-narrower-than-a-language-model": (
        "ted", both(language_model(num_blocks=2), options(filter_size=8)), ["32 wide", "the filters 8", "filter_size"],
    ),
    "student-narrower-than-a-language-model": (
        "ted", language_model(num_blocks=2, hidden_size=16, init="truncate"), ["student is 16 wide", "teacher 32"],
    ),
    "identity-filters-between-widths": (
        "ted", options(filter_init="identity"), ["filter_init is 'identity'", "16", "32", "normal"],
    ),
    "a-width-for-no-filters": ("ted", options(filters="none", filter_size=8), ["'none'", "filters 8", "Leave"]),
    "filters-by-epochs-and-steps": (
        "ted", options(stage_one={"num_train_epochs": 1, "max_steps": 3}), ["method.stage_one", "Leave one out"],
    ),
    # iskd
    "order-out-of-range": ("iskd", options(order=[1, 9]), ["method.order is [1, 9]", "[9] are no blocks", "0 to 3"]),
    "order-repeated": ("iskd", options(order=[1, 2, 1]), ["method.order is [1, 2, 1]", "[1] stand in it more"]),
    "order-of-twelve-blocks": ("iskd", options(order="paper-gpt2"), ["paper-gpt2", "12 blocks", "has 4", "alternate"]),
    "order-misspelt": ("iskd", options(order="altrenate"), ["altrenate", "alternate"]),
    "more-replaced-than-there-are": ("iskd", options(num_replaced=5), ["num_replaced is 5", "the model has 4 blocks"]),
    "more-replaced-than-listed": ("iskd", options(order=[1, 2], num_replaced=3), ["3", "method.order lists 2"]),
    "heads-that-do-not-divide": (
        "iskd", options(block={"hidden_size": 10, "num_attention_heads": 4}), ["block.hidden_size is 10", "4 heads"],
    ),
    "iskd-learns-nothing": ("iskd", options(weights={"task": 0, "logits": 0, "hidden": 0}), ["weights are all 0"]),
    # layer_prune
    "all-blocks-removed": ("layer_prune", pruning(num_removed=4), ["method.num_removed is 4", "4 blocks", "1 to 3"]),
    "no-block-removed": ("layer_prune", pruning(num_blocks=4), ["method.num_blocks is 4", "4 blocks", "1 to 3"]),
    "removed-and-left": ("layer_prune", pruning(num_removed=1, num_blocks=3), ["both of num_removed and num_blocks"]),
    "neither-removed-nor-left": ("layer_prune", pruning(), ["neither of num_removed and num_blocks"]),
    "chosen-on-what-is-reported": (
        "layer_prune", options(num_removed=1, calibration={"split": "validation"}),
        ["method.calibration.split is 'validation'", "reported", "data.test"],
    ),
    "chosen-on-rows-that-are-reported": (
        "layer_prune", both(every_row_twice, options(num_removed=1, calibration={"examples": 16})),
        ["16 of 16 rows", "data.validation", "overlap"],
    ),
    "more-rows-to-choose-by-than-there-are": (
        "layer_prune", options(num_removed=1, calibration={"examples": 96}),
        ["method.calibration.examples is 96", "only 96 training rows", "Take fewer"],
    ),
    "metric-of-a-language-model": (
        "layer_prune", both(language_model(), pruning(num_removed=1, importance="task_metric")),
        ["task_metric", "perplexity", "one_out_loss"],
    ),
    "more-in-a-round-than-go": (
        "layer_prune", pruning(num_removed=1, per_round=2), ["method.per_round is 2", "only 1 blocks go"],
    ),
    # l1_prune
    "l1-cannot-be-reached": ("l1_prune", options(parameters=10), ["A student of 10 parameters", "nearest"]),
    "l1-whole-model": ("l1_prune", options(parameters=10_000_000), ["10,000,000", "reached", "the model has"]),
    "l1-both": ("l1_prune", options(parameters=9, removed=0.1), ["method.parameters", "method.removed", "not both"]),
    "l1-neither": ("l1_prune", options(), ["method.parameters", "method.removed"]),
    "l1-more-than-all": ("l1_prune", options(removed=1.5), ["method.removed", "1.5", "less than 1"]),
    "l1-of-nothing": ("l1_prune", options(removed=0.1, heads=False, neurons=False), ["heads and neurons are both"]),
    # the student's section
    "iskd-with-a-student": ("iskd", section("student", num_blocks=2), ["student cannot be set", "'iskd'", "Leave"]),
    "layer-prune-with-a-student": ("layer_prune", section("student", num_blocks=2), ["student cannot be set"]),
    "l1-with-a-frozen-student": (
        "l1_prune", section("student", num_blocks=4, freeze_embeddings=True), ["student cannot be set", "'l1_prune'"],
    ),
    "ted-without-a-student": ("ted", without_a_student, ["student is missing", "num_blocks"]),
    "only-frozen": ("kd", only_frozen, ["student is empty"]),
    "frozen-perhaps": ("kd", section("student", freeze_embeddings="perhaps"), ["freeze_embeddings", "perhaps"]),
    "raw-truncation-misspelt": ("kd", section("student", init="truncate-raw"), ["truncate-raw", "truncate_raw"]),
    "raw-truncation-through-a-head": (
        "kd", section("student", init="truncate_raw", hidden_size=18, num_attention_heads=4), ["18", "4"],
    ),
    "raw-truncation-wider": ("kd", section("student", init="truncate_raw", hidden_size=64), ["64", "32"]),
}  # fmt: skip


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Run the command line in this process; return its status and what it printed about errors."""
    monkeypatch.setattr(sys, "argv", ["layerdistill", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0), " ".join(capsys.readouterr().err.split())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def nothing_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(transformers.Trainer, "train", fail)
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path / "home"))


def refused(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """Train by a recipe; return the one message, after which there is nothing new but the lock."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    before = contents(folder)
    status, errors = call(["train", str(path)], monkeypatch, capsys)
    assert status == 2, errors
    assert "Traceback" not in errors
    assert errors.count("error: ") == 1, f"one mistake, one message: {errors}"
    after = contents(folder)
    assert {name: after.pop(name) for name in before} == before
    assert set(after) <= {"run/.lock"}, "nothing is written but the lock"
    return errors


@pytest.mark.parametrize("name", CASES)
def test_wrong_method(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    method, spoil, expected = CASES[name]
    recipe = method_recipe(tmp_path, method)
    if "adapters" not in recipe["teacher"]:  # what is wrong must not be found after an hour of this
        recipe["teacher"]["finetune"] = {"max_steps": 1}
    spoil(recipe, tmp_path)
    errors = refused(recipe, tmp_path, monkeypatch, capsys)
    for fragment in expected:
        assert fragment in errors, errors


def test_a_compact_block_that_sees_later_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    forward = CompactBlock.forward

    def looking_ahead(self: CompactBlock, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        return forward(self, hidden_states + hidden_states.flip(1), *args, **given)

    monkeypatch.setattr(CompactBlock, "forward", looking_ahead)
    recipe = method_recipe(tmp_path, "iskd")
    language_model()(recipe, tmp_path)
    errors = refused(recipe, tmp_path, monkeypatch, capsys)
    for fragment in ("GPT2Block", "a token sees those that follow it", "No training was done", "another architecture"):
        assert fragment in errors


def test_a_language_model_that_filters_cannot_be_read_out_of_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(LanguageHead, "_agrees", lambda *_: False)
    recipe = toy_recipe(tmp_path, "ted")
    language_model(num_blocks=2)(recipe, tmp_path)
    errors = refused(recipe, tmp_path, monkeypatch, capsys)
    assert "GPT2LMHeadModel makes its logits in another way" in errors
    assert "method.filters: unlearned or none" in errors
