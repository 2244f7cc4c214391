"""The table of tasks: which labels each has and what its loss counts (metrics: `evaluate.config`)."""

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

    `problem_type` goes into the model's config (None: language model).
    `unit` is what the task loss counts: examples, or labelled positions. `text_columns` is how many text columns an
    example may have at most.
    """

    name: str
    label_kind: LabelKind
    problem_type: ProblemType | None
    unit: Unit
    text_columns: int = 2


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sequence-classification",
            label_kind="class",
            problem_type="single_label_classification",
            unit="example",
        ),
        Task(
            name="multi-label-classification",
            label_kind="classes",
            problem_type="multi_label_classification",
            unit="example",
        ),
        Task(
            name="regression",
            label_kind="number",
            problem_type="regression",
            unit="example",
        ),
        Task(
            name="causal-lm",
            label_kind="tokens",
            problem_type=None,
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
