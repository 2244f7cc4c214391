"""What the methods that match hidden states have in common: layer maps from a config, for each stack."""

from __future__ import annotations

from typing import Literal

import torch

from layerdistill.core.config import SectionConfig
from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, Pair, StackName
from layerdistill.matching import LayerMap, layer_map
from layerdistill.methods.logits_term import LogitsTerm
from layerdistill.methods.predictions import PredictionsConfig, logits_term, predictions_problems
from layerdistill.methods.task_term import TaskTerm
from layerdistill.methods.weights import HiddenWeights
from layerdistill.models.fast_dtype import fast_dtype

Strategy = Literal["forward", "reverse", "all_to_one", "random", "in_order_random", "average", "last", "skip"]
LayerName = int | str


class LayerMapConfig(SectionConfig):
    """Which student layer learns from which teacher layer."""

    layer_map: Strategy | list[tuple[LayerName, LayerName]] = "forward"
    """A strategy, or explicit [student, teacher] pairs; layer 0 is the embedding output, k the output of block k."""

    embeddings: bool = False
    """Whether the embedding outputs are matched too: the pair [0, 0] is added."""

    redraw: Literal["run", "epoch", "batch"] = "run"
    """How often the random strategies draw a new map."""

    all_to_one_target: int | None = None
    """The teacher layer of `all_to_one`; the middle one when left out."""

    reduce: Literal["mean", "sum"] = "mean"
    """Whether the pairs' losses are averaged or summed before they are multiplied by weights.hidden."""


class MatchedConfig(LayerMapConfig, PredictionsConfig):
    """The part of a recipe's method section that every hidden-state method has."""

    weights: HiddenWeights = HiddenWeights()
    """Coefficients of the three terms."""


class TokensConfig(MatchedConfig):
    """That of a method which compares hidden states token by token, so that their products cost something."""

    hidden_dtype: Literal["fast", "bfloat16"] | None = None
    """What hidden terms multiply in (projections, filters, CKA); fast: bfloat16 where this machine multiplies it
    natively, else null; null: as the student is trained. Sums and losses stay float32."""

    @property
    def products(self) -> torch.dtype | None:
        """The dtype of `hidden_dtype` on this machine, None to follow the training."""
        chosen = fast_dtype() if self.hidden_dtype == "fast" else self.hidden_dtype
        return torch.bfloat16 if chosen == "bfloat16" else None


def build_maps(config: LayerMapConfig, pair: Pair) -> list[LayerMap]:
    """Return one layer map per stack that the two models share; raises UserError for a layer out of range."""
    if set(pair.student_depth) != set(pair.teacher_depth):
        raise UserError(
            f"The student has {stack_names(pair.student_depth)}, the teacher {stack_names(pair.teacher_depth)}: hidden "
            " states are matched stack by stack. Choose a student with the teacher's kind of architecture."
        )
    bare = [list(names) for names in explicit_pairs(config) if "" not in pair.student_depth and not stack_of(names[0])]
    if bare:
        raise UserError(
            f"The pairs {bare} do not name their stack. In an encoder-decoder model write encoder.3, decoder.3."
        )
    return [
        layer_map(
            pairs_of_stack(config.layer_map, stack),
            student_layers=pair.student_depth[stack],
            teacher_layers=pair.teacher_depth[stack],
            seed=pair.seed,
            embeddings=config.embeddings,
            redraw=config.redraw,
            all_to_one_target=config.all_to_one_target,
            stack=stack,
        )
        for stack in pair.student_depth
        if pairs_of_stack(config.layer_map, stack)
    ]


def pairs_of_stack(
    given: Strategy | list[tuple[LayerName, LayerName]], stack: StackName
) -> Strategy | list[tuple[int | str, int | str]]:
    """Return a strategy as it is, and of explicit pairs those of one stack (all of them where there is only one)."""
    if isinstance(given, str):
        return given
    return [pair for pair in given if not stack or stack_of(pair[0]) == stack]


def explicit_pairs(config: LayerMapConfig) -> list[tuple[LayerName, LayerName]]:
    """Return the pairs that a config lists, none for a strategy."""
    return [] if isinstance(config.layer_map, str) else config.layer_map


def stack_of(name: LayerName) -> StackName:
    """Return the stack that a layer's name says, `""` for a bare number."""
    return LayerRef.parse(name).stack


def stack_names(depths: object) -> str:
    """Return `one stack` or the stacks' names for a message."""
    names = [name for name in depths if name]  # type: ignore[attr-defined]
    return " and ".join(names) if names else "one stack"


def prediction_terms(config: MatchedConfig, pair: Pair) -> list[TaskTerm | LogitsTerm]:
    """Return the task and logits terms whose weight is not 0."""
    terms: list[TaskTerm | LogitsTerm] = []
    if config.weights.task:
        terms.append(TaskTerm(pair.task, config.weights.task))
    if config.weights.logits:
        terms.append(logits_term(config, pair, config.weights.logits))
    return terms


def matched_problems(config: MatchedConfig, pair: Pair) -> list[str]:
    """Return why a hidden-state method cannot work on this pair: layer map, logits loss, or nothing to learn."""
    problems = predictions_problems(config, pair)
    if not config.weights.hidden:
        problems.append("method.weights.hidden is 0, which makes this method plain kd. Write name: kd instead.")
    try:
        build_maps(config, pair)
    except UserError as error:
        problems.extend(f"method.layer_map: {problem}" for problem in error.problems)
    return problems
