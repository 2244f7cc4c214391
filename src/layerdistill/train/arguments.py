"""Checks of a recipe's training section against transformers' own TrainingArguments, before anything is loaded."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from transformers.integrations import get_available_reporting_integrations

from layerdistill.core.errors import UserError, did_you_mean, one_of
from layerdistill.train.config import RESERVED, LayerDistillationConfig, build_arguments, field_names


def training_problems(training: dict[str, Any], place: str = "training") -> list[str]:
    """Return one sentence per unknown, reserved or wrongly typed field, then what transformers says of the rest."""
    names = field_names()
    problems = []
    for name, value in training.items():
        if name in RESERVED:
            problems.append(f"{place}.{name} cannot be set: {RESERVED[name]}.")
        elif name not in names:
            problems.append(
                f"{place}.{name} is not a field of transformers.TrainingArguments.{did_you_mean(name, names)}"
            )
        else:
            problems += [f"{place}.{name} is {value!r}: {reason}." for reason in type_problems(name, value)]
    if problems:
        return problems
    problems = range_problems(training, place)
    if not problems:
        try:
            build_arguments(training, output_dir=".", seed=0)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            problems.append(f"{place}: transformers refuses these arguments: {error}")
    return problems


SAMPLING = ("random", "group_by_length", "sequential", "batch_rebalance")
"""Orders of the training data that transformers knows; it takes any other word for the first."""

POSITIVE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
)


def range_problems(training: dict[str, Any], place: str) -> list[str]:
    """Return a sentence per number that no training can use (transformers accepts some of them silently)."""
    problems = [
        f"{place}.{name} is {training[name]}: it must be greater than 0."
        for name in POSITIVE
        if name in training and not training[name] > 0
    ]
    if "learning_rate" in training and not training["learning_rate"] > 0:
        problems.append(f"{place}.learning_rate is {training['learning_rate']}: it must be greater than 0.")
    if "max_steps" in training and training["max_steps"] == 0:
        problems.append(f"{place}.max_steps is 0: give a positive number, or leave it out to train by epochs.")
    strategy = training.get("train_sampling_strategy", "group_by_length")
    if strategy not in SAMPLING:
        problems.append(one_of(f"{place}.train_sampling_strategy", strategy, SAMPLING))
    trackers = training.get("report_to", "none")
    known = ["none", "all", *get_available_reporting_integrations()]
    for tracker in [trackers] if isinstance(trackers, str) else trackers or []:
        if tracker not in known:
            problems.append(
                f"{place}.report_to names {tracker!r}, which is not installed here or is no tracker. Installed: "
                f"{', '.join(known)}.{did_you_mean(str(tracker), known)}"
            )
    if training.get("fp16") and not torch.accelerator.is_available():
        problems.append(f"{place}.fp16 is true, but there is no accelerator here. Write bf16: true, or leave both out.")
    return problems


@contextmanager
def explained_arguments() -> Iterator[None]:
    """Turn transformers' refusal of training arguments, inside the block, into a UserError."""
    try:
        yield
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"training: transformers refuses these arguments: {error}") from error


@cache
def field_types() -> dict[str, Any]:
    """Return the declared type of every field."""
    return typing.get_type_hints(LayerDistillationConfig)


def type_problems(name: str, value: Any) -> list[str]:
    """Return what is wrong with a value's type; fields whose type pydantic cannot check are left to transformers."""
    try:
        adapter = TypeAdapter(field_types()[name])
    except (PydanticUserError, PydanticSchemaGenerationError):
        return []
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        return [item["msg"] for item in error.errors()[:1]]
    return []
