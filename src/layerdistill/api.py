"""The same line for Python: models and data that are in memory already, and a Trainer to put into one's own script."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset
from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from layerdistill.context import LiveContext
from layerdistill.core.errors import UserError
from layerdistill.core.files import read_json, write_json
from layerdistill.core.fingerprint import fingerprint_json, fingerprint_model
from layerdistill.core.padding import padding_problems
from layerdistill.core.types import Method, Pair
from layerdistill.data import Collator, filler_for, fingerprint_dataset, set_aside
from layerdistill.data.read_files import columns_of
from layerdistill.evaluate import EvaluationConfig, evaluate_model
from layerdistill.methods.table import MethodConfig, find_method
from layerdistill.models import depths, make_student, unwrap, widths
from layerdistill.models.adapters import peft_adapters
from layerdistill.models.trainable import trainable_again
from layerdistill.recipe import explain
from layerdistill.teacher_cache import CacheConfig, StageTeachers
from layerdistill.train.config import LayerDistillationConfig
from layerdistill.train.stage import StageInput, run_stage
from layerdistill.train.stream import refuse_unending
from layerdistill.train.trainer import StageTrainer

logger = logging.getLogger(__name__)

CLEARLY = 1.25
"""How many times larger than its teacher a student must be for a warning; adapters alone make it a little larger."""

FIRST_ROWS = 16
"""Rows of a stream by which a folder knows it again."""


@dataclass(frozen=True)
class DistillResult:
    """A trained student and its metrics on the evaluation data (empty without any)."""

    student: PreTrainedModel
    metrics: dict[str, float | None]


def task_of(model: Any) -> str:
    """Return the task that a model's class and config are made for; raises UserError for other heads."""
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if type(model).__name__.endswith("ForSequenceClassification"):
        kind = model.config.problem_type
        if kind == "multi_label_classification":
            return "multi-label-classification"
        return "regression" if kind == "regression" or model.config.num_labels == 1 else "sequence-classification"
    raise UserError(
        f"{type(model).__name__} has no head for a task that is supported here. Load the model with "
        "AutoModelForSequenceClassification or AutoModelForCausalLM."
    )


def make_pair(teacher: Any, student: Any, seed: int = 42) -> Pair:
    """Return a teacher and a student, as loaded, with what a method must know of them.

    A teacher wrapped in peft stays as it is; the pair holds the model inside, and the adapters' A matrices.
    """
    for whose, model in (("teacher", teacher), ("student", student)):
        if model is not None and not isinstance(model, nn.Module):
            raise UserError(f"The {whose} is {model!r}: pass a model that is loaded (from_pretrained).")
    task = task_of(student)
    adapters = peft_adapters(teacher)
    teacher = unwrap(teacher) if adapters is not None else teacher
    rows = [model.config.get_text_config().vocab_size for model in (teacher, student) if model is not None]
    return Pair(
        teacher, student, task,
        depths(teacher) if teacher is not None else {}, depths(student),
        widths(teacher) if teacher is not None else {}, widths(student),
        min(rows) if task == "causal-lm" else None, seed, adapters,
    )  # fmt: skip


def method_config(method: str | dict[str, Any] | Any, options: dict[str, Any]) -> Any:
    """Return a method's config from its name and options; raises UserError as a recipe would."""
    if isinstance(method, BaseModel):
        return method
    if not isinstance(method, str | dict):
        raise UserError(f"method is a {type(method).__name__}: pass a name, or a recipe's method section as a dict.")
    given = {"name": method, **options} if isinstance(method, str) else {**method, **options}
    try:
        return TypeAdapter(MethodConfig).validate_python(given)
    except ValidationError as error:
        raise UserError(*explain(error, ("method",))) from error


def check_method(config: Any, pair: Pair) -> None:
    """Raise UserError when a method cannot work on a pair; a teacher smaller than its student is told of."""
    trains = any(parameter.requires_grad for parameter in pair.student.parameters())
    if not trains and not find_method(config.name).grows_student:
        raise UserError(
            "No parameter of the student trains (requires_grad is False everywhere). Call student.requires_grad_(True)."
        )
    if pair.teacher is None and config.name != "none":
        raise UserError(f"The method {config.name!r} learns from a teacher. Pass teacher_model=..., or use 'none'.")
    if pair.teacher is None or config.name == "none":
        return
    problems = head_problems(pair) or find_method(config.name).problems(config, pair)
    if problems:
        raise UserError(*problems)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (pair.teacher, pair.student)]
    if CLEARLY * sizes[0] < sizes[1]:
        logger.warning("The teacher has %d parameters, the student %d: are they in each other's place?", *sizes)


def check_rows(rows: Any, what: str, pair: Pair) -> None:
    """Raise UserError for data of which no batch of the student's task can be made; streams are not looked at."""
    if isinstance(rows, dict):  # DatasetDict is one
        raise UserError(f"{what} is a {type(rows).__name__} ({', '.join(map(str, rows))}): pass one of its splits.")
    if not isinstance(rows, Dataset) or rows.format["type"] == "custom":  # set_transform makes its columns when read
        return
    if "input_ids" not in rows.column_names:
        raise UserError(
            f"{what} has the columns {', '.join(rows.column_names)}, but no input_ids: tokenise it first, for example "
            "rows.map(lambda row: tokenizer(row['text'], truncation=True))."
        )
    student: Any = pair.student
    column = next((name for name in ("labels", "label") if name in rows.column_names), None)
    if pair.task != "sequence-classification" or column is None:
        return
    labels = columns_of(rows, [column])[column]
    largest = pc.max(labels).as_py() if pa.types.is_integer(labels.type) else None
    if largest is not None and largest >= student.config.num_labels:  # below 0 are those that nobody reads
        raise UserError(
            f"{what} has a label {largest}, but the student has {student.config.num_labels} classes, 0 to "
            f"{student.config.num_labels - 1}."
        )


def head_problems(pair: Pair) -> list[str]:
    """Return why the two models' predictions cannot be compared."""
    teacher: Any = pair.teacher
    student: Any = pair.student
    if (theirs := task_of(teacher)) != pair.task:
        return [f"The teacher is made for {theirs}, the student for {pair.task}. Load both with the head of one task."]
    labels = teacher.config.num_labels, student.config.num_labels
    if pair.task != "causal-lm" and labels[0] != labels[1]:
        return [f"The teacher has {labels[0]} labels, the student {labels[1]}. Take models made for the same labels."]
    return padding_problems([teacher.config, student.config], pair.task)


def own_collator(tokenizer: Any, pair: Pair, config: Any) -> Collator:
    """Return the collator of the models that are run, which fills up with what they know as padding."""
    student: Any = pair.student
    teacher: Any = pair.teacher if config.name != "none" else None
    configs = [model.config for model in (teacher, student) if model is not None]
    return Collator(tokenizer, pair.task, padding_token=filler_for(tokenizer, configs, pair.task))


def claim_folder(folder: Path, config: Any, pair: Pair, train_dataset: Any, args: TrainingArguments) -> None:
    """Note in `folder` what is trained there; raises UserError when it holds the state of something else.

    Without this a second call with the same `args` would find the first one's end state and return its student.
    """
    training = {name: value for name, value in args.to_dict().items() if name not in ("output_dir", "local_rank")}
    identity = {
        "method": fingerprint_json(config.model_dump(mode="json")),
        "student": fingerprint_model(pair.student),
        "teacher": fingerprint_model(pair.teacher) if pair.teacher is not None else "",
        "data": fingerprint_rows(train_dataset),
        "args": fingerprint_json(training),
    }
    path = folder / "distill.json"
    before = read_json(path) if path.exists() else identity
    if differ := [name for name in identity if before.get(name) != identity[name]]:
        raise UserError(
            f"{folder} holds the state of another distillation ({', '.join(differ)} were different). Give each its own "
            "args.output_dir, or delete that folder. (A trained student is no longer the student it was.)"
        )
    if PartialState().is_main_process:
        write_json(path, identity)


def fingerprint_rows(train_dataset: Any) -> str:
    """Return the fingerprint of training data, of a stream that of its first rows; empty for what tells neither."""
    if isinstance(train_dataset, Dataset):
        return fingerprint_dataset(train_dataset)
    stream = train_dataset is not None and not isinstance(train_dataset, Sized)
    return fingerprint_json([dict(row) for row in islice(train_dataset, FIRST_ROWS)]) if stream else ""


class LayerDistillationTrainer(StageTrainer):
    """transformers.Trainer with a teacher: trains `model` by a method that has one stage.

    `method` is a name, a dict as in a recipe, or a method's config. `eval_loss` is the student's loss on the labels.
    With `cache` what the teacher says is kept on the disk and read. The teacher is frozen (`requires_grad`). Methods
    with several stages run through `distill` or a recipe. Datasets are tokenised, as for the Trainer; given a tokenizer
    as `processing_class` and no `data_collator`, batches are padded by ours, labels of language models too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: PreTrainedModel | None = None,
        method: str | dict[str, Any] | Any = "kd",
        args: LayerDistillationConfig | None = None,
        train_dataset: Any = None,
        method_options: dict[str, Any] | None = None,
        cache: CacheConfig | None = None,
        **options: Any,
    ) -> None:
        args = args or LayerDistillationConfig(output_dir="runs/trainer")
        refuse_unending(train_dataset, args)
        config = method_config(method, method_options or {})
        pair = make_pair(teacher_model, model, args.seed)
        chosen = find_method(config.name)
        if not chosen.one_stage:
            raise UserError(
                f"The method {config.name!r} is more than one stage of training. Use layerdistill.distill(...) or a "
                "recipe."
            )
        check_method(config, pair)
        tokenizer = options.get("processing_class")
        if options.get("data_collator") is None and tokenizer is not None:
            check_rows(train_dataset, "train_dataset", pair)
            options["data_collator"] = own_collator(tokenizer, pair, config)
        given = StageInput(
            pair.task, {"train": train_dataset}, options.get("data_collator"), tokenizer, args, args.seed,
            Path(str(args.output_dir)), Console(quiet=True),
        )  # fmt: skip
        stage = next(chosen.stages(pair, config, LiveContext(given, EvaluationConfig().metrics_for(pair.task))))
        teacher = StageTeachers(teacher_model, cache, given).of(stage)
        super().__init__(stage, pair.task, args, train_dataset, teacher, **options)

    @property
    def student(self) -> nn.Module:
        """The model being trained."""
        return self.composite.student


def starting_student(method: Method, teacher: Any, student: PreTrainedModel | None) -> PreTrainedModel:
    """Return the model to train: the one given, or a copy of the teacher for a method that makes the student of it."""
    if method.grows_student:
        if student is not None or teacher is None:
            raise UserError(
                f"The method {method.name!r} makes the student out of the teacher: pass a teacher, and student=None."
            )
        return make_student(teacher).float()
    if student is None:
        raise UserError("student is None: pass a model, for example layerdistill.make_student(teacher, num_blocks=3).")
    return student


def distill(
    teacher: PreTrainedModel | None,
    student: PreTrainedModel | None,
    train_dataset: Any,
    eval_dataset: Any = None,
    method: str | dict[str, Any] | Any = "cka",
    processing_class: Any = None,
    args: TrainingArguments | None = None,
    cache: CacheConfig | None = None,
    **method_options: Any,
) -> DistillResult:
    """Train `student` in place by any method and return it with its metrics on `eval_dataset`.

    `student` is None for a method that makes it out of the teacher (iskd, layer_prune).

    Datasets are tokenised (`input_ids`, `attention_mask`, `labels`). `method_options` are a recipe's method section.
    `processing_class` is the tokenizer, which knows how to pad. With `args` the state of training lies in
    `args.output_dir`, and the same call goes on with it; without, in a temporary folder that is gone afterwards.
    With `cache` what the teacher says is kept on the disk and read, for other calls too.
    Raises UserError for options that do not fit, and for an `output_dir` that holds another distillation.
    """
    refuse_unending(train_dataset, args)
    config = method_config(method, method_options)
    chosen = find_method(config.name)
    student = starting_student(chosen, teacher, student)
    if processing_class is None:
        raise UserError("processing_class is missing: pass the tokenizer, which says how batches are padded.")
    if eval_dataset is not None and not isinstance(eval_dataset, Dataset):
        raise UserError(
            f"eval_dataset is a {type(eval_dataset).__name__}: pass a datasets.Dataset (Dataset.from_list)."
        )
    with tempfile.TemporaryDirectory(prefix="layerdistill-") as temporary:
        folder = Path(str(args.output_dir)) if args is not None else Path(temporary)
        seed = args.seed if args is not None else 42
        pair = make_pair(teacher, student, seed)
        check_method(config, pair)
        check_rows(train_dataset, "train_dataset", pair)
        if eval_dataset is not None:
            check_rows(eval_dataset, "eval_dataset", pair)
        if args is not None:
            claim_folder(folder, config, pair, train_dataset, args)
        collator = own_collator(processing_class, pair, config)
        datasets = {"train": train_dataset} | ({"validation": eval_dataset} if eval_dataset is not None else {})
        if (calibration := getattr(config, "calibration", None)) is not None:
            datasets = set_aside(datasets, calibration, seed)
        training: Any = args if args is not None else {}
        given = StageInput(pair.task, datasets, collator, processing_class, training, seed, folder, Console(quiet=True))
        context = LiveContext(given, EvaluationConfig().metrics_for(pair.task))
        with trainable_again(teacher if teacher is not None else nn.Identity()):
            teachers = StageTeachers(teacher, cache, given)
            for stage in chosen.stages(pair, config, context):
                run_stage(stage, given, teachers.of(stage))
    if eval_dataset is None:
        return DistillResult(student, {})
    section = EvaluationConfig()
    found = evaluate_model(
        student, eval_dataset, collator, pair.task, section.metrics_for(pair.task), section.batch_size
    )
    return DistillResult(student, found.metrics)
