"""The table of tasks: which model class, which labels and which metrics each has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerdistill.core.errors import UserError, did_you_mean
from layerdistill.core.types import Unit

LabelKind = Literal["class", "classes", "number", "tokens"]
"""One class id, any number of class ids, one finite number, or the text's own tokens."""

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""The words of `transformers` for `config.problem_type`."""


@dataclass(frozen=True)
class Task:
    """What the rest of the project must know of a task.

    `auto_class` names a class of `transformers`. `problem_type` goes into the model's config (None: language model).
    `unit` is what the task loss counts: examples, or labelled positions. `text_columns` is how many text columns an
    example may have at most.
    """

    name: str
    auto_class: str
    label_kind: LabelKind
    problem_type: ProblemType | None
    default_metrics: tuple[str, ...]
    allowed_metrics: tuple[str, ...]
    unit: Unit
    text_columns: int = 2


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sequence-classification",
            auto_class="AutoModelForSequenceClassification",
            label_kind="class",
            problem_type="single_label_classification",
            default_metrics=("accuracy", "macro_f1"),
            allowed_metrics=("accuracy", "f1", "macro_f1", "matthews"),
            unit="example",
        ),
        Task(
            name="multi-label-classification",
            auto_class="AutoModelForSequenceClassification",
            label_kind="classes",
            problem_type="multi_label_classification",
            default_metrics=("f1", "macro_f1"),
            allowed_metrics=("accuracy", "f1", "macro_f1"),
            unit="example",
        ),
        Task(
            name="regression",
            auto_class="AutoModelForSequenceClassification",
            label_kind="number",
            problem_type="regression",
            default_metrics=("pearson", "spearman"),
            allowed_metrics=("pearson", "spearman", "mse"),
            unit="example",
        ),
        Task(
            name="causal-lm",
            auto_class="AutoModelForCausalLM",
            label_kind="tokens",
            problem_type=None,
            default_metrics=("perplexity",),
            allowed_metrics=("perplexity",),
            unit="label",
            text_columns=1,
        ),
    )
}
"""Every task that works, by the name a recipe gives it."""


def get_task(name: str) -> Task:
    """Return the task of that name; raises UserError that lists what is supported."""
    if name in TASKS:
        return TASKS[name]
    raise UserError(
        f"data.task is {name!r}, which is not supported. Supported: {', '.join(TASKS)}.{did_you_mean(name, TASKS)}"
    )
