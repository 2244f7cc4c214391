"""Knowledge distillation from the teacher's predictions (Hinton, Vinyals and Dean 2015, https://arxiv.org/abs/1503.02531)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn

from layerdistill.core.types import Pair, RunContext, Stage, StagePreview
from layerdistill.methods.predictions import PredictionsConfig, logits_term, predictions_problems
from layerdistill.methods.preview import preview_stages
from layerdistill.methods.task_term import TaskTerm
from layerdistill.methods.weights import LogitsWeights


class KdConfig(PredictionsConfig):
    """`method: {name: kd, ...}`."""

    name: Literal["kd"] = "kd"

    weights: LogitsWeights = LogitsWeights()
    """Coefficients of the two terms."""


class KnowledgeDistillation:
    """Weighted sum of the loss on the labels and T squared times the KL from the teacher's softened predictions.

    Deviation from the paper: the weights are named and independent, not a convex combination.
    """

    name = "kd"
    summary = "knowledge distillation from the teacher's predictions"
    Config = KdConfig
    one_stage = True
    grows_student = False

    def stages(self, pair: Pair, config: KdConfig, context: RunContext | None = None) -> Iterator[Stage]:
        """One stage with the task and logits terms whose weight is not 0."""
        terms: list[nn.Module] = []
        if config.weights.task:
            terms.append(TaskTerm(pair.task, config.weights.task))
        if config.weights.logits:
            terms.append(logits_term(config, pair, config.weights.logits))
        yield Stage("distill", pair.student, nn.ModuleList(terms))

    def preview(self, pair: Pair, config: KdConfig) -> list[StagePreview]:
        """The one stage."""
        return preview_stages(self.stages(pair, config))

    def problems(self, config: KdConfig, pair: Pair) -> list[str]:
        """A loss that does not fit the task, or no logits term at all."""
        problems = predictions_problems(config, pair)
        if not config.weights.logits:
            problems.append("method.weights.logits is 0, which makes kd plain fine-tuning. Write name: none instead.")
        return problems


METHOD = KnowledgeDistillation()
