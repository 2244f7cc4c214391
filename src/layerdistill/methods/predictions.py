"""What every method that learns from the teacher's predictions can be told about them, and the term made of it."""

from __future__ import annotations

from pydantic import Field

from layerdistill.core.config import SectionConfig
from layerdistill.core.types import Pair
from layerdistill.methods.logits_term import LogitsLoss, LogitsTerm, logits_loss_problem, top_k_problem


class PredictionsConfig(SectionConfig):
    """The part of a recipe's method section that is about predictions."""

    temperature: float = Field(2.0, gt=0)
    """Divides the logits of both models; the loss is multiplied by its square."""

    logits_loss: LogitsLoss | None = None
    """Distance between predictions; forward_kl, or binary_kl (multi-label) or mse (regression), when left out."""

    logits_top_k: int | None = Field(None, ge=1)
    """How many of a language model's likeliest tokens are compared, all others as one; all of them when left out."""


def logits_term(config: PredictionsConfig, pair: Pair, weight: float) -> LogitsTerm:
    """Return the term on predictions that a config describes."""
    return LogitsTerm(pair.task, weight, config.logits_loss, config.temperature, pair.vocab_size, config.logits_top_k)


def predictions_problems(config: PredictionsConfig, pair: Pair) -> list[str]:
    """Return one sentence per reason why the loss on predictions does not fit the task."""
    found = [
        logits_loss_problem(config.logits_loss, pair.task),
        top_k_problem(config.logits_top_k, config.logits_loss, pair.task, pair.vocab_size),
    ]
    return [problem for problem in found if problem]
