"""Frozen embeddings: the tables outside the blocks keep their values, and everything else trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from tiny_models import tiny_model
from toy_recipe import toy_recipe
from transformers import AutoModelForSequenceClassification

from layerdistill.models import StudentConfig, freeze_embeddings
from layerdistill.prepare import Prepared, prepare
from layerdistill.recipe import load_recipe
from layerdistill.runner import load_student_model, run

QUIET = Console(quiet=True)

TABLES = {
    "bert": {"word_embeddings", "position_embeddings", "token_type_embeddings"},
    "gpt2": {"wte", "wpe"},
    "qwen3": {"embed_tokens"},
    "modernbert": {"tok_embeddings"},
    "deberta-v2": {"word_embeddings", "rel_embeddings"},
    "bart": {"shared", "embed_positions"},
    "t5": {"shared"},
}


def prepare_of(recipe: dict[str, Any]) -> Prepared:
    return prepare(load_recipe(recipe))


@pytest.mark.parametrize("family", TABLES)
def test_tables_outside_the_blocks_are_frozen_and_nothing_else(family: str) -> None:
    model = tiny_model(family)
    freeze_embeddings(model)
    frozen = {name.split(".")[-2] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == TABLES[family]


def test_an_output_matrix_tied_to_the_table_is_the_table() -> None:
    tied, untied = (tiny_model("gpt2", "causal-lm", tie_word_embeddings=tie) for tie in (True, False))
    for model in (tied, untied):
        freeze_embeddings(model)
    assert not tied.lm_head.weight.requires_grad
    assert untied.lm_head.weight.requires_grad


@pytest.mark.parametrize("init", ["random", "copy"])
def test_a_run_moves_everything_but_the_tables(init: str, tmp_path: Path) -> None:
    student = {"num_blocks": 2, "init": init, "freeze_embeddings": True}
    recipe = toy_recipe(tmp_path, "kd", student=student, evaluation={"cost": False})
    recipe["training"] = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.1}
    prepared = prepare_of(recipe)
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher")
    start = load_student_model(prepared, teacher).state_dict()
    result = run(recipe, console=QUIET)
    ended = AutoModelForSequenceClassification.from_pretrained(result.student).state_dict()
    still = {name for name in start if torch.equal(start[name], ended[name])}
    tables = {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    # The bias of the keys adds the same to every score of a query, which the softmax does not see.
    assert tables <= still <= tables | {name for name in start if name.endswith("key.bias")}
    assert len(start) > 40


def test_a_pretrained_student_can_be_frozen_too(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "kd")
    recipe["student"] = {"model": str(tmp_path / "teacher"), "freeze_embeddings": True}
    student = load_student_model(prepare_of(recipe), None)
    assert not student.bert.embeddings.word_embeddings.weight.requires_grad
    assert student.bert.embeddings.LayerNorm.weight.requires_grad


def test_it_is_no_shape() -> None:
    with pytest.raises(ValidationError, match="student is empty"):
        StudentConfig(freeze_embeddings=True)
    assert StudentConfig(num_blocks=2).freeze_embeddings is False
