"""The loss between the two models' predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import IGNORED_LABEL, Batch, Mean, Needs, Progress, Signal, TopK, TopTokens, Unit
from layerdistill.matching import (
    binary_kl,
    forward_kl,
    js_divergence,
    logit_mse,
    next_token_labels,
    reverse_kl,
    soft_cross_entropy,
    top_k_divergence,
)
from layerdistill.matching.logits import Divergence
from layerdistill.matching.task_loss import label_unit
from layerdistill.matching.vocabulary_loss import VocabularyPart

LogitsLoss = Literal["forward_kl", "reverse_kl", "js_divergence", "soft_cross_entropy", "binary_kl", "mse"]

CATEGORICAL: dict[str, Callable[..., Mean]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js_divergence": js_divergence,
    "soft_cross_entropy": soft_cross_entropy,
}


def default_logits_loss(task: str) -> LogitsLoss:
    """Return the loss that fits the task's outputs: one distribution, one per class, or plain numbers."""
    if task == "regression":
        return "mse"
    return "binary_kl" if task == "multi-label-classification" else "forward_kl"


def logits_loss_problem(loss: LogitsLoss | None, task: str) -> str | None:
    """Return why `loss` does not fit `task`, or None."""
    if loss is None or loss == default_logits_loss(task) or loss == "mse":
        return None
    if task in ("regression", "multi-label-classification") or loss == "binary_kl":
        return (
            f"method.logits_loss is {loss!r}, which does not fit the task {task!r}: a softmax over one regression "
            "output is always 1, so its KL is silently 0, and a softmax over independent labels compares the wrong "
            f"distributions. Leave it out ({default_logits_loss(task)!r} is then used) or write 'mse'."
        )
    return None


def top_k_problem(top_k: int | None, loss: LogitsLoss | None, task: str, vocab_size: int | None) -> str | None:
    """Return why the teacher's `top_k` likeliest tokens cannot stand for its predictions, or None."""
    if top_k is None:
        return None
    if task != "causal-lm":
        return f"method.logits_top_k is {top_k}, but the task {task!r} has no tokens to predict. Leave it out."
    if loss is not None and loss not in CATEGORICAL:
        return (
            f"method.logits_top_k is {top_k}, but the logits_loss {loss!r} compares numbers, not probabilities. Leave "
            f"one of them out, or choose of {', '.join(CATEGORICAL)}."
        )
    if vocab_size is not None and top_k >= vocab_size:
        return f"method.logits_top_k is {top_k}, but there are {vocab_size} tokens. Choose fewer, or leave it out."
    return None


class LogitsTerm(nn.Module):
    """The distance between student and teacher predictions; named `logits`.

    For language models it is taken at the positions that have a label, so prompts and padding do not count. With
    `top_k` it is that between the teacher's so many likeliest tokens and all others together (see `matching.top_k`).
    """

    name = "logits"

    def __init__(
        self,
        task: str,
        weight: float,
        loss: LogitsLoss | None,
        temperature: float,
        vocab_size: int | None = None,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        problem = logits_loss_problem(loss, task) or top_k_problem(top_k, loss, task, vocab_size)
        if problem is not None:
            raise UserError(problem)
        self.task = task
        self.weight = weight
        self.loss = loss or default_logits_loss(task)
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.top = None if top_k is None else TopK(top_k, temperature, vocab_size)

    def needs(self, progress: Progress) -> Needs:
        """The logits of both, or in place of the teacher's its likeliest tokens."""
        top = frozenset() if self.top is None else frozenset({self.top})
        return Needs(teacher_logits=self.top is None, student_logits=True, teacher_top=top)

    def vocabulary_part(self, progress: Progress) -> VocabularyPart | None:
        """The divergence, in language modelling; none for `mse`."""
        if self.task != "causal-lm" or self.loss not in CATEGORICAL:
            return None
        return VocabularyPart("logits", cast(Divergence, self.loss), self.temperature, self.vocab_size, self.top)

    def unit(self, name: str) -> Unit:
        """Labelled positions or examples."""
        return label_unit(self.task)

    def coefficient(self, name: str, progress: Progress) -> float:
        """The weight, at all times."""
        return self.weight

    def forward(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        """Return `{"logits": distance}`."""
        assert student.logits is not None and teacher is not None
        if self.top is not None:
            return {self.name: self._of_likeliest(student.logits, teacher.top[self.top], batch)}
        assert teacher.logits is not None
        ours, theirs, mask = student.logits, teacher.logits, None
        if self.task == "causal-lm":
            mask = next_token_labels(batch["labels"]) != IGNORED_LABEL
        if self.loss == "mse":
            return {self.name: logit_mse(ours, theirs, mask, vocab_size=self.vocab_size)}
        if self.loss == "binary_kl":
            return {self.name: binary_kl(ours, theirs, temperature=self.temperature)}
        distance = CATEGORICAL[self.loss]
        return {self.name: distance(ours, theirs, mask, temperature=self.temperature, vocab_size=self.vocab_size)}

    def _of_likeliest(self, logits: Tensor, teacher: TopTokens, batch: Batch) -> Mean:
        assert self.top is not None
        return top_k_divergence(
            logits,
            teacher,
            next_token_labels(batch["labels"]) != IGNORED_LABEL,
            divergence=cast(Divergence, self.loss),
            temperature=self.temperature,
            vocab_size=self.vocab_size,
        )
