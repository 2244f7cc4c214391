"""Task-aware layer-wise distillation (Liang, Zuo, Zhang, He, Chen and Zhao, ICML 2023, https://arxiv.org/abs/2210.01351)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from layerdistill.core.errors import UserError
from layerdistill.core.seeds import seeded
from layerdistill.core.types import LayerRef, Mean, Pair, RunContext, StackName, Stage, StagePreview, TeacherSource
from layerdistill.matching import LayerMap, masked_mse, projected_mse
from layerdistill.matching.filters import Filters
from layerdistill.methods.filter_term import (
    ClassifierFilterTerm,
    FilterTerm,
    LanguageFilterTerm,
    dropout_of,
    make_heads,
)
from layerdistill.methods.hidden_term import HiddenTerm
from layerdistill.methods.matched import build_maps, prediction_terms
from layerdistill.methods.phase import HELPERS_ONLY, PhaseTraining, frozen
from layerdistill.methods.preview import preview_stages
from layerdistill.methods.task_term import TaskTerm
from layerdistill.methods.ted_config import TedConfig, ted_problems
from layerdistill.models import unwrap
from layerdistill.models.causality import causality_problem
from layerdistill.signals import LiveTeacher
from layerdistill.signals.language_head import LanguageHead
from layerdistill.signals.recorded import Position, RecordedTeacher, fits_in

FiltersOf = dict[StackName, Filters]

SHARE_OF_FREE_DISK = 0.8
"""How much of the free space for temporary files a record may take."""


class TaskAwareDistillation:
    """Filters learn, on top of each frozen model, what of a layer the task needs; then filtered layers are matched.

    Deviations from the released code, each of which an option undoes where it can be undone: padding does not count in
    the hidden loss; the frozen models have no dropout while their filters are learned, so they are run once; regression
    heads distil by squared error, since a KL over one output is 0; a decoder's heads read the last real token. Language
    models follow the tuned lens, since no code for them was released.
    """

    name = "ted"
    summary = "filters learned on the task choose what of each layer is matched; then kd plus filtered hidden states"
    Config = TedConfig
    one_stage = False
    grows_student = False

    def stages(self, pair: Pair, config: TedConfig, context: RunContext) -> Iterator[Stage]:
        """Up to four: the student alone on the task, the teacher's filters, the student's filters, distillation."""
        if config.finetunes_student:
            yield finetune_stage(pair, config)
        maps = build_maps(config, pair) if config.weights.hidden else []
        filters = make_filters(config, pair, maps)
        if config.filters == "learned":
            assert pair.teacher is not None, "a method that learns from a teacher has one"
            yield from learn_filters("teacher", pair.teacher, filters["teacher"], pair, config, context)
            yield from learn_filters("student", pair.student, filters["student"], pair, config, context)
        yield distill_stage(pair, config, maps, filters)

    def preview(self, pair: Pair, config: TedConfig) -> list[StagePreview]:
        """The same stages, with the sizes of filters and heads."""
        found = preview_stages([finetune_stage(pair, config)]) if config.finetunes_student else []
        maps = build_maps(config, pair) if config.weights.hidden else []
        with torch.device("meta"):
            filters = make_filters(config, pair, maps)
            if config.filters == "learned":
                models = {"teacher": pair.teacher, "student": pair.student}
                found += [preview_learning(whose, models[whose], filters[whose], pair, config) for whose in models]
            distill = preview_stages([distill_stage(pair, config, maps, filters)])[0]
        trained, still = (sum(map(count, filters[whose].values())) for whose in ("student", "teacher"))
        note = [f"The teacher's filters, {still:,} parameters, stay as they are."] if still else []
        return [*found, replace(distill, thrown_away=trained, notes=note)]

    def problems(self, config: TedConfig, pair: Pair) -> list[str]:
        """A layer map or a loss that does not fit, or filters that do not fit the widths."""
        return ted_problems(config, pair) or head_problems(config, pair)


def head_problems(config: TedConfig, pair: Pair) -> list[str]:
    """Return why the filters of a language model cannot be learned through its head; needs models with numbers."""
    if pair.task != "causal-lm" or config.filters != "learned" or pair.teacher is None:
        return []
    for model in (pair.teacher, pair.student):
        if not next(model.parameters()).is_meta:
            try:
                LanguageHead(model)
            except UserError as error:
                return list(error.problems)
    return []


def finetune_stage(pair: Pair, config: TedConfig) -> Stage:
    """Return the stage that fits the student to the task without the teacher."""
    training = (config.student_finetune or PhaseTraining()).overrides()
    return Stage("student-finetune", pair.student, nn.ModuleList([TaskTerm(pair.task, 1.0)]), training)


def distill_stage(pair: Pair, config: TedConfig, maps: Sequence[LayerMap], filters: dict[str, FiltersOf]) -> Stage:
    """Return the stage in which the student and its filters train against the teacher and its frozen filters."""
    terms: list[nn.Module] = list(prediction_terms(config, pair))
    for module in filters["teacher"].values():
        module.requires_grad_(False)
    if maps:
        distances = [partial(each, divide_by_teacher=config.relative) for each in (masked_mse, projected_mse)]
        if not config.mask_padding:
            distances = [partial(mean_of_batch, distance) for distance in distances]
        terms.append(
            HiddenTerm(
                maps,
                distances[0],
                config.weights.hidden,
                filters["student"],
                config.reduce,
                whole_batch=not config.mask_padding,
                teacher_filters=filters["teacher"],
                padding=not config.mask_padding,
                projected=distances[1],
                dtype=config.products,
            )
        )
    return Stage("distill", pair.student, nn.ModuleList(terms))


def mean_of_batch(distance: Callable[..., Mean], *sides: Any) -> Mean:
    """Return a distance as one number per batch: with padding counted there is no count of tokens to divide by."""
    value = distance(*sides).value
    return Mean(value, torch.ones_like(value))


def make_filters(config: TedConfig, pair: Pair, maps: Sequence[LayerMap]) -> dict[str, FiltersOf]:
    """Return the filters of the matched layers of both models, by stack; the teacher has none for `filters: none`."""
    found: dict[str, FiltersOf] = {"teacher": {}, "student": {}}
    widths = {"teacher": pair.teacher_width, "student": pair.student_width}
    for layer_map in maps:
        stack = layer_map.stack
        layers = dict(zip(("student", "teacher"), matched_layers(layer_map), strict=True))
        for whose in ("student",) if config.filters == "none" else ("teacher", "student"):
            found[whose][stack] = Filters(
                layers[whose],
                widths[whose][stack],
                config.size(pair, stack),
                init=config.init(pair.task),
                nonlinear=config.nonlinear,
                seed=pair.seed,
                whose=whose,
            )
    return found


def matched_layers(layer_map: LayerMap) -> tuple[list[LayerRef], list[LayerRef]]:
    """Return the student's and the teacher's layers that a map can match at any point of training."""
    groups = layer_map.refs_at(0, 0)
    teachers = {layer for _, group in groups for layer in group}
    if layer_map.strategy == "in_order_random" and layer_map.redraw != "run":
        teachers |= {LayerRef(layer_map.stack, number) for number in range(1, layer_map.teacher_layers + 1)}
    return sorted({student for student, _ in groups}), sorted(teachers)


def learn_filters(
    whose: str, model: nn.Module, filters: FiltersOf, pair: Pair, config: TedConfig, context: RunContext
) -> Iterator[Stage]:
    """Yield the stage that learns one model's filters on top of it, frozen; raises RuntimeError should it move."""
    training = filter_training(whose, config)
    with frozen(model, whose, context.say):
        positions = None if pair.task == "causal-lm" else read_positions(model)
        term = filter_term(whose, model, filters, pair, positions, config.stage_one.dropout)
        source = trunk(whose, model, term.layers, positions, training, config, context)
        yield Stage(f"{whose}-filters", None, nn.ModuleList([term]), training | HELPERS_ONLY, source)
        if isinstance(source, RecordedTeacher):
            source.close()


def filter_training(whose: str, config: TedConfig) -> dict[str, Any]:
    """Return what the stage that learns one model's filters changes in the recipe's training section."""
    training = config.stage_one.overrides()
    if whose == "teacher" and config.stage_one.teacher is not None:
        training |= config.stage_one.teacher.overrides()
    return training


def filter_term(
    whose: str,
    model: nn.Module,
    filters: FiltersOf,
    pair: Pair,
    positions: dict[StackName, Position] | None,
    dropout: bool,
) -> FilterTerm:
    """Return the loss by which filters are learned, with heads for a classifier, drawn from the seed."""
    if positions is None:
        return LanguageFilterTerm(pair.task, filters, LanguageHead(model))
    with seeded(pair.seed, "filter-heads", whose):
        return ClassifierFilterTerm(pair.task, filters, classifier_heads(model, filters, dropout), positions)


def classifier_heads(model: nn.Module, filters: FiltersOf, dropout: bool = False) -> dict[LayerRef, nn.Module]:
    """Return one head for each filter."""
    model_config: Any = unwrap(model).config
    heads: dict[LayerRef, nn.Module] = {}
    for module in filters.values():
        rates = dropout_of(model_config) if dropout else (0.0, 0.0)
        heads |= make_heads(module.layers, module.size, model_config.num_labels, rates)
    return heads


def read_positions(model: nn.Module) -> dict[StackName, Position]:
    """Return which token tells most of a text in each stack: the first of an encoder, the last of a decoder."""
    if unwrap(model).config.is_encoder_decoder:
        return {"encoder": "first", "decoder": "last"}
    return {"": "last" if causality_problem(model) is None else "first"}


def trunk(
    whose: str,
    model: nn.Module,
    layers: Sequence[LayerRef],
    positions: dict[StackName, Position] | None,
    training: dict[str, Any],
    config: TedConfig,
    context: RunContext,
) -> TeacherSource:
    """Return the frozen model as a source of states: recorded once where that saves work and fits, else run each step.

    The choice is kept in decisions.json, because recorded and fresh states differ by rounding.
    """
    if config.stage_one.dropout:
        return LiveTeacher(model, dropout=True)
    steps_decide = training.get("max_steps", -1) > 0
    epochs = training.get("num_train_epochs", context.epochs)
    most = config.stage_one.record_gb * 1e9

    def fits() -> bool:
        free = SHARE_OF_FREE_DISK * shutil.disk_usage(tempfile.gettempdir()).free
        return fits_in(min(most, free), model, context.training_batches(), layers, positions is not None)

    if most and (steps_decide or epochs > 1) and context.decide(f"record-{whose}", fits):
        return RecordedTeacher(model, context.training_batches(), layers, positions)
    return LiveTeacher(model)


def preview_learning(whose: str, model: Any, filters: FiltersOf, pair: Pair, config: TedConfig) -> StagePreview:
    """Return what is said of a stage that learns filters."""
    number = sum(len(module.layers) for module in filters.values())
    size = sum(map(count, filters.values()))
    notes = [f"{number} filters of the {whose}, {size:,} parameters, on top of the {whose}, which is frozen."]
    heads = 0
    if pair.task == "causal-lm":
        notes.append("They are read out by the model's own final norm and head, frozen too.")
    else:
        heads = sum(map(count, classifier_heads(model, filters).values()))
        notes.append(f"{number} heads, {heads:,} parameters, serve this stage only.")
    terms, training = [f"1/{number} × filters per filter"], filter_training(whose, config)
    return StagePreview(f"{whose}-filters", terms, (), size + heads, notes=notes, training=training)


def count(module: nn.Module) -> int:
    """Return a module's number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


METHOD = TaskAwareDistillation()
