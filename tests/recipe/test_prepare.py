"""Preparing: everything is checked against everything else, all problems at once, and no weights are loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from task_recipes import TAGS, TASKS, task_recipe
from tiny_models import tiny_batch, tiny_model
from toy_recipe import WORDS, toy_tokenizer, write_data, write_teacher
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from layerdistill import prepare as prepare_module
from layerdistill.core.errors import UserError
from layerdistill.models import load, positions
from layerdistill.prepare import Prepared, prepare
from layerdistill.recipe import load_recipe

METHODS_WITH_A_TEACHER = ("kd", "ild", "cka")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def recipes(place: Path) -> dict[str, dict[str, Any]]:
    return {task: task_recipe(place / task, task) for task in TASKS}


@pytest.fixture(scope="module")
def folders(place: Path) -> dict[str, str]:
    """Models of every kind that the tests need beside the recipes' own."""
    write_teacher(place / "five-labels", num_labels=5)
    write_teacher(place / "same-words", num_layers=2, hidden_size=16, num_heads=2, vocab_size=72)
    write_teacher(place / "other-words", num_layers=2)
    toy_tokenizer(WORDS[::-1]).save_pretrained(place / "other-words")
    write_teacher(place / "lm-student", "gpt2", "causal-lm", num_layers=2, vocab_size=72)
    return {path.name: str(path) for path in place.iterdir()}


@pytest.fixture(autouse=True)
def no_weights(recipes: object, folders: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads weights while a recipe is prepared fails the test."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)
    monkeypatch.setattr(_BaseAutoModelClass, "from_pretrained", fail)
    monkeypatch.setattr(load, "load_model", fail)
    monkeypatch.setattr(load, "safe_open", fail)


def prepared(recipe: dict[str, Any], *overrides: str) -> Prepared:
    return prepare(load_recipe(recipe, list(overrides)))


def problems_of(recipe: dict[str, Any], *overrides: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        prepared(recipe, *overrides)
    return caught.value.problems


def only_problem(recipe: dict[str, Any], *overrides: str) -> str:
    problems = problems_of(recipe, *overrides)
    assert len(problems) == 1, problems
    return problems[0]


# What is known before anything is loaded


def test_the_pair_is_known_by_its_configs(recipes: dict[str, Any]) -> None:
    found = prepared(recipes["sequence-classification"])
    assert found.pair.teacher is None
    assert (found.pair.teacher_depth, found.pair.student_depth) == ({"": 4}, {"": 2})
    assert (found.pair.teacher_width, found.pair.student_width) == ({"": 32}, {"": 16})
    assert found.pair.vocab_size is None, "classes are no vocabulary"
    assert found.pair.seed == 7
    assert found.labels.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert found.vocabulary is not None
    assert found.vocabulary.identical
    assert {name: len(split) for name, split in found.datasets.items()} == {"train": 50, "validation": 20}


@pytest.mark.parametrize(
    ("overrides", "per_epoch", "total"),
    [
        (["training.max_steps=9"], 7, 9),
        (["training.max_steps=-1", "training.num_train_epochs=2"], 7, 14),
        (["training.max_steps=-1", "training.num_train_epochs=1.5", "training.gradient_accumulation_steps=2"], 4, 6),
        (["training.max_steps=-1", "training.num_train_epochs=0.1"], 7, 1),
        (["training.max_steps=-1", "training.per_device_train_batch_size=64", "training.num_train_epochs=3"], 1, 3),
    ],
)
def test_steps_are_counted(recipes: dict[str, Any], overrides: list[str], per_epoch: int, total: int) -> None:
    found = prepared(recipes["sequence-classification"], *overrides)  # 50 examples in batches of 8
    assert (found.steps_per_epoch, found.total_steps) == (per_epoch, total)


def test_paths_are_looked_for_beside_the_recipe_then_here(
    recipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    write_data(beside / "data", size=30)
    write_data(here / "data", size=40)
    write_teacher(here / "teacher", num_layers=3)
    recipe = copy.deepcopy(recipes["sequence-classification"])
    recipe["data"] |= {"train": "data/train.jsonl", "validation": "data/validation.jsonl"}
    recipe["teacher"]["model"] = "./teacher"
    (beside / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.chdir(here)
    found = prepare(load_recipe(beside / "recipe.yaml"))
    assert len(found.datasets["train"]) == 30, "the recipe's folder comes first"
    assert found.pair.teacher_depth == {"": 3}, "what is not there is looked for in the current folder"
    (beside / "data" / "train.jsonl").unlink()
    assert len(prepare(load_recipe(beside / "recipe.yaml")).datasets["train"]) == 40
    assert len(prepare(load_recipe(recipe)).datasets["train"]) == 40, "a dict lies in the current folder"


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_revision_is_asked_of_the_configuration_too(
    whose: str, recipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def note(source: str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
        asked.append(revision)
        return load.load_config(source, trust_remote_code)

    monkeypatch.setattr(prepare_module, "load_config", note)
    recipe = copy.deepcopy(recipes["sequence-classification"])
    if whose == "student":
        recipe["student"] = {"model": recipe["teacher"]["model"]}
    recipe[whose]["revision"] = "v2"
    prepared(recipe)
    assert asked == (["v2"] if whose == "teacher" else [None, "v2"])


# Tasks


def test_pairs_become_two_segments(recipes: dict[str, Any]) -> None:
    found = prepared(recipes["pairs"])
    row = found.datasets["train"][0]
    assert row["input_ids"].count(3) == 2, "two texts, each ended by [SEP]"
    first = row["input_ids"].index(3) + 1
    assert row["token_type_ids"] == [0] * first + [1] * (len(row["input_ids"]) - first)
    batch = found.collator([found.datasets["train"][n] for n in range(4)])
    assert batch["token_type_ids"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["labels"].dtype.is_floating_point is False


def test_regression_has_one_label_without_classes(recipes: dict[str, Any]) -> None:
    found = prepared(recipes["regression"])
    assert (found.labels.num_labels, found.labels.problem_type) == (1, "regression")
    batch = found.collator([found.datasets["train"][n] for n in range(4)])
    assert batch["labels"].shape == (4,)
    assert batch["labels"].is_floating_point()
    assert found.recipe.evaluation.metrics_for("regression") == ["pearson", "spearman"]


def test_several_labels_become_a_vector(recipes: dict[str, Any]) -> None:
    found = prepared(recipes["multi-label-classification"])
    assert set(found.labels.names) == set(TAGS)
    raw = json.loads(Path(found.recipe.data.train).read_text().splitlines()[0])
    expected = [float(name in raw["label"]) for name in found.labels.names]
    assert found.datasets["train"][0]["labels"] == expected
    assert found.collator([found.datasets["train"][n] for n in range(4)])["labels"].shape == (4, 3)


def test_a_language_model_gets_full_blocks_and_the_tokenizers_ids_only(recipes: dict[str, Any]) -> None:
    found = prepared(recipes["causal-lm"])
    assert set(map(len, found.datasets["train"]["input_ids"])) == {16}
    assert found.datasets["train"]["labels"][:] == found.datasets["train"]["input_ids"][:]
    assert found.labels.num_labels == 0
    assert found.vocabulary is not None
    assert found.vocabulary.identical
    assert found.pair.vocab_size == 60, "the teacher has 64 rows, 4 of which are no token"


@pytest.mark.parametrize("method", METHODS_WITH_A_TEACHER)
def test_a_student_padded_otherwise_is_compared_on_the_common_tokens(
    method: str, recipes: dict[str, Any], folders: dict[str, str]
) -> None:
    recipe = {**recipes["causal-lm"], "student": {"model": folders["lm-student"]}, "method": {"name": method}}
    found = prepared(recipe)
    assert (found.teacher_config.vocab_size, found.student_config.vocab_size) == (64, 72)
    assert found.pair.vocab_size == 60


# Cross-checks


@pytest.mark.parametrize("method", METHODS_WITH_A_TEACHER)
def test_other_tokens_are_refused_where_a_teacher_is_learned_from(
    method: str, recipes: dict[str, Any], folders: dict[str, str]
) -> None:
    recipe = {**recipes["sequence-classification"], "student": {"model": folders["other-words"]}}
    problem = only_problem({**recipe, "method": {"name": method}})
    assert "do not share a vocabulary" in problem
    assert "'w0' is 5 in the teacher, 59 in the student" in problem
    assert "student.num_blocks" in problem


def test_another_tokenizer_than_the_teachers_is_named_as_what_is_wrong(
    recipes: dict[str, Any], folders: dict[str, str]
) -> None:
    recipe = copy.deepcopy(recipes["sequence-classification"])
    recipe["data"]["tokenizer"] = folders["other-words"]
    problem = only_problem(recipe)
    assert problem.startswith("data.tokenizer is not the teacher's own (the tokenizers differ: ")
    assert "'w0' is 5 in the teacher, 59 in data.tokenizer" in problem
    assert problem.endswith("Leave it out.")


def test_other_tokens_are_fine_without_distillation(recipes: dict[str, Any], folders: dict[str, str]) -> None:
    recipe = {**recipes["sequence-classification"], "student": {"model": folders["other-words"]}}
    found = prepared({**recipe, "method": {"name": "none"}})
    assert found.vocabulary is not None
    assert not found.vocabulary.identical
    first = Path(found.recipe.data.train).read_text().splitlines()[0]
    word = json.loads(first)["text"].split()[0]
    assert found.datasets["train"][0]["input_ids"][1] == 59 - int(word[1:]), "the student's tokenizer is used"


def test_the_same_tokens_with_more_rows_are_fine(recipes: dict[str, Any], folders: dict[str, str]) -> None:
    found = prepared({**recipes["sequence-classification"], "student": {"model": folders["same-words"]}})
    assert found.vocabulary is not None
    assert found.vocabulary.identical
    assert found.pair.student_width == {"": 16}


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"name": "ild", "layer_map": [[1, 5]]}, ["teacher's layer", "is 5", "from 0 to 4"]),
        ({"name": "cka", "layer_map": [[3, 4]]}, ["student's layer", "is 3", "from 0 to 2"]),
        ({"name": "cka", "layer_map": [["encoder.1", 1]]}, ["encoder.1", "one stack"]),
        ({"name": "ild", "layer_map": "all_to_one", "all_to_one_target": 9}, ["all_to_one_target is 9", "0 to 4"]),
        ({"name": "ild", "projection": "identity"}, ["[16] wide", "[32]", "linear"]),
        ({"name": "ild", "weights": {"hidden": 0}}, ["weights.hidden is 0", "name: kd"]),
        ({"name": "cka", "logits_loss": "binary_kl"}, ["'binary_kl'", "'sequence-classification'"]),
    ],
)
def test_the_method_must_fit_the_pair(options: dict[str, Any], fragments: list[str], recipes: dict[str, Any]) -> None:
    problem = only_problem({**recipes["sequence-classification"], "method": options})
    assert problem.startswith("method.")
    for fragment in fragments:
        assert fragment in problem


def test_the_teachers_head_must_fit_the_labels(recipes: dict[str, Any], folders: dict[str, str]) -> None:
    recipe = {**recipes["sequence-classification"], "teacher": {"model": folders["five-labels"]}}
    problem = only_problem(recipe)
    assert "has 5 labels, the data has 3 (LABEL_0, LABEL_1, LABEL_2)" in problem
    assert "teacher.finetune" in problem
    tuned = prepared({**recipe, "teacher": {**recipe["teacher"], "finetune": {"max_steps": 1}}})
    assert tuned.labels.num_labels == 3, "a teacher that is fine-tuned first gets a new head"
    assert prepared({**recipe, "method": {"name": "none"}}).method.name == "none"


@pytest.mark.parametrize(
    ("task", "metric", "allowed"),
    [
        ("sequence-classification", "perplexity", "accuracy, f1, macro_f1, matthews"),
        ("regression", "accuracy", "pearson, spearman, mse"),
        ("causal-lm", "accuracy", "perplexity"),
        ("multi-label-classification", "matthews", "f1, macro_f1, accuracy"),
    ],
)
def test_metrics_must_fit_the_task(task: str, metric: str, allowed: str, recipes: dict[str, Any]) -> None:
    problem = only_problem(recipes[task], f"evaluation.metrics=[{metric}]")
    assert f"'{metric}' does not fit the task {task}; its metrics are: {allowed}." in problem


@pytest.mark.parametrize("section", ["training", "teacher.finetune"])
def test_evaluations_need_validation_data(section: str, recipes: dict[str, Any]) -> None:
    recipe = copy.deepcopy(recipes["sequence-classification"])
    del recipe["data"]["validation"]
    prepared(recipe)
    problem = only_problem(recipe, f"{section}.eval_strategy=epoch", f"{section}.max_steps=3")
    assert problem.startswith(f"{section}.eval_strategy asks for evaluations, but data.validation is missing.")
    problem = only_problem(recipe, f"{section}.eval_on_start=true", f"{section}.max_steps=3")
    assert problem.startswith(f"{section}.eval_on_start asks for evaluations, but data.validation is missing.")


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("lerning_rate", 1, "'learning_rate'"),
        ("learning_rate", "fast", "number"),
        ("output_dir", "x", "cannot be set"),
        ("seed", "abc", "whole number"),
        ("seed", -1, "whole number"),
        ("max_steps", 0, "positive"),
    ],
)
def test_the_teachers_own_training_is_checked_too(
    key: str, value: object, fragment: str, recipes: dict[str, Any]
) -> None:
    recipe = copy.deepcopy(recipes["sequence-classification"])
    recipe["teacher"]["finetune"] = {key: value}
    problem = only_problem(recipe)
    assert problem.startswith(f"teacher.finetune.{key}")
    assert fragment in problem


@pytest.mark.parametrize(
    ("student", "method", "fragment"),
    [
        ({"num_blocks": 2}, "kd", "to be cut out of it"),
        ({"num_blocks": 2}, "none", "to be cut out of it"),
        ({"model": "same-words"}, "kd", "the method 'kd' learns from one"),
    ],
)
def test_a_teacher_is_missing(
    student: dict[str, Any], method: str, fragment: str, recipes: dict[str, Any], folders: dict[str, str]
) -> None:
    recipe = {name: value for name, value in recipes["sequence-classification"].items() if name != "teacher"}
    student = {**student, "model": folders[student["model"]]} if "model" in student else student
    assert fragment in only_problem({**recipe, "student": student, "method": {"name": method}})


def test_without_a_teacher_a_model_is_only_fine_tuned(recipes: dict[str, Any], folders: dict[str, str]) -> None:
    recipe = {name: value for name, value in recipes["sequence-classification"].items() if name != "teacher"}
    found = prepared({**recipe, "student": {"model": folders["same-words"]}, "method": {"name": "none"}})
    assert found.teacher_config is None
    assert found.vocabulary is None
    assert found.pair.teacher_depth == {}


def test_problems_of_different_sections_come_together(recipes: dict[str, Any]) -> None:
    recipe = copy.deepcopy(recipes["sequence-classification"])
    recipe["data"] |= {"train": "./nowhere.jsonl", "validation": "./nowhere-too.jsonl"}
    recipe["teacher"] = {"model": "./no-model", "finetune": {"lerning_rate": 1}}
    recipe["evaluation"] = {"metrics": ["perplexity"]}
    problems = "\n".join(problems_of(recipe))
    for fragment in ("nowhere.jsonl", "nowhere-too.jsonl", "no-model", "finetune.lerning_rate", "perplexity"):
        assert fragment in problems
    assert len(problems_of(recipe)) == 5


def test_problems_between_models_and_data_come_together(recipes: dict[str, Any], folders: dict[str, str]) -> None:
    recipe = copy.deepcopy(recipes["sequence-classification"])
    recipe["teacher"] = {"model": folders["five-labels"]}
    recipe["method"] = {"name": "ild", "layer_map": [[1, 9]], "projection": "identity"}
    recipe["data"]["max_length"] = 500
    problems = problems_of(recipe)
    assert len(problems) == 4, problems
    for problem, fragment in zip(problems, ("5 labels", "is 9", "identity", "500"), strict=True):
        assert fragment in problem


def test_positions_after_the_padding_id_are_fewer_than_the_rows_of_the_table() -> None:
    roberta, bert = (tiny_model(family, max_position_embeddings=20) for family in ("roberta", "bert"))
    for model, expected in ((roberta, 19), (bert, 20)):
        assert positions(model.config) == expected
        model(**tiny_batch(model, batch=1, seq=expected))
        with pytest.raises((IndexError, RuntimeError)):
            model(**tiny_batch(model, batch=1, seq=expected + 1))
    assert positions(tiny_model("t5").config) is None, "relative positions have no end"
