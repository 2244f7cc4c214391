"""LoRAILD: LoRA's down-projections of teacher and student, matched layer by layer, then merged into the student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from layerdistill.core.errors import UserError
from layerdistill.core.needs import needs_during
from layerdistill.core.types import Needs, Pair, RunContext, Stage, StagePreview
from layerdistill.matching import LayerMap
from layerdistill.methods.adapter_term import AdapterTerm
from layerdistill.methods.curriculum import AFTER, BEFORE, Curriculum, CurriculumConfig, ScheduledTerm, too_late
from layerdistill.methods.matched import LayerMapConfig, LayerName, Strategy, build_maps
from layerdistill.methods.predictions import PredictionsConfig, logits_term, predictions_problems
from layerdistill.methods.task_term import TaskTerm
from layerdistill.methods.weights import HiddenWeights
from layerdistill.models.adapters import (
    adapted_layers,
    add_adapters,
    count_adapter_parameters,
    merge_adapters,
    train_adapters_and_head,
)
from layerdistill.models.projections import BlockProjections, find_projections

NO_ADAPTERS = (
    "lora_ild compares the student's adapters with the teacher's, and the teacher has none. Have it fine-tuned with "
    "them (teacher.finetune: {{..., lora: {{rank: {rank}}}}}), name a LoRA folder of peft (teacher.adapters), or take "
    "them out of a full fine-tuning (teacher.finetune and method.teacher_adapters: svd); in Python pass a PeftModel. "
    "Without them only the control is possible, weights: {{hidden: 0}}."
)


class LoraIldWeights(HiddenWeights):
    """The coefficients of the released code."""

    task: float = Field(1 / 3, ge=0)
    """Multiplies the loss on the labels."""

    logits: float = Field(1 / 3, ge=0)
    """Multiplies the loss between the two models' logits (already multiplied by temperature squared)."""

    hidden: float = Field(1 / 3, ge=0)
    """Multiplies the loss between the adapters; 0 leaves it out (the KD-only control with the same architecture)."""


class LoraIldConfig(PredictionsConfig):
    """`method: {name: lora_ild, ...}`."""

    name: Literal["lora_ild"] = "lora_ild"

    rank: PositiveInt = 32
    """Rank of the adapters; the teacher's must be equal."""

    alpha: PositiveFloat | None = None
    """`alpha / rank` multiplies the student's B A; null is twice the rank."""

    dropout: float = Field(0.05, ge=0, lt=1)
    """Share of the inputs of the student's A that is set to 0 while training."""

    train: Literal["full", "adapters"] = "full"
    """full: the student's weights and its adapters; adapters: these and the task's head, the rest is frozen."""

    layer_map: Strategy | list[tuple[LayerName, LayerName]] = "forward"
    """A strategy, or explicit [student, teacher] pairs; layer k means the projections of block k, from 1."""

    redraw: Literal["run", "epoch", "batch"] = "run"
    """How often the random strategies draw a new map."""

    all_to_one_target: int | None = None
    """The teacher layer of `all_to_one`; the middle one when left out."""

    normalise: Literal["concatenation", "layer", "none"] = "concatenation"
    """What is divided by its length per token: all pairs together, each pair, or nothing (the distance is then not
    squared)."""

    include_padding: bool = False
    """Whether positions of padding count too, as in the released code."""

    teacher_adapters: Literal["lora", "svd"] = "lora"
    """lora: the teacher's own; svd: the best approximation of this rank to what its full fine-tuning did."""

    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both models; the loss is multiplied by its square."""

    weights: LoraIldWeights = LoraIldWeights()
    """Coefficients of the three terms, where there is no curriculum."""

    curriculum: CurriculumConfig = CurriculumConfig()
    """When the loss between the adapters begins."""

    @property
    def compares_adapters(self) -> bool:
        """Whether the loss between the adapters ever counts."""
        return self.curriculum.start is not None or self.weights.hidden > 0


class LoraIntermediateLayerDistillation:
    """Knowledge distillation plus the distance between LoRA A outputs of matched blocks; merged at the end.

    Source: Suzuki, Yamada and Tokunaga 2025 (doi 10.18653/v1/2025.insights-1.10) and its released code. Deviations:
    padding does not count; the temperature divides logits, not probabilities; no learning rate of its own for the
    curriculum, which the released code never applied.
    """

    name = "lora_ild"
    summary = "kd plus LoRA down-projections matched layer by layer; merged, nothing is thrown away"
    Config = LoraIldConfig
    one_stage = False
    grows_student = False

    def stages(self, pair: Pair, config: LoraIldConfig, context: RunContext) -> Iterator[Stage]:
        """One stage with the adapters in the student, which are merged after it."""
        if problems := self.problems(config, pair):
            raise UserError(*problems)
        terms = build_terms(config, pair, context.epochs)
        trained = {parameter: parameter.requires_grad for parameter in pair.student.parameters()}
        alpha = 2.0 * config.rank if config.alpha is None else config.alpha
        add_adapters(pair.student, config.rank, alpha, config.dropout, pair.seed)
        if config.train == "adapters":
            train_adapters_and_head(pair.student)
        else:
            restore_gradients(trained)
        yield Stage("distill", pair.student, nn.ModuleList(terms), stock=False)
        merge_adapters(pair.student)
        restore_gradients(trained)

    def preview(self, pair: Pair, config: LoraIldConfig) -> list[StagePreview]:
        """The one stage, with what the adapters add while it lasts."""
        if problems := self.problems(config, pair):
            raise UserError(*problems)
        added = count_adapter_parameters(pair.student, config.rank)
        count = sum(len(block) for blocks in find_projections(pair.student).values() for block in blocks)
        notes = [
            f"Adapters of rank {config.rank} on {count} projections of the student: {added:,} parameters while "
            "training, merged into it at the end: it has none more than before. No mapping is thrown away."
        ]
        asks = partial(asked, config, pair)
        return [StagePreview("distill", describe_terms(config), adapter_maps(config, pair), notes=notes, asks=asks)]

    def problems(self, config: LoraIldConfig, pair: Pair) -> list[str]:
        """A loss or a map that does not fit, weights beside a curriculum, or adapters that cannot be compared."""
        problems = predictions_problems(config, pair)
        if config.curriculum.start is not None and config.weights != LoraIldWeights():
            problems.append(
                "method.weights and method.curriculum.start are both given, but a curriculum has coefficients of its "
                "own. Leave one out."
            )
        if not any(config.weights.model_dump().values()):
            problems.append("method.weights are all 0, so nothing would be learned. Give one of them a number above 0.")
        try:
            maps = adapter_maps(config, pair)
        except UserError as error:
            return problems + [f"method.layer_map: {problem}" for problem in error.problems]
        return problems + (adapter_problems(config, pair, maps) if config.compares_adapters else [])


def restore_gradients(trained: Mapping[nn.Parameter, bool]) -> None:
    """Let the parameters train that did before: peft freezes all but its own."""
    for parameter, flag in trained.items():
        parameter.requires_grad_(flag)


def adapter_maps(config: LoraIldConfig, pair: Pair) -> list[LayerMap]:
    """Return the map of each stack, none where adapters are not compared; raises UserError for layers without any."""
    if not config.compares_adapters:
        return []
    maps = build_maps(
        LayerMapConfig(layer_map=config.layer_map, redraw=config.redraw, all_to_one_target=config.all_to_one_target),
        pair,
    )
    for layer_map in maps:
        for student, teachers in layer_map.groups:
            if min(student, *teachers) < 1:
                raise UserError(
                    "the embedding output (0) and 'final' have no projections, so they have no adapters. Name layers "
                    "from 1: layer k means the projections of block k."
                )
    return maps


def adapter_problems(config: LoraIldConfig, pair: Pair, maps: list[LayerMap]) -> list[str]:
    """Return why the two models' adapters cannot be compared, as far as the models are known."""
    adapters = pair.teacher_adapters
    if not adapters:
        return [NO_ADAPTERS.format(rank=config.rank)]
    ranks = sorted({len(matrix) for matrix in adapters.values()})
    if ranks != [config.rank]:
        theirs = ", ".join(map(str, ranks))
        return [
            f"method.rank is {config.rank}, but the teacher's adapters have rank {theirs}. They are compared number by "
            f"number: write method.rank: {ranks[0]}, or make the teacher's of rank {config.rank}."
        ]
    if pair.teacher is None:
        return []
    try:
        if adapted_layers(pair.student):
            return ["The student has LoRA adapters already. Merge them first (merge_and_unload) and pass the result."]
        return pairing_problems(pair, maps)
    except UserError as error:
        return list(error.problems)


def pairing_problems(pair: Pair, maps: list[LayerMap]) -> list[str]:
    """Return why the projections of matched blocks are not alike, or lack an adapter in the teacher."""
    assert pair.teacher is not None and pair.teacher_adapters is not None, "adapter_problems() has seen to it"
    ours, theirs = find_projections(pair.student), find_projections(pair.teacher)
    for layer_map in maps:
        kinds = [next(iter(blocks[layer_map.stack])) for blocks in (ours, theirs)]
        if set(kinds[0]) != set(kinds[1]):
            return [
                f"The student's projections are {named(kinds[0])}, the teacher's {named(kinds[1])}: an adapter of one "
                "matrix for all three cannot be compared with three. Take a student of the teacher's architecture."
            ]
        blocks = theirs[layer_map.stack]
        if bare := [path for block in blocks for path in block.values() if path not in pair.teacher_adapters]:
            return [
                f"The teacher has no adapter at {bare[0]} ({len(bare)} such projections): its query, key and value "
                "projections need one in every block. Fine-tune it with LoRA on all of them."
            ]
    return []


def named(block: BlockProjections) -> str:
    """Return the last names of a block's projections for a message."""
    return ", ".join(path.rpartition(".")[2] for path in block.values())


def build_terms(config: LoraIldConfig, pair: Pair, epochs: int) -> list[nn.Module]:
    """Return the terms that ever count; raises UserError for a curriculum that begins after the training."""
    curriculum = None
    if (start := config.curriculum.start) is not None:
        if problem := too_late(start, epochs):
            raise UserError(problem)
        curriculum = Curriculum(start, config.curriculum.shape, config.curriculum.mode, epochs)
    weights = config.weights if curriculum is None else LoraIldWeights(task=1.0, logits=1.0, hidden=1.0)
    terms: list[Any] = []
    if weights.task:
        terms.append(TaskTerm(pair.task, weights.task))
    if weights.logits:
        terms.append(logits_term(config, pair, weights.logits))
    if weights.hidden:
        assert pair.teacher is not None and pair.teacher_adapters is not None, "problems() has seen to it"
        terms.append(
            AdapterTerm(
                adapter_maps(config, pair), find_projections(pair.student), find_projections(pair.teacher),
                pair.teacher_adapters, weights.hidden, config.normalise, config.include_padding,
            )
        )  # fmt: skip
    return terms if curriculum is None else [ScheduledTerm(term, curriculum) for term in terms]


def asked(config: LoraIldConfig, pair: Pair, epochs: int, steps_per_epoch: int) -> Needs:
    """Return what is read of the teacher during the training."""
    return needs_during(build_terms(config, pair, epochs), epochs, steps_per_epoch)


def describe_terms(config: LoraIldConfig) -> list[str]:
    """Return the terms with what they are multiplied by, at the start and after a curriculum."""
    curriculum = config.curriculum
    if curriculum.start is None:
        return [f"{weight:g} × {name}" for name, weight in config.weights.model_dump().items() if weight]
    after = AFTER[curriculum.mode]
    how = (
        f"from epoch {curriculum.start}" if curriculum.shape == "sharp" else f"by and by from epoch {curriculum.start}"
    )
    return [f"{BEFORE[name]:g} × {name} ({after[name]:.3g} {how})" for name in BEFORE]


METHOD = LoraIntermediateLayerDistillation()
