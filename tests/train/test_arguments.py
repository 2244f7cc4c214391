"""Training arguments: transformers' own fields under their own names, checked before anything is loaded."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

import layerdistill as ld
from layerdistill.core.types import Stage
from layerdistill.train.arguments import training_problems
from layerdistill.train.config import RESERVED, build_arguments, field_names
from layerdistill.train.stage import StageInput, stage_arguments

SENSIBLE: dict[str, Any] = {
    "max_steps": 100, "num_train_epochs": 1.5, "per_device_train_batch_size": 8, "learning_rate": 5e-4,
    "warmup_steps": 0.1, "weight_decay": 0, "lr_scheduler_type": "cosine", "optim": "adamw_torch", "bf16": True,
    "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "save_steps": 0.5,
    "eval_strategy": "steps", "eval_steps": 10, "report_to": ["none"], "term_gradient_steps": 0,
    "max_grad_norm": 1, "gradient_accumulation_steps": 4, "dataloader_num_workers": 0,
    "train_sampling_strategy": "group_by_length",
}  # fmt: skip


def test_what_makes_sense_is_accepted() -> None:
    assert training_problems({}) == []
    assert training_problems(SENSIBLE) == []
    for name, value in SENSIBLE.items():
        assert (
            training_problems({name: value} if name != "eval_steps" else {name: value, "eval_strategy": "steps"}) == []
        )


def test_every_field_of_transformers_is_known() -> None:
    theirs = {field.name for field in fields(TrainingArguments) if field.init}
    assert theirs - set(field_names()) == set(RESERVED)
    assert set(field_names()) - theirs == {"term_gradient_steps", "padding_free"}


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        ({"lerning_rate": 1}, ["training.lerning_rate", "Did you mean 'learning_rate'?"]),
        ({"fp17": True}, ["training.fp17"]),
        ({"output_dir": "x"}, ["training.output_dir cannot be set", "`output`"]),
        ({"seed": 1}, ["training.seed cannot be set", "`seed`"]),
        ({"resume_from_checkpoint": "x"}, ["resumes by itself"]),
        ({"learning_rate": "5e-4"}, ["training.learning_rate is '5e-4'", "number"]),
        ({"learning_rate": True}, ["training.learning_rate is True", "number"]),
        ({"learning_rate": 0}, ["training.learning_rate is 0", "greater than 0"]),
        ({"learning_rate": float("nan")}, ["training.learning_rate is nan", "greater than 0"]),
        ({"max_steps": 20.0}, ["training.max_steps is 20.0", "integer"]),
        ({"max_steps": None}, ["training.max_steps is None", "integer"]),
        ({"max_steps": 0}, ["training.max_steps is 0", "positive"]),
        ({"per_device_train_batch_size": -1}, ["per_device_train_batch_size is -1", "greater than 0"]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps is 0", "greater than 0"]),
        ({"num_train_epochs": -1.5}, ["num_train_epochs is -1.5", "greater than 0"]),
        ({"bf16": "yes"}, ["training.bf16 is 'yes'", "boolean"]),
        ({"lr_scheduler_type": "cosin"}, ["training", "cosin"]),
        ({"optim": "adamm"}, ["training", "adamm"]),
        ({"load_best_model_at_end": True}, ["training: transformers refuses"]),
        ({"bf16": True, "fp16": True}, ["fp16"]),
        ({"label_smoothing_factor": 0.1}, ["training.label_smoothing_factor cannot be set", "the loss on the labels"]),
        ({"neftune_noise_alpha": 5}, ["training.neftune_noise_alpha cannot be set", "teacher's states"]),
        ({"save_only_model": True}, ["training.save_only_model cannot be set", "go on from its checkpoints"]),
        ({"report_to": "tensorbord"}, ["'tensorbord'", "Installed: none, all"]),
        ({"train_sampling_strategy": "by_length"}, ["'by_length'", "random, group_by_length"]),
    ],
)
def test_a_mistake_is_one_sentence(given: dict[str, Any], fragments: list[str]) -> None:
    problems = training_problems(given)
    assert len(problems) == 1, problems
    for fragment in fragments:
        assert fragment in problems[0]


def test_mistakes_come_together_and_under_the_name_of_their_section() -> None:
    problems = training_problems({"lerning_rate": 1, "seed": 2, "max_steps": "x"}, place="teacher.finetune")
    assert [problem.split()[0] for problem in problems] == [
        "teacher.finetune.lerning_rate", "teacher.finetune.seed", "teacher.finetune.max_steps",
    ]  # fmt: skip


def test_numbers_out_of_range_come_together() -> None:
    problems = training_problems({"learning_rate": -1, "max_steps": 0, "per_device_eval_batch_size": 0})
    assert len(problems) == 3


def test_our_defaults_and_what_a_recipe_changes() -> None:
    arguments = build_arguments({"learning_rate": 1e-3}, "somewhere", 5)
    assert isinstance(arguments, ld.LayerDistillationConfig)
    assert (arguments.output_dir, arguments.seed, arguments.learning_rate) == ("somewhere", 5, 1e-3)
    assert arguments.report_to == []
    assert (arguments.logging_steps, arguments.save_steps, arguments.save_total_limit) == (50, 500, 1)
    assert arguments.logging_nan_inf_filter is False
    assert arguments.term_gradient_steps == 200
    plain = TrainingArguments(output_dir="somewhere", use_cpu=True)
    assert arguments.weight_decay == plain.weight_decay, "everything else is transformers' own default"
    assert arguments.lr_scheduler_type == plain.lr_scheduler_type


def test_the_best_checkpoint_and_the_newest_are_both_kept() -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    assert build_arguments(best, "somewhere", 5).save_total_limit == 2
    assert build_arguments({**best, "save_total_limit": 3}, "somewhere", 5).save_total_limit == 3


def stage_input(training: Any) -> StageInput:
    return StageInput("causal-lm", {}, None, None, training, 5, Path("run"), None)  # type: ignore[arg-type]


def test_a_stage_changes_what_it_says_and_nothing_else() -> None:
    stage = Stage("one", None, None, {"learning_rate": 0.5})  # type: ignore[arg-type]
    made = stage_arguments(stage_input({"learning_rate": 1e-3, "max_steps": 7}), stage, Path("folder"))
    assert (made.learning_rate, made.max_steps, made.output_dir, made.seed) == (0.5, 7, "folder", 5)
    assert made.remove_unused_columns is False
    given = TrainingArguments(output_dir="theirs", use_cpu=True, max_steps=7, seed=9)
    before = copy.deepcopy(given.to_dict())
    made = stage_arguments(stage_input(given), stage, Path("folder"))
    assert (made.learning_rate, made.max_steps, made.output_dir, made.seed) == (0.5, 7, "folder", 9)
    assert given.to_dict() == before, "what the caller passed is left alone"
