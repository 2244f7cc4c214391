"""Which transformers class, labels and loss kind each task means."""

from __future__ import annotations

import copy
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from layerdistill.core.errors import UserError, one_of
from layerdistill.models.own_code import class_to_open, own_description
from layerdistill.models.shrink import build_on_meta

TASK_CLASSES: dict[str, Any] = {
    "base": transformers.AutoModel,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "multi-label-classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "causal-lm": transformers.AutoModelForCausalLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
}
"""Task -> the class that opens a checkpoint with the head for it."""

PROBLEM_TYPES: dict[str, Any] = {
    "sequence-classification": "single_label_classification",
    "multi-label-classification": "multi_label_classification",
    "regression": "regression",
}
"""Task -> the `problem_type` by which transformers chooses a classifier's loss."""


def class_for(task: str) -> Any:
    """Return the transformers class of a task; raises UserError for an unknown one."""
    if task not in TASK_CLASSES:
        raise UserError(one_of("task", task, list(TASK_CLASSES)))
    return TASK_CLASSES[task]


def set_task(config: PretrainedConfig, task: str, num_labels: int | None = None) -> None:
    """Write the task's loss kind and its number of labels into `config` (None keeps it; 1 in regression)."""
    if num_labels is None and task == "regression":
        num_labels = 1
    if num_labels is not None:
        config.num_labels = num_labels
    config.problem_type = PROBLEM_TYPES.get(task)


def empty_model(config: PretrainedConfig, task: str = "base", num_labels: int | None = None) -> PreTrainedModel:
    """Return the model of a configuration with the head for `task`, on the meta device: shapes without memory.

    `config` is left as it is. Raises UserError for an unknown task and for a configuration that cannot be built.
    """
    config = copy.deepcopy(config)
    set_task(config, task, num_labels)
    opened = class_to_open(class_for(task), config)
    return build_on_meta(config, opened if own_description(config) else opened.from_config)
