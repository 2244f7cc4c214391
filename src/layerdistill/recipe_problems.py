"""What is wrong between the sections of a recipe, each of which may be right by itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Sized
from typing import Any

from transformers import PreTrainedConfig

from layerdistill.data import DataConfig, LabelSpace, VocabularyCheck
from layerdistill.data.labels import made_up_names
from layerdistill.evaluate import f1_problems
from layerdistill.methods.curriculum import too_late
from layerdistill.recipe import Recipe
from layerdistill.train.arguments import training_problems
from layerdistill.train.config import LayerDistillationConfig, count_epochs

NAMES_SHOWN = 5
"""How many classes a message lists."""

logger = logging.getLogger(__name__)


def section_problems(recipe: Recipe) -> list[str]:
    """Return what is wrong between sections whatever the models and the data hold."""
    problems = []
    cut_out = recipe.student is None or not recipe.student.model
    if recipe.teacher is None and recipe.method.name != "none" and not cut_out:
        problems.append(
            f"teacher is missing: the method {recipe.method.name!r} learns from one. Add teacher: {{model: ...}}."
        )
    if recipe.teacher is not None and recipe.teacher.architecture is not None and recipe.data.tokenizer is None:
        problems.append("data.tokenizer is missing: a teacher.architecture has no tokenizer of its own. Name a folder.")
    if recipe.teacher is None and cut_out:
        problems.append("teacher is missing: the student is to be cut out of it. Add it, or give student.model.")
    if recipe.teacher is not None and recipe.teacher.finetune is not None:
        problems += training_problems(finetune_arguments(recipe), place="teacher.finetune")
        seed = recipe.teacher.finetune.get("seed", 0)
        if type(seed) is not int or not 0 <= seed < 2**32:
            problems.append(f"teacher.finetune.seed is {seed!r}: it must be a whole number from 0 to 2**32 - 1.")
    return [*problems, *stream_problems(recipe)] if recipe.data.streaming else problems


def strategy_problems(recipe: Recipe) -> list[str]:
    """Return which training asks for evaluations on the way, of a recipe without data to evaluate on."""
    finetune = (recipe.teacher.finetune if recipe.teacher is not None else None) or {}
    return [
        f"{place}.{name} asks for evaluations, but data.validation is missing. Add it."
        for place, given in (("training", recipe.training), ("teacher.finetune", finetune))
        for name, none in (("eval_strategy", "no"), ("eval_on_start", False))
        if given.get(name, none) != none
    ]


def stream_problems(recipe: Recipe) -> list[str]:
    """Return what cannot be done with training data that are a stream."""
    problems = []
    if not recipe.training.get("max_steps", -1) > 0:
        problems.append("training.max_steps is missing: data.streaming is true, and a stream has no end. Add it.")
    if recipe.teacher is not None and recipe.teacher.finetune is not None:
        problems.append(
            "teacher.finetune passes over all training data, but data.streaming is true. Fine-tune the teacher in a "
            "recipe of its own, on data that fit into memory, or without layerdistill."
        )
    if recipe.student is not None and recipe.student.vocabulary == "trimmed":
        problems.append(
            "student.vocabulary is 'trimmed', which counts the tokens of all training data, but data.streaming is "
            "true. Write vocabulary: full, or leave data.streaming out."
        )
    return problems


def order_problems(model: PreTrainedConfig, labels: LabelSpace, whose: str, data: DataConfig) -> list[str]:
    """Return whether a trained head has the data's classes in another order."""
    theirs = [name.casefold() for name in class_names(model)]
    if not labels.named or set(theirs) != {name.casefold() for name in labels.names}:
        return []
    ordered = sorted(labels.names, key=lambda name: theirs.index(name.casefold()))
    if ordered == list(labels.names):
        return []
    return [
        f"The head of {whose} has the classes in another order ({', '.join(ordered)}) than the data "
        f"({', '.join(labels.names)}), so that each would be taken for another. {reordering(data, ordered)}"
    ]


def warn_of_other_names(model: PreTrainedConfig, labels: LabelSpace, whose: str) -> None:
    """Say that a trained head and the data call the classes differently: then numbers decide which is which."""
    theirs = class_names(model)
    bare = theirs == made_up_names(len(theirs))
    if not labels.named or bare or len(theirs) != labels.num_labels or len(theirs) < 2:
        return
    if {name.casefold() for name in theirs} != {name.casefold() for name in labels.names}:
        logger.warning(
            "%s calls its classes %s, the data call them %s: they are taken for each other in this order.",
            f"{whose[0].upper()}{whose[1:]}",
            ", ".join(theirs[:NAMES_SHOWN]),
            ", ".join(labels.names[:NAMES_SHOWN]),
        )


def vocabulary_problems(vocabulary: VocabularyCheck, cut_out: bool) -> list[str]:
    """Return why teacher and student (`cut_out` of it, or one of its own) cannot read the same tokens."""
    if vocabulary.identical:
        return []
    if cut_out:  # the student reads what the teacher reads: it is the recipe that brings another tokenizer
        reason = vocabulary.reason.replace("the student", "data.tokenizer")
        return [f"data.tokenizer is not the teacher's own ({reason}). Leave it out."]
    return [
        f"Teacher and student do not share a vocabulary ({vocabulary.reason}), so their inputs differ and neither "
        "logits nor hidden states can be compared. Take a student with the teacher's tokenizer, or cut one out of the "
        "teacher (student.num_blocks)."
    ]


def evaluation_problems(recipe: Recipe, labels: LabelSpace, positions: int | None) -> list[str]:
    """Return what the evaluation at the end could not measure on these classes, or on models of so many positions."""
    section = recipe.evaluation
    problems = f1_problems(section.metrics, labels.num_labels) if recipe.data.task == "sequence-classification" else []
    if section.cost and section.latency_seq is not None and positions is not None and section.latency_seq > positions:
        problems.append(
            f"evaluation.latency_seq is {section.latency_seq}, but the models have {positions} positions. Give a value "
            f"from 1 to {positions}."
        )
    return problems


def reordering(data: DataConfig, names: list[str]) -> str:
    """Return how the data's classes come into the order of `names`, which depends on what makes their order now."""
    if len(data.label_columns) > 1:
        return "Give the columns of data.label, and data.label_names if there are any, in the first order."
    if data.label_names is None:  # words, or numbers with names that are stored with the data
        # Quoted: in YAML a bare yes is true and a bare 2 a number. JSON is YAML, too.
        return f"Write data.label_names: {json.dumps(names, ensure_ascii=False)}."
    return (
        "If the labels in the data are words, give data.label_names in the first order. If they are numbers, or lists "
        "of 0 and 1, data.label_names only says what they mean: bring the data themselves into the first order."
    )


def class_names(model: PreTrainedConfig) -> tuple[str, ...]:
    """Return what a configuration calls its classes, in the order of their ids."""
    named: dict[Any, Any] = model.id2label or {}
    return tuple(str(named[number]) for number in sorted(named))


def finetune_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the teacher's own training arguments, without its seed, which is not the recipe's, and its adapters."""
    assert recipe.teacher is not None and recipe.teacher.finetune is not None
    return {name: value for name, value in recipe.teacher.finetune.items() if name not in ("seed", "lora")}


def curriculum_problems(recipe: Recipe, arguments: LayerDistillationConfig, train: Any) -> list[str]:
    """Return whether the method's curriculum begins after the training; one over a stream is one pass."""
    start = getattr(getattr(recipe.method, "curriculum", None), "start", None)
    passes = count_epochs(len(train), lambda name: getattr(arguments, name)) if isinstance(train, Sized) else 1
    problem = too_late(start, passes)
    return [problem] if problem is not None else []


def head_problems(recipe: Recipe, teacher: PreTrainedConfig | None, labels: LabelSpace) -> list[str]:
    """Return why the teacher's head does not fit the labels (a teacher that is fine-tuned first gets a new one)."""
    if teacher is None or recipe.teacher is None or recipe.teacher.finetune is not None:
        return []
    if recipe.data.task == "causal-lm":
        return []
    if teacher.num_labels == labels.num_labels:
        return order_problems(teacher, labels, f"the teacher {recipe.teacher.name}", recipe.data)
    if recipe.method.name == "none":
        return []
    return [
        f"The head of the teacher {recipe.teacher.name} has {teacher.num_labels} labels, the data has "
        f"{labels.num_labels} ({', '.join(labels.names or ())[:80]}). Take a teacher made for this task, or have it "
        "fine-tuned first: teacher.finetune: {num_train_epochs: 3}."
    ]
