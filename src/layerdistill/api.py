"""The same line for Python: models and data that are in memory already, and a Trainer to put into one's own script."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from layerdistill.core.errors import UserError
from layerdistill.core.types import Pair
from layerdistill.data import Collator
from layerdistill.evaluate import EvaluationConfig, evaluate_model
from layerdistill.methods.table import MethodConfig, find_method
from layerdistill.models import depths, widths
from layerdistill.recipe import explain
from layerdistill.signals import LiveTeacher
from layerdistill.train.config import LayerDistillationConfig
from layerdistill.train.stage import StageInput, run_stage
from layerdistill.train.trainer import StageTrainer


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
    """Return a teacher and a student, as loaded, with what a method must know of them."""
    task = task_of(student)
    rows = [model.config.vocab_size for model in (teacher, student) if model is not None]
    return Pair(
        teacher, student, task,
        depths(teacher) if teacher is not None else {}, depths(student),
        widths(teacher) if teacher is not None else {}, widths(student),
        min(rows) if task == "causal-lm" else None, seed,
    )  # fmt: skip


def method_config(method: str | dict[str, Any] | Any, options: dict[str, Any]) -> Any:
    """Return a method's config from its name and options; raises UserError as a recipe would."""
    if not isinstance(method, str | dict):
        return method
    given = {"name": method, **options} if isinstance(method, str) else {**method, **options}
    try:
        return TypeAdapter(MethodConfig).validate_python(given)
    except ValidationError as error:
        raise UserError(*explain(error, ("method",))) from error


def check_method(config: Any, pair: Pair) -> None:
    """Raise UserError when a method cannot work on a pair."""
    if pair.teacher is None and config.name != "none":
        raise UserError(f"The method {config.name!r} learns from a teacher. Pass teacher_model=..., or use 'none'.")
    problems = find_method(config.name).problems(config, pair) if pair.teacher is not None else []
    if problems:
        raise UserError(*problems)


class LayerDistillationTrainer(StageTrainer):
    """transformers.Trainer with a teacher: trains `model` by a method that has one stage.

    `method` is a name, a dict as in a recipe, or a method's config. `eval_loss` is the student's loss on the labels.
    Methods with several stages run through `distill` or a recipe. Datasets are tokenised, as for the Trainer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: PreTrainedModel | None = None,
        method: str | dict[str, Any] | Any = "kd",
        args: LayerDistillationConfig | None = None,
        train_dataset: Any = None,
        method_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        args = args or LayerDistillationConfig(output_dir="runs/trainer")
        config = method_config(method, method_options or {})
        pair = make_pair(teacher_model, model, args.seed)
        check_method(config, pair)
        stages = list(find_method(config.name).stages(pair, config))
        if len(stages) != 1:
            raise UserError(
                f"The method {config.name!r} has {len(stages)} stages. Use layerdistill.distill(...) for it."
            )
        teacher = LiveTeacher(teacher_model) if teacher_model is not None else None
        super().__init__(stages[0], pair.task, args, train_dataset, teacher, **options)

    @property
    def student(self) -> nn.Module:
        """The model being trained."""
        return self.composite.student


def distill(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    train_dataset: Any,
    eval_dataset: Any = None,
    method: str | dict[str, Any] | Any = "cka",
    processing_class: Any = None,
    args: TrainingArguments | None = None,
    **method_options: Any,
) -> DistillResult:
    """Train `student` in place by any method and return it with its metrics on `eval_dataset`.

    Datasets are tokenised (`input_ids`, `attention_mask`, `labels`). `method_options` are a recipe's method section.
    Without `args` the state of training lies in a temporary folder and is gone afterwards.
    """
    config = method_config(method, method_options)
    with tempfile.TemporaryDirectory(prefix="layerdistill-") as temporary:
        folder = Path(str(args.output_dir)) if args is not None else Path(temporary)
        seed = args.seed if args is not None else 42
        pair = make_pair(teacher, student, seed)
        check_method(config, pair)
        collator = Collator(processing_class, pair.task)
        datasets = {"train": train_dataset} | ({"validation": eval_dataset} if eval_dataset is not None else {})
        training: Any = args if args is not None else {}
        given = StageInput(pair.task, datasets, collator, processing_class, training, seed, folder, Console(quiet=True))
        source = LiveTeacher(teacher)
        for stage in find_method(config.name).stages(pair, config):
            run_stage(stage, given, source)
    if eval_dataset is None:
        return DistillResult(student, {})
    section = EvaluationConfig()
    found = evaluate_model(
        student, eval_dataset, collator, pair.task, section.metrics_for(pair.task), section.batch_size
    )
    return DistillResult(student, found.metrics)
