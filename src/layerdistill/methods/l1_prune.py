"""Structured L1 pruning: the attention heads and feed-forward neurons with the smallest weights are really removed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import Pair, RunContext, Stage, StagePreview
from layerdistill.methods import kd
from layerdistill.methods.predictions import PredictionsConfig, predictions_problems
from layerdistill.methods.preview import preview_stages
from layerdistill.methods.weights import LogitsWeights
from layerdistill.models.narrow import Units, count_units, lowest, remove_units, score_heads, score_neurons

TOLERANCE = 0.01
"""How far from the parameters asked for the result may be, as a share of them."""


class RecoveryWeights(LogitsWeights):
    """Coefficients of the training after pruning."""

    task: float = Field(0.5, ge=0)
    """Multiplies the loss on the labels."""

    logits: float = Field(0.5, ge=0)
    """Multiplies the loss between the two models' logits (already multiplied by temperature squared)."""


class L1PruneConfig(PredictionsConfig):
    """`method: {name: l1_prune, removed: 0.3, ...}`."""

    name: Literal["l1_prune"] = "l1_prune"

    parameters: PositiveInt | None = None
    """How many parameters the student is to have, met within 1 %; give this or `removed`."""

    removed: float | None = Field(None, gt=0, lt=1)
    """Share of all the teacher's parameters that is to go, 0.3 for 30 %; give this or `parameters`."""

    heads: bool = True
    """Whether attention heads are removed."""

    neurons: bool = True
    """Whether feed-forward neurons are removed."""

    recovery: bool = True
    """Whether the pruned student is trained afterwards, on the labels and the teacher's predictions."""

    weights: RecoveryWeights = RecoveryWeights()
    """Coefficients of the recovery's two terms."""

    @model_validator(mode="after")
    def _says_how_much_of_what(self) -> L1PruneConfig:
        if (self.parameters is None) == (self.removed is None):
            raise ValueError(
                "give method.parameters (what the student is to have) or method.removed (the share that goes, such as "
                "0.3), and not both"
            )
        if not self.heads and not self.neurons:
            raise ValueError("heads and neurons are both false, so nothing could be removed: leave one of them true")
        return self


@dataclass(frozen=True)
class Removal:
    """How many groups of heads and how many neurons every block loses, and the parameters that are left."""

    heads: int
    neurons: int
    parameters: int


def find_removal(units: Units, config: L1PruneConfig) -> Removal:
    """Return how much every block loses so that the model gets as many parameters as `config` asks for.

    For every number of heads, the number of neurons that comes nearest to the target is taken; of those within 1 % of
    it, the one that removes the most equal shares of heads and of neurons; of equals, the nearest to the target.
    At least one head and one neuron stay. Raises UserError when no such number exists.
    """
    target = config.parameters
    if target is None:
        assert config.removed is not None, "the config has seen to it"
        target = round((1 - config.removed) * units.parameters)
    found = []
    for heads in range(units.heads if config.heads else 1):
        too_many = units.parameters_without(heads, 0) - target
        neurons = round(too_many / units.parameters_per_neuron) if config.neurons else 0
        neurons = min(max(neurons, 0), units.neurons - 1)
        parameters = units.parameters_without(heads, neurons)
        uneven = abs(heads / units.heads - neurons / units.neurons) if config.heads and config.neurons else 0.0
        found.append((uneven, abs(parameters - target), Removal(heads, neurons, parameters)))
    good = [one for one in found if one[1] <= TOLERANCE * target and one[2].parameters < units.parameters]
    if good:
        return min(good, key=lambda one: one[:2])[2]
    fewest = units.parameters_without(
        units.heads - 1 if config.heads else 0, units.neurons - 1 if config.neurons else 0
    )
    nearest = min(found, key=lambda one: one[1])[2]
    raise UserError(
        f"A student of {target:,} parameters cannot be reached within {TOLERANCE:.0%} by removing "
        f"{what_goes(config)}: the model has {units.parameters:,}, and {fewest:,} with one of each left in every "
        f"block; the nearest that can be reached is {nearest.parameters:,}. Change method.parameters or method.removed."
    )


def what_goes(config: L1PruneConfig) -> str:
    """Return `heads and neurons`, or the one that is removed."""
    return " and ".join(word for word in ("heads", "neurons") if getattr(config, word))


def choose_lowest(student: nn.Module, removal: Removal) -> dict[str, list[list[int]]]:
    """Return, for every block, the groups of heads and the neurons with the lowest scores; ready for JSON."""
    return {
        "heads": [lowest(score, removal.heads) for score in score_heads(student)],
        "neurons": [lowest(score, removal.neurons) for score in score_neurons(student)],
    }


def describe(units: Units, removal: Removal, stock: bool) -> str:
    """Return what is removed, and what the student then is, in two sentences."""
    shared = f" (each with its {units.queries_per_head} heads of queries)" if units.queries_per_head > 1 else ""
    kind = (
        "an ordinary checkpoint"
        if stock
        else "saved with a modelling file, because its configuration cannot say how many heads are left"
    )
    return (
        f"Every block loses {removal.heads} of {units.heads} heads{shared} and {removal.neurons:,} of "
        f"{units.neurons:,} feed-forward neurons. The student is {kind}."
    )


class L1Prune:
    """Remove whole heads and neurons with the smallest L1 norm, the same number from every block; then train, or not.

    The score of a head is the sum of |w| over its slices of W_Q, W_K, W_V and W_O, that of a neuron the sum of |w| into
    it and out of it (Li et al. 2017, https://arxiv.org/abs/1608.08710, ranks whole filters by L1 norm). The baseline
    "structured L1" of ISKD (https://aclanthology.org/2025.coling-main.440) is named in its README; its granularity,
    amount and training were not found, so these are ours. Deviation from masking (torch's `ln_structured`): nothing is
    masked, the tensors get smaller.
    """

    name = "l1_prune"
    summary = "heads and neurons with the smallest weights removed, with or without training afterwards"
    Config = L1PruneConfig
    one_stage = False
    grows_student = True

    def stages(self, pair: Pair, config: L1PruneConfig, context: RunContext) -> Iterator[Stage]:
        """Prune; then one stage of knowledge distillation from the whole teacher, or none at all."""
        units = count_units(pair.student)
        removal = find_removal(units, config)
        chosen = context.decide(self.name, lambda: choose_lowest(pair.student, removal))
        stock = remove_units(pair.student, chosen["heads"], chosen["neurons"])
        context.say(describe(units, removal, stock))
        if config.recovery:
            yield recovery_stage(pair, config, stock)

    def preview(self, pair: Pair, config: L1PruneConfig) -> list[StagePreview]:
        """What is left after pruning, and the recovery if there is one."""
        units = count_units(pair.student)
        removal = find_removal(units, config)
        student = copy.deepcopy(pair.student)
        first = [[list(range(number))] * units.blocks for number in (removal.heads, removal.neurons)]
        stock = remove_units(student, *first)
        said: dict[str, Any] = {
            "student_parameters": removal.parameters,
            "notes": [describe(units, removal, stock)],
        }
        if not config.recovery:
            return [StagePreview("prune", ["no training"], training=None, **said)]
        return [replace(stage, **said) for stage in preview_stages([recovery_stage(pair, config, stock)])]

    def problems(self, config: L1PruneConfig, pair: Pair) -> list[str]:
        """A loss that does not fit the task, a recovery that learns nothing, or a size that cannot be reached."""
        problems = []
        if config.recovery:
            problems += predictions_problems(config, pair)
            if not config.weights.task and not config.weights.logits:
                problems.append("method.weights are all 0, so the recovery would learn nothing. Write recovery: false.")
        if any(True for _ in pair.student.parameters()):
            try:
                find_removal(count_units(pair.student), config)
            except UserError as error:
                problems += error.problems
        return problems


def recovery_stage(pair: Pair, config: L1PruneConfig, stock: bool) -> Stage:
    """Return the one stage after pruning: kd, with the recovery's weights."""
    said = {name: getattr(config, name) for name in PredictionsConfig.model_fields}
    settings = kd.KdConfig(weights=config.weights, **said)
    distill = next(kd.METHOD.stages(pair, settings))
    return replace(distill, name="recover", stock=stock)


METHOD = L1Prune()
