"""ISKD: block after block of a model is replaced by a smaller one that learns inside it.

Musaeus and van der Goot, COLING 2025 (https://aclanthology.org/2025.coling-main.440).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from layerdistill.core.errors import UserError
from layerdistill.core.needs import needs_during
from layerdistill.core.types import Pair, RunContext, Stage, StagePreview
from layerdistill.matching import layer_map, masked_mse
from layerdistill.methods.hidden_term import HiddenTerm
from layerdistill.methods.iskd_config import IskdConfig
from layerdistill.methods.iskd_order import block_order, order_problem
from layerdistill.methods.mixed_block import FitTerm, ReplacementSchedule
from layerdistill.methods.predictions import logits_term, predictions_problems
from layerdistill.methods.preview import describe_term
from layerdistill.methods.replacing import Replacing, bernoulli_share, ramp_share
from layerdistill.methods.task_term import TaskTerm
from layerdistill.models import count_parameters
from layerdistill.models.compact import CompactShape, block_path, describe_compact, new_compact_block
from layerdistill.models.modeling_compact import KIND, CompactBlock
from layerdistill.models.own_code import own_class, stock_class
from layerdistill.signals.importance import IMPORTANCE

Places = Sequence[int]
"""Blocks, counted from 0."""


class IterativeStructuredKnowledgeDistillation:
    """Replaces blocks by compact ones, in place, training after each.

    As in the released code: order, compact block, two learning rates, a fresh optimiser per stage, loss on the labels
    (the preset `weights: {task: 1, logits: 0, hidden: 0}`, `init: paper`). Deviations: groups of parameters by
    membership, not by prefixes of names, which froze blocks 10 and 11 while block 1 was trained; and by default a loss
    on logits and hidden states and a warm-up, of which that code has nothing.
    """

    name = "iskd"
    summary = "replaces blocks by compact ones, one after the other, while training (ISKD)"
    Config = IskdConfig
    one_stage = False
    grows_student = True

    def stages(self, pair: Pair, config: IskdConfig, context: RunContext) -> Iterator[Stage]:
        """Per block a stage (after one of fitting, with `warmup`); two in all with `bernoulli`."""
        replacing = Replacing(pair.student, shape_of(config), config.init, pair.seed)
        order = context.decide("iskd-order", lambda: chosen_order(config, pair, context))
        order = order[: number_of(config, pair)]
        context.say(f"Blocks are replaced in this order, counted from 0: {', '.join(map(str, order))}.")
        if config.schedule == "bernoulli":
            yield from self._all_at_once(replacing, order, pair, config, context)
        else:
            yield from self._one_by_one(replacing, order, pair, config, context)
        replacing.model.requires_grad_(True)
        # Only now is the student what this class makes of its config; its save_pretrained writes the modelling file.
        replacing.model.__class__ = own_class(stock_class(replacing.model), KIND)

    def _one_by_one(
        self, replacing: Replacing, order: Places, pair: Pair, config: IskdConfig, context: RunContext
    ) -> Iterator[Stage]:
        """Yield the stages of `step` and `blend`."""
        for count, number in enumerate(order, start=1):
            block = replacing.new_block(number)
            if config.init == "warmup":
                yield fitting(replacing, number, block, config)
                replacing.unmix(number)
            terms = terms_of(config, pair, order[:count])
            if config.schedule == "blend":
                mixed = replacing.mix(number, block)
                terms.append(ReplacementSchedule([mixed], partial(ramp_share, config.ramp_steps)))
            else:
                replacing.put(number, block)
            replacing.train_only(config.trained)
            rates = [(block, config.new_learning_rate)]
            stage = Stage(stage_name(count, number), pair.student, terms, learning_rates=rates, stock=False)
            yield stage
            if config.schedule == "blend":
                replacing.put(number, block)
            report(stage.name, pair, context)

    def _all_at_once(
        self, replacing: Replacing, order: Places, pair: Pair, config: IskdConfig, context: RunContext
    ) -> Iterator[Stage]:
        """Yield the two stages of `bernoulli`, after those of fitting."""
        blocks = {}
        for number in order:
            blocks[number] = replacing.new_block(number)
            if config.init == "warmup":
                yield fitting(replacing, number, blocks[number], config)
                replacing.unmix(number)
        mixed = [replacing.mix(number, block) for number, block in blocks.items()]
        share = partial(bernoulli_share, config.rate_start, config.rate_slope, pair.seed)
        terms = terms_of(config, pair, order).append(ReplacementSchedule(mixed, share))
        rates = [(block, config.new_learning_rate) for block in blocks.values()]
        replacing.train_only(config.trained)
        yield Stage("replacing", pair.student, terms, learning_rates=rates, stock=False)
        for number, block in blocks.items():
            replacing.put(number, block)
        report("replacing", pair, context)
        replacing.train_only(config.trained)
        terms = terms_of(config, pair, order)
        yield Stage("replaced", pair.student, terms, learning_rates=rates, stock=False)
        report("replaced", pair, context)

    def preview(self, pair: Pair, config: IskdConfig) -> list[StagePreview]:
        """The same stages, with the size of the student after each."""
        description = describe_compact(pair.student, shape_of(config))
        known = config.order != "importance"
        order = block_order(config.order, depth_of(pair), pair.seed, list) if known else list(range(depth_of(pair)))
        order = order[: number_of(config, pair)]
        left = count_parameters(pair.student)["total"]
        previews = []
        for count, number in enumerate(order, start=1):
            compact = count_parameters(new_compact_block(pair.student, description, number, 0))["total"]
            host = count_parameters(pair.student.get_submodule(block_path(pair.student, description, number)))["total"]
            left -= host - compact
            terms = terms_of(config, pair, order[:count])
            maps = [found for term in terms for found in getattr(term, "maps", [])]
            note = (
                f"A compact block has {compact:,} parameters, the block in its place {host:,} ({compact / host:.2%})."
            )
            previews.append(
                StagePreview(
                    stage_name(count, number if known else None),
                    [describe_term(term) for term in terms],
                    maps if known else [],
                    student_parameters=left,
                    notes=[note] if count == 1 else [],
                    asks=partial(needs_during, terms),
                    chosen_later=not known,
                )
            )
        return with_schedule(previews, config)

    def problems(self, config: IskdConfig, pair: Pair) -> list[str]:
        """An order, a number, a size or a loss that does not fit, no loss at all, or an architecture without place."""
        problems = predictions_problems(config, pair)
        if not (config.weights.task or config.weights.logits or config.weights.hidden):
            problems.append("method.weights are all 0, so nothing would be learned. Set one of them.")
        if "" not in pair.student_depth:
            return [*problems, "iskd replaces blocks of models with one stack; this one has an encoder and a decoder."]
        problem = order_problem(config.order, depth_of(pair))
        if problem is not None:
            return [*problems, problem]
        available = len(config.order) if isinstance(config.order, list) else depth_of(pair)
        if number_of(config, pair) > available:
            problems.append(
                f"method.num_replaced is {config.num_replaced}, but "
                + ("method.order lists" if isinstance(config.order, list) else "the model has")
                + f" {available} blocks. Give at most that."
            )
        return problems or block_problems(config, pair)


def block_problems(config: IskdConfig, pair: Pair) -> list[str]:
    """Return why compact blocks do not fit the student: by its shapes if it has any, by a trial if it has numbers."""
    first = next(pair.student.parameters(), None)
    if first is None:
        return []
    try:
        replacing = Replacing(pair.student, shape_of(config), config.init, pair.seed)
    except UserError as error:
        return list(error.problems)
    places = config.order if isinstance(config.order, list) else range(depth_of(pair))
    return [] if first.is_meta else replacing.faults(places)


def shape_of(config: IskdConfig) -> CompactShape:
    """Return the shape of compact blocks that a config asks for."""
    return CompactShape(**config.block.model_dump())


def depth_of(pair: Pair) -> int:
    """Return the number of blocks of the only stack."""
    return pair.student_depth[""]


def number_of(config: IskdConfig, pair: Pair) -> int:
    """Return how many blocks are replaced."""
    if config.num_replaced is not None:
        return config.num_replaced
    return len(config.order) if isinstance(config.order, list) else max(depth_of(pair) // 2, 1)


def chosen_order(config: IskdConfig, pair: Pair, context: RunContext) -> list[int]:
    """Return the blocks in the order of their replacement."""

    def importance() -> list[float]:
        return IMPORTANCE[config.importance](pair.student, pair.task, context.calibration())

    return block_order(config.order, depth_of(pair), pair.seed, importance)


def terms_of(config: IskdConfig, pair: Pair, replaced: Places) -> nn.ModuleList:
    """Return the terms whose weight is not 0; hidden states are compared at the outputs of the replaced blocks."""
    terms: list[nn.Module] = []
    weights = config.weights
    if weights.task:
        terms.append(TaskTerm(pair.task, weights.task))
    if weights.logits:
        terms.append(logits_term(config, pair, weights.logits))
    if weights.hidden:
        pairs = [(number + 1, number + 1) for number in sorted(replaced)]
        matched = layer_map(pairs, student_layers=depth_of(pair), teacher_layers=depth_of(pair))
        terms.append(HiddenTerm([matched], partial(masked_mse, divide_by_teacher=True), weights.hidden))
    return nn.ModuleList(terms)


def fitting(replacing: Replacing, number: int, block: CompactBlock, config: IskdConfig) -> Stage:
    """Return the stage in which a new block learns what the one in its place does, on what enters it there."""
    replacing.fit(number, block)
    no_evaluation = {"eval_strategy": "no", "load_best_model_at_end": False}
    changes = {"max_steps": config.warmup_steps, "warmup_steps": 0, **no_evaluation}
    terms = nn.ModuleList([FitTerm(replacing.path(number))])
    rates = [(block, config.new_learning_rate)]
    return Stage(f"fit-block-{number}", replacing.model, terms, changes, None, rates, stock=False)


def stage_name(count: int, number: int | None) -> str:
    """Return `replace-1-block-5`: first stage, block 5 counted from 0."""
    return f"replace-{count}-block-{'chosen' if number is None else number}"


def with_schedule(previews: list[StagePreview], config: IskdConfig) -> list[StagePreview]:
    """Return the stages' previews as the schedule and the warm-up make them."""
    notes = list(previews[0].notes)
    if config.init == "warmup":
        notes.append(
            f"Before its stage each new block is fitted to the one it replaces, for {config.warmup_steps} steps."
        )
    if config.schedule == "bernoulli":
        last = previews[-1]
        return [
            replace(last, name="replacing", student_parameters=None, notes=notes),
            replace(last, name="replaced", notes=()),
        ]
    return [replace(previews[0], notes=notes), *previews[1:]]


def report(stage: str, pair: Pair, context: RunContext) -> None:
    """Measure the student on the validation split after a stage, keep the numbers, and say them."""
    metrics = context.decide(f"iskd-metrics/{stage}", lambda: context.evaluate(pair.student))
    found = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if value is not None)
    size = count_parameters(pair.student)["total"]
    context.say(f"After {stage}: {size:,} parameters{', ' if found else ''}{found}.")


METHOD = IterativeStructuredKnowledgeDistillation()
