"""The `evaluation` section of a recipe, and which metrics fit which task."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, field_validator

from layerdistill.core.config import SectionConfig
from layerdistill.core.errors import UserError, did_you_mean, one_of

TASK_METRICS: dict[str, tuple[str, ...]] = {
    "sequence-classification": ("accuracy", "f1", "macro_f1", "matthews"),
    "multi-label-classification": ("f1", "macro_f1", "accuracy"),
    "regression": ("pearson", "spearman", "mse"),
    "causal-lm": ("perplexity",),
}
"""The metrics that mean something for a task."""

DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "sequence-classification": ("accuracy", "macro_f1"),
    "multi-label-classification": ("f1", "macro_f1", "accuracy"),
    "regression": ("pearson", "spearman"),
    "causal-lm": ("perplexity",),
}
"""The metrics of a task when the recipe names none; the first is the one shown where there is room for one."""

LOWER_IS_BETTER = frozenset({"mse", "perplexity"})
"""Metrics that fall as a model gets better; all others rise."""

LATENCY_SEQ_CAP = 128
"""Tokens; the length at which cost is measured when the recipe's texts may be longer and nothing else is asked for."""


class EvaluationConfig(SectionConfig):
    """What is measured on the finished student and on its teacher."""

    metrics: list[str] | None = None
    """Metric names; none given means the task's own."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per forward, at most; it changes the speed, never the result."""
    cost: bool = True
    """Measure parameters, multiply-accumulates, peak memory and size on disk."""
    latency: bool = True
    """Also measure the time of a forward (a few seconds per model and batch size); needs `cost`."""
    latency_batch_sizes: tuple[int, ...] = Field(default=(1, 32), min_length=1)
    """Examples per timed forward; peak memory is measured at the largest."""
    latency_seq: int | None = Field(default=None, ge=1)
    """Tokens per example in the cost measurements; none given means `data.max_length`, at most 128."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, given: list[str] | None) -> list[str] | None:
        known = sorted({name for names in TASK_METRICS.values() for name in names})
        unknown = [one_of("metric", name, known) for name in given or () if name not in known]
        if unknown:
            raise ValueError(" ".join(unknown))
        if given == []:
            raise ValueError("the list of metrics is empty; leave `metrics` out to get the task's own.")
        return given

    @field_validator("latency_batch_sizes")
    @classmethod
    def _positive(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        if min(given) < 1:
            raise ValueError(f"a batch needs at least one example, but latency_batch_sizes is {list(given)}.")
        return given

    def metrics_for(self, task: str) -> list[str]:
        """Return the metrics to compute on `task`; raises UserError when a chosen one does not fit it."""
        problems = metric_problems(self.metrics, task)
        if problems:
            raise UserError(*problems)
        return list(self.metrics if self.metrics is not None else DEFAULT_METRICS[task])

    def seq_for(self, max_length: int) -> int:
        """Return the tokens per example of the cost measurements for texts of at most `max_length` tokens."""
        return self.latency_seq if self.latency_seq is not None else min(max_length, LATENCY_SEQ_CAP)


def f1_problems(names: Sequence[str] | None, classes: int) -> list[str]:
    """Return whether `f1` is asked of more than two classes (not of several labels each)."""
    if "f1" not in (names or ()) or classes <= 2:
        return []
    return [
        f"metric 'f1' is the F1 of label 1 among two classes, but there are {classes} classes. Use 'macro_f1', "
        "the mean over the classes, or 'accuracy'."
    ]


def metric_problems(names: Sequence[str] | None, task: str) -> list[str]:
    """Return one sentence for every name that does not fit `task` (none of them when `names` is None)."""
    if task not in TASK_METRICS:
        return [one_of("the task to evaluate", task, list(TASK_METRICS))]
    allowed = TASK_METRICS[task]
    return [
        f"metric {name!r} does not fit the task {task}; its metrics are: {', '.join(allowed)}."
        f"{did_you_mean(name, allowed)}"
        for name in names or ()
        if name not in allowed
    ]
