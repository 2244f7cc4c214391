"""Everything a run needs but weights: resolved, cross-checked, with every problem reported at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from layerdistill.core.errors import UserError
from layerdistill.core.padding import ends_at_padding, padding_problems, padding_token
from layerdistill.core.types import Method, Pair
from layerdistill.data import (
    CALIBRATION,
    Collator,
    LabelSpace,
    VocabularyCheck,
    compare_vocabularies,
    filler_for,
    label_space,
    load_splits,
    open_tokenizer,
    set_aside,
    streamed_blocks,
    tokenise,
    trimmed_splits,
)
from layerdistill.evaluate import metric_problems
from layerdistill.methods.table import find_method
from layerdistill.models import (
    depths_from_config,
    empty_model,
    fewest_positions,
    ids_to_stay,
    load_config,
    new_config,
    resolve_model_source,
    shrink_config,
    trim_config,
    widths_from_config,
)
from layerdistill.models.adapter_files import planned_adapters
from layerdistill.recipe import Recipe
from layerdistill.recipe_problems import (
    curriculum_problems,
    evaluation_problems,
    head_problems,
    section_problems,
    strategy_problems,
    vocabulary_problems,
    warn_of_other_names,
)
from layerdistill.train.config import LayerDistillationConfig, build_arguments

Result = TypeVar("Result")


@dataclass(frozen=True)
class WholeVocabulary:
    """What the teacher reads where the student's vocabulary is trimmed; `kept[i]` is its id of the student's i."""

    kept: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase
    datasets: dict[str, Dataset]
    collator: Collator


@dataclass(frozen=True)
class Prepared:
    """A recipe with its data tokenised and its models known by their configs; `pair` holds no models yet.

    The training data are a `datasets.IterableDataset` without a length where `data.streaming` says so.
    `tokenizer`, `datasets` and `collator` speak the student's ids; `for_teacher` has those of the teacher by itself.
    """

    recipe: Recipe
    method: Method
    teacher_source: str | None
    teacher_config: PreTrainedConfig | None
    student_source: str | None
    student_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    labels: LabelSpace
    datasets: dict[str, Any]
    collator: Collator
    vocabulary: VocabularyCheck | None
    pair: Pair
    arguments: LayerDistillationConfig
    whole: WholeVocabulary | None = None
    """Set where the student's vocabulary is trimmed."""

    @property
    def for_teacher(self) -> Prepared | WholeVocabulary:
        """Tokenizer, datasets and collator by which the teacher is fine-tuned and evaluated."""
        return self.whole or self

    def arguments_with(self, changes: Mapping[str, Any]) -> LayerDistillationConfig:
        """Return the training arguments of a stage that makes `changes` to the recipe's."""
        return build_arguments({**self.recipe.training, **changes}, self.recipe.output, self.recipe.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimisation steps in one pass over the training data, on one process; of a stream all there are."""
        if not isinstance(self.datasets["train"], Sized):
            return self.arguments.max_steps
        batches = math.ceil(len(self.datasets["train"]) / self.arguments.per_device_train_batch_size)
        return max(math.ceil(batches / self.arguments.gradient_accumulation_steps), 1)

    @property
    def total_steps(self) -> int:
        """Optimisation steps of the distillation, on one process."""
        if self.arguments.max_steps > 0:
            return self.arguments.max_steps
        return math.ceil(self.arguments.num_train_epochs * self.steps_per_epoch)


class Problems:
    """Collects the messages of UserErrors, so that one check's failure does not hide the next one's."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, action: Callable[..., Result], *args: Any, **options: Any) -> Result | None:
        """Return what `action` returns, or None after noting why it failed."""
        try:
            return action(*args, **options)
        except UserError as error:
            self.found += [problem for problem in error.problems if problem not in self.found]
            return None

    def stop(self) -> None:
        """Raise one UserError with everything found so far, if anything was."""
        if self.found:
            raise UserError(*self.found)


def prepare(recipe: Recipe, memory: dict[str, Any] | None = None, together: bool = True) -> Prepared:
    """Resolve and check a recipe without loading weights; `memory` gives splits that are in memory already.

    Unless `together`, its models are not asked about the same batches, and need not be able to be.
    Raises UserError with every problem found.
    """
    problems = Problems()
    method = find_method(recipe.method.name)
    problems.found += metric_problems(recipe.evaluation.metrics, recipe.data.task)
    problems.found += section_problems(recipe)
    splits = problems.attempt(load_splits, recipe.data, recipe.base, memory)
    if splits is not None and "validation" not in splits:
        problems.found += strategy_problems(recipe)
    labels = problems.attempt(label_space, splits, recipe.data) if splits is not None else None
    teacher_source, teacher_config = model_config(recipe.teacher, recipe, problems)
    own_model = recipe.student is not None and recipe.student.model is not None
    student_source, student_config = model_config(recipe.student if own_model else None, recipe, problems)
    known = student_config is not None or teacher_config is not None or recipe.data.tokenizer is not None
    tokenizer = problems.attempt(find_tokenizer, recipe, student_source or teacher_source) if known else None
    if recipe.teacher is not None and recipe.teacher.architecture is not None and tokenizer is not None:
        teacher_config = problems.attempt(new_config, recipe.teacher.architecture, len(tokenizer))
    if student_config is None and teacher_config is not None and not own_model:
        student_config = problems.attempt(shrink_config, teacher_config, **shape_of(recipe))
    problems.stop()
    assert splits is not None and labels is not None and student_config is not None and tokenizer is not None

    vocabulary = None
    if teacher_config is not None:
        rows = (config.get_text_config().vocab_size for config in (teacher_config, student_config))
        vocabulary = compare_vocabularies(own_tokenizer(teacher_source, tokenizer), tokenizer, *rows)
    pair = pair_without_models(recipe, teacher_config, student_config, vocabulary)
    readers = [student_config]
    if teacher_config is not None and vocabulary is not None and vocabulary.identical and together:
        problems.found += head_problems(recipe, teacher_config, labels)
        if teacher_source is not None and recipe.teacher is not None and recipe.teacher.finetune is None:
            warn_of_other_names(teacher_config, labels, f"the teacher {recipe.teacher.name}")
        readers = [teacher_config, student_config] if recipe.method.name != "none" else readers
    problems.found += padding_problems(readers, recipe.data.task)
    problems.found += tokenizer_problems(recipe, student_source, student_config, tokenizer)
    if vocabulary is not None and recipe.method.name != "none":
        problems.found += vocabulary_problems(vocabulary, cut_out=student_source is None)
    if teacher_config is not None:
        problems.found += method_problems(method, recipe, pair, teacher_config, student_config, labels)
    longest = fewest_positions(teacher_config, student_config)
    problems.found += evaluation_problems(recipe, labels, longest)
    datasets = problems.attempt(tokenised_splits, splits, recipe, tokenizer, labels, longest)
    problems.stop()
    assert datasets is not None
    arguments = build_arguments(recipe.training, recipe.output, recipe.seed)
    problems.found += curriculum_problems(recipe, arguments, datasets["train"])
    problems.stop()
    prepared = Prepared(
        recipe, method, teacher_source, teacher_config, student_source, student_config, tokenizer, labels, datasets,
        make_collator(recipe, tokenizer, readers), vocabulary, pair, arguments,
    )  # fmt: skip
    trimmed = recipe.student is not None and recipe.student.vocabulary == "trimmed"
    return with_trimmed_vocabulary(prepared, splits) if trimmed else prepared


def with_trimmed_vocabulary(prepared: Prepared, splits: dict[str, Dataset]) -> Prepared:
    """Return the same with a student that knows only the tokens that the training data needs.

    Raises UserError for a tokenizer that is not the teacher's or cannot be trimmed.
    """
    recipe, full = prepared.recipe, prepared.datasets
    if prepared.vocabulary is not None and not prepared.vocabulary.identical:
        raise UserError(
            f"student.vocabulary is 'trimmed', but data.tokenizer is not the teacher's ({prepared.vocabulary.reason}), "
            "so its tokens are not the rows of the teacher's embedding. Leave data.tokenizer out, or vocabulary: full."
        )
    assert CALIBRATION not in full, "only methods that grow the student set rows aside; they have no student section"
    vocabulary, datasets = trimmed_splits(
        full,
        splits,
        recipe.data,
        prepared.tokenizer,
        prepared.labels,
        fewest_positions(prepared.teacher_config, prepared.student_config),
        ids_to_stay(prepared.student_config),
    )
    kept, tokenizer = vocabulary.kept, vocabulary.tokenizer
    check = VocabularyCheck(True, len(kept), len(kept), f"{len(kept)} of the teacher's tokens, under other ids")
    student_config = trim_config(prepared.student_config, kept)
    if problems := trimmed_padding_problems(prepared.student_config, student_config, recipe):
        raise UserError(*problems)
    trimmed = replace(
        prepared,
        student_config=student_config,
        tokenizer=tokenizer,
        datasets=datasets,
        collator=make_collator(recipe, tokenizer, [student_config]),
        vocabulary=check,
        pair=replace(prepared.pair, vocab_size=len(kept) if prepared.pair.vocab_size is not None else None),
        whole=WholeVocabulary(kept, prepared.tokenizer, full, prepared.collator),
    )
    if problems := trimmed.method.problems(recipe.method, trimmed.pair):
        raise UserError(*problems)
    return trimmed


def trimmed_padding_problems(whole: PreTrainedConfig, trimmed: PreTrainedConfig, recipe: Recipe) -> list[str]:
    """Return whether the id by which the models find the end of a text is lost with the vocabulary."""
    token = padding_token(whole)
    if token is None or padding_token(trimmed) is not None or not ends_at_padding(whole, recipe.data.task):
        return []
    return [
        f"student.vocabulary is 'trimmed', but pad_token_id is {token} in the teacher's configuration, which finds the "
        "end of a text by it, and its tokenizer has no such token to keep. Save the teacher with a tokenizer whose "
        "pad token has that id, or write vocabulary: full."
    ]


def read_with(prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Return the same with its data read by another tokenizer: that of a model which was not made of this recipe.

    Batches are made by the collator of the recipe's own models; see `padded_for`.
    """
    recipe = prepared.recipe
    splits = load_splits(recipe.data, recipe.base)
    longest = fewest_positions(prepared.teacher_config, prepared.student_config)
    datasets = tokenised_splits(splits, recipe, tokenizer, prepared.labels, longest)
    return replace(prepared, tokenizer=tokenizer, datasets=datasets)


def padded_for(prepared: Prepared, model: PreTrainedConfig) -> Prepared:
    """Return the same with batches that are filled up with what `model` knows as padding."""
    return replace(prepared, collator=make_collator(prepared.recipe, prepared.tokenizer, [model]))


def method_problems(
    method: Method,
    recipe: Recipe,
    pair: Pair,
    teacher: PreTrainedConfig,
    student: PreTrainedConfig,
    labels: LabelSpace,
) -> list[str]:
    """Return why the method cannot work on this pair, as far as numbers of layers, widths and shapes tell it."""
    found = method.problems(recipe.method, pair)
    if found:
        return found
    try:
        shapes = with_shapes(pair, teacher, student, labels)
    except UserError:  # a model with code of its own is looked at when it is loaded
        return []
    return method.problems(recipe.method, shapes)


def with_shapes(pair: Pair, teacher: PreTrainedConfig | None, student: PreTrainedConfig, labels: LabelSpace) -> Pair:
    """Return the pair with models on the meta device, shapes without numbers; raises UserError like `empty_model`."""
    models = [
        empty_model(config, pair.task, labels.num_labels or None) if config is not None else None
        for config in (teacher, student)
    ]
    assert models[1] is not None, "a student always has a config"
    return replace(pair, teacher=models[0], student=models[1])


def tokenised_splits(
    splits: dict[str, Dataset],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    labels: LabelSpace,
    longest: int | None,
) -> dict[str, Any]:
    """Return the splits as model inputs, with the rows that the method chooses by set aside."""
    datasets: dict[str, Any] = {**tokenise(splits, recipe.data, tokenizer, labels, longest)}
    if recipe.data.streaming:
        datasets["train"] = streamed_blocks(recipe.data, recipe.base, tokenizer, recipe.seed)
    calibration = getattr(recipe.method, "calibration", None)
    return datasets if calibration is None else set_aside(datasets, calibration, recipe.seed)


def own_tokenizer(source: str | None, fallback: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies with a model, or `fallback` for a model that brings none."""
    try:
        return open_tokenizer(source) if source is not None else fallback
    except UserError:
        return fallback


def tokenizer_problems(
    recipe: Recipe, student_source: str | None, student: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return why `data.tokenizer` does not fit a student that brings its own."""
    if recipe.data.tokenizer is None or student_source is None:
        return []
    rows = student.get_text_config().vocab_size
    own = compare_vocabularies(own_tokenizer(student_source, tokenizer), tokenizer, rows, rows)
    if own.identical:
        return []
    return [f"data.tokenizer is not the student's own ({own.reason.replace('teacher', 'model')}). Leave it out."]


def make_collator(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, models: Sequence[PreTrainedConfig]) -> Collator:
    """Return the collator that the data section asks for; what fills up is what `models` know as padding."""
    data, filler = recipe.data, filler_for(tokenizer, models, recipe.data.task)
    return Collator(tokenizer, data.task, data.padding, data.max_length, data.pad_to_multiple_of, filler)


def svd_rank(recipe: Recipe) -> int | None:
    """Return the rank of the adapters that the method wants taken out of the teacher's fine-tuning, if it does."""
    return recipe.method.rank if getattr(recipe.method, "teacher_adapters", None) == "svd" else None  # type: ignore[union-attr]


def shape_of(recipe: Recipe) -> dict[str, Any]:
    """Return the shape that the student section asks for (the teacher's without one), as `make_student` takes it."""
    if recipe.student is None:
        return {"seed": recipe.seed}
    names = ("num_blocks", "hidden_size", "intermediate_size", "num_attention_heads", "init", "copy_map")
    return {name: getattr(recipe.student, name) for name in names} | {"seed": recipe.seed}


def model_config(section: Any, recipe: Recipe, problems: Problems) -> tuple[str | None, PreTrainedConfig | None]:
    """Return where a model is and its config, or None for both where the section names no model."""
    if section is None or section.model is None:
        return None, None
    source = problems.attempt(resolve_model_source, section.model, recipe.base)
    if source is None:
        return None, None
    return source, problems.attempt(load_config, source, section.trust_remote_code, section.revision)


def find_tokenizer(recipe: Recipe, source: str | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that `data.tokenizer` names, else the student's, else the teacher's."""
    if recipe.data.tokenizer is not None:
        return open_tokenizer(resolve_model_source(recipe.data.tokenizer, recipe.base))
    return open_tokenizer(source) if source is not None else None


def pair_without_models(
    recipe: Recipe,
    teacher: PreTrainedConfig | None,
    student: PreTrainedConfig,
    vocabulary: VocabularyCheck | None,
) -> Pair:
    """Return the pair's shape as its configs tell it."""
    is_language_model = recipe.data.task == "causal-lm"
    return Pair(
        teacher=None,
        student=nn.Identity(),
        task=recipe.data.task,
        teacher_depth=depths_from_config(teacher) if teacher is not None else {},
        student_depth=depths_from_config(student),
        teacher_width=widths_from_config(teacher) if teacher is not None else {},
        student_width=widths_from_config(student),
        vocab_size=vocabulary.vocab_size if vocabulary is not None and is_language_model else None,
        seed=recipe.seed,
        teacher_adapters=planned_adapters(recipe.teacher, teacher, recipe.data.task, recipe.base, svd_rank(recipe)),
    )
