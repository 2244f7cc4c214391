"""Iterative layer-wise pruning: remove the least important blocks, repair next to the hole, rank anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field, PositiveInt
from torch import nn

from layerdistill.core.config import SectionConfig
from layerdistill.core.errors import UserError
from layerdistill.core.needs import needs_during
from layerdistill.core.types import Pair, RunContext, Stage, StagePreview
from layerdistill.data import CalibrationConfig
from layerdistill.methods.preview import describe_term
from layerdistill.methods.prune_ranking import Importance, candidates, choose, rounds
from layerdistill.methods.prune_repair import (
    RepairConfig,
    RepairWeights,
    hole_positions,
    neighbours,
    only_training,
    repair_map,
    repair_terms,
)
from layerdistill.models import count_parameters, find_stacks, shrink_config
from layerdistill.models.remove_blocks import remove_blocks
from layerdistill.models.shrink import build_on_meta
from layerdistill.signals.skip import skipped


class LayerPruneConfig(SectionConfig):
    """`method: {name: layer_prune, ...}`; give either `num_removed` or `num_blocks`."""

    name: Literal["layer_prune"] = "layer_prune"

    num_removed: PositiveInt | None = None
    """How many blocks go."""

    num_blocks: PositiveInt | None = None
    """How many blocks are left."""

    importance: Importance = "one_out_loss"
    """What ranks the blocks; one_out_loss, one_out_kl and task_metric run the model once without each of them."""

    iterative: bool = True
    """Whether the blocks left are ranked anew after every removal (and repair); false ranks once, removes all, repairs
    once."""

    per_round: PositiveInt = 1
    """Blocks removed in one round of an iterative run."""

    calibration: CalibrationConfig = CalibrationConfig()
    """The rows that importance is measured on, taken out of the training data."""

    repair: RepairConfig = RepairConfig()
    """What trains after each removal."""

    loss: Literal["normalised", "paper"] = "normalised"
    """normalised: KL averaged over tokens, squared differences divided by the teacher's mean square; paper: KL summed
    over the tokens of a micro-batch / 100 at temperature 1, plain mean squared differences."""

    temperature: float | None = Field(None, gt=0)
    """Divides the logits of both models; 2 when left out. Not with loss: paper, which has 1."""

    count_padding: bool = False
    """Whether padding counts like real tokens, as in the released code; with loss: paper only."""

    weights: RepairWeights = RepairWeights()
    """Coefficients of the terms; hidden multiplies every squared difference (one per hole, and the final one)."""


class LayerPruning:
    """Rounds of: rank the student's blocks, remove the least important, train the neighbours against the whole teacher.

    Kovalev and Tikhomirov, "Iterative Layer-wise Distillation" (https://arxiv.org/abs/2511.05085), from their abstract
    and released code. Deviations: the ranking is made on rows held out from the training data, where they rank by the
    seven tasks that they also report; the default loss does not depend on the batch's size; padding does not count.
    With `repair: {scope: none}` and one-shot `block_influence` it is ShortGPT (https://arxiv.org/abs/2403.03853).
    """

    name = "layer_prune"
    summary = "whole blocks removed one by one, the least important first, with repair beside each hole"
    Config = LayerPruneConfig
    one_stage = False
    grows_student = True

    def stages(self, pair: Pair, config: LayerPruneConfig, context: RunContext) -> Iterator[Stage]:
        """One repair stage per round; none with `repair: {scope: none}`, where the rounds happen all the same."""
        student: Any = pair.student
        depth = pair.teacher_depth[""]
        names = getattr(student.config, "original_layer_ids", None) or list(range(depth))
        kept = list(range(depth))
        plan = rounds(removed_in_all(config, depth), config.per_round, config.iterative)
        for number, count in enumerate(plan, start=1):
            found = context.decide(
                f"round-{number}", partial(choose, config.importance, count, tuple(kept), pair, context)
            )
            remove_blocks(student, found["removed"])
            kept = found["kept_original"]
            student.config.original_layer_ids = [names[block] for block in kept]
            context.say(describe_round(number, len(plan), found))
            if config.repair.scope != "none":
                yield from self.repair(number, found["removed"], kept, pair, config)
            metrics = context.decide(f"round-{number}-evaluation", partial(context.evaluate, student))
            scores = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if value is not None)
            context.say(f"Round {number}: {len(kept)} blocks left; {scores or 'no validation data to evaluate on'}.")
        total = candidates(config.importance, depth, plan)
        context.say(f"One-out candidates evaluated in all: {total}.")

    def repair(
        self, number: int, removed: Sequence[int], kept: Sequence[int], pair: Pair, config: LayerPruneConfig
    ) -> Iterator[Stage]:
        """The stage after a removal, during which only the scope's blocks train."""
        holes = hole_positions(removed)
        matched = repair_map(holes, kept, pair.teacher_depth[""])
        scope = neighbours(holes, len(kept), config.repair.radius) if config.repair.scope == "neighbours" else None
        with only_training(pair.student, scope):
            yield Stage(f"repair-{number}", pair.student, terms_of(pair, config, matched))

    def preview(self, pair: Pair, config: LayerPruneConfig) -> list[StagePreview]:
        """One entry per round, with the parameters that are left after it."""
        depth = pair.teacher_depth[""]
        plan = rounds(removed_in_all(config, depth), config.per_round, config.iterative)
        previews = []
        for number, count in enumerate(plan, start=1):
            before = depth - sum(plan[: number - 1])
            left = before - count
            matched = repair_map([left], range(left), depth)
            training = config.repair.scope != "none"
            terms = terms_of(pair, config, matched)
            measured = candidates(config.importance, before, [count])
            how = f"{measured} candidates, each without one block" if measured else "one pass over all blocks"
            previews.append(
                StagePreview(
                    f"repair-{number}" if training else f"round-{number}",
                    [describe_term(term) for term in terms] if training else ["no training"],
                    student_parameters=parameters_left(pair.student, left),
                    training={} if training else None,
                    notes=[f"Before it, {count} of {before} blocks are removed by {config.importance} ({how})."],
                    asks=partial(needs_during, terms) if training else None,
                    chosen_later=True,
                )
            )
        return previews

    def problems(self, config: LayerPruneConfig, pair: Pair) -> list[str]:
        """A number of blocks that cannot be removed, a criterion or a loss that does not fit, or nothing to learn."""
        if set(pair.teacher_depth) != {""}:
            return ["layer_prune works on models with one stack of blocks; this teacher has an encoder and a decoder."]
        problems = [*depth_problems(config, pair.teacher_depth[""]), *loss_problems(config, pair.task)]
        return problems or block_problems(config, pair)


def removed_in_all(config: LayerPruneConfig, depth: int) -> int:
    """Return how many blocks go, whichever way the config says it."""
    if config.num_removed is not None:
        return config.num_removed
    return depth - config.num_blocks if config.num_blocks is not None else 0


def terms_of(pair: Pair, config: LayerPruneConfig, matched: Any) -> nn.ModuleList:
    """Return the terms of one repair stage."""
    return repair_terms(pair, config.weights, matched, config.loss, config.temperature, config.count_padding)


def parameters_left(model: Any, depth: int) -> int:
    """Return the parameters of a model of this class with so many blocks, without building its weights."""
    smaller = shrink_config(model.config, depth, copy_map="first")
    return count_parameters(build_on_meta(smaller, type(model)))["total"]


def describe_round(number: int, count: int, found: dict[str, Any]) -> str:
    """Return what a round decided, in one sentence."""
    least = ", ".join(f"{found['scores'][block]:.4g}" for block in found["removed"])
    equal = " They are all equal, so the criterion told nothing and the lowest block went." * (
        len(set(found["scores"])) == 1 < len(found["scores"])
    )
    return (
        f"Round {number} of {count}: of blocks 0 to {len(found['scores']) - 1} removed {listed(found['removed'])} "
        f"(block {listed(found['removed_original'])} of the teacher); {found['importance']} {least}, "
        f"{found['candidates_evaluated']} candidates evaluated.{equal}"
    )


def listed(blocks: Sequence[int]) -> str:
    """Return numbers with commas between them."""
    return ", ".join(map(str, blocks))


def depth_problems(config: LayerPruneConfig, depth: int) -> list[str]:
    """Return why so many blocks cannot be removed, or not in such rounds."""
    if depth < 2:
        return ["layer_prune removes blocks, but the teacher has only one. Take a deeper teacher."]
    if (config.num_removed is None) == (config.num_blocks is None):
        given = "neither" if config.num_removed is None else "both"
        return [f"method has {given} of num_removed and num_blocks: say with one of them how many blocks go or stay."]
    removed = removed_in_all(config, depth)
    if not 1 <= removed < depth:
        name = "num_removed" if config.num_removed is not None else "num_blocks"
        value = config.num_removed if config.num_removed is not None else config.num_blocks
        return [f"method.{name} is {value}, but the teacher has {depth} blocks: give 1 to {depth - 1}."]
    if config.per_round > 1 and not config.iterative:
        return ["method.per_round belongs to iterative: true; with iterative: false all blocks go at once. Leave it."]
    if config.per_round > removed:
        return [f"method.per_round is {config.per_round}, but only {removed} blocks go. Give at most that."]
    return []


def block_problems(config: LayerPruneConfig, pair: Pair) -> list[str]:
    """Return why blocks of the student cannot be found, left out for a trial, or removed; nothing without models."""
    if pair.teacher is None:
        return []
    student: Any = pair.student
    depth = pair.student_depth[""]
    try:
        find_stacks(student)
        shrink_config(student.config, depth - removed_in_all(config, depth), copy_map="first")
        if candidates(config.importance, depth, [1]):
            with skipped(student, [depth - 1]):
                pass
    except UserError as error:
        return list(error.problems)
    return []


def loss_problems(config: LayerPruneConfig, task: str) -> list[str]:
    """Return why the criterion or the repair's loss does not fit."""
    problems = []
    if config.importance == "task_metric" and task == "causal-lm":
        problems.append(
            "method.importance is 'task_metric', but the only metric of causal-lm is perplexity, which ranks blocks as "
            "the loss does. Write importance: one_out_loss."
        )
    if config.repair.scope != "neighbours" and config.repair.radius != 1:
        problems.append("method.repair.radius belongs to scope: neighbours. Leave it out, or change the scope.")
    if config.loss == "paper" and config.temperature not in (None, 1.0):
        problems.append(f"method.temperature is {config.temperature}, but loss: paper has 1. Leave it out.")
    if config.loss == "paper" and task in ("regression", "multi-label-classification"):
        problems.append(f"method.loss is 'paper', a KL over classes, which does not fit {task}. Write normalised.")
    if config.count_padding and config.loss != "paper":
        problems.append("method.count_padding belongs to loss: paper. Leave it out.")
    weights = config.weights
    if config.repair.scope != "none" and not (weights.task or weights.logits or weights.hidden):
        problems.append("All of method.weights are 0, so there is nothing to learn. Write repair: {scope: none}.")
    return problems


METHOD = LayerPruning()
