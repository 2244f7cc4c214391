"""The one trainer: transformers' Trainer, taught to run a teacher and to add up named terms exactly."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints
from transformers.utils import logging as hf_logging

from layerdistill.core.errors import UserError
from layerdistill.core.files import PARTIAL_PREFIX, explained_disk_errors, replace_folder, sync_folder
from layerdistill.core.needs import needs_during
from layerdistill.core.types import Batch, Needs, Progress, Stage, TeacherSource
from layerdistill.matching.task_loss import task_loss
from layerdistill.models import has_own_code, write_own_code
from layerdistill.signals import student_signal
from layerdistill.signals.streamed_teacher import StreamedTeacher
from layerdistill.train.arguments import explained_arguments
from layerdistill.train.compiled_blocks import compiled_blocks, no_compiler
from layerdistill.train.composite import Composite, term_of
from layerdistill.train.config import argument_of, count_epochs
from layerdistill.train.fused_predictions import fused_predictions
from layerdistill.train.sampler import EpochSampler
from layerdistill.train.stream import endless
from layerdistill.train.term_log import TermLog
from layerdistill.train.units import count_of, sum_units
from layerdistill.train.worker_errors import plain_worker_errors

HELPERS_FILE = "helpers.safetensors"
STUDENT_FILE = "student.safetensors"
"""The tensors of a student that is not stock at the moment."""


class StageTrainer(Trainer):
    """Trains one stage: a student and its terms, with the teacher outside.

    Every term is a sum divided by a count. Before an optimisation step the counts of all its micro-batches and
    processes are known, so gradients do not depend on how a batch was cut (CKA, one number per batch, excepted).
    `loss_is_scaled_for_ga` tells the Trainer that the loss is already divided for gradient accumulation.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        stage: Stage,
        task: str,
        args: TrainingArguments,
        train_dataset: Any,
        teacher: TeacherSource | None = None,
        fuse: bool = True,
        **options: Any,
    ) -> None:
        """`fuse` says whether losses over a vocabulary may be computed without logits of all tokens."""
        self.task = task
        self.stage = stage
        self.teacher_source = stage.teacher or teacher
        self.step_counts: Tensor | None = None
        self.evaluated = torch.zeros(2)
        self.epoch_sampler: EpochSampler | None = None
        self.partial_folder: Path | None = None
        train_dataset = endless(train_dataset, args)
        if args.n_gpu > 1:
            args._n_gpu = 1  # torch's DataParallel would cut the batch, but not the teacher's signal
        # The student with its terms: what `self.model` is below any distributed wrapper, for which accelerate would
        # look through all modules, several times a step.
        self.composite = Composite(stage.student, stage.terms)
        super().__init__(model=self.composite, args=args, train_dataset=train_dataset, **options)
        self.accelerator.state.dynamo_plugin = no_compiler()
        # A measurement goes back through the blocks once for each term. What torch.compile makes of a backward pass may
        # go back once only: it writes over what it has read.
        gradient_steps = 0 if args.torch_compile else argument_of(args, "term_gradient_steps")
        # FSDP and DeepSpeed put weights together only while their own module runs.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.composite.padding_free = not sharded and argument_of(args, "padding_free")
        if fuse and not sharded:
            self.composite.fused = fused_predictions(stage.student, self.teacher_source, task)
        self.term_log = TermLog(stage.terms, gradient_steps)
        self.label_names = ["labels"]

    @property
    def progress(self) -> Progress:
        """Where training stands, from the state that checkpoints hold."""
        return Progress(epoch=int(self.state.epoch or 0), step=self.state.global_step)

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as transformers does, with the student's blocks compiled where `torch_compile` says so."""
        needs = Needs()
        if self.args.torch_compile:  # a term may begin to read in a later epoch
            examples = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else 1
            needs = needs_during(self.stage.terms, count_epochs(examples, partial(getattr, self.args)), 1)
        try:
            with plain_worker_errors(), compiled_blocks(self.stage.student, self.args, needs):
                return super().train(*args, **options)
        finally:
            if isinstance(self.teacher_source, StreamedTeacher):
                self.teacher_source.close()

    # Loss

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Fetch the micro-batches of one optimisation step and count their units over all processes."""
        batches: list[Batch] = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        if batches:
            self.step_counts = self.accelerator.reduce(sum_units(batches, self.task).to(device), "sum")
        return batches, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Return this micro-batch's share of the step's objective; the terms are kept for the log."""
        progress = self.progress
        composite = self.composite
        needs = composite.needs(progress)
        teacher = None
        if needs.teacher_at_all:
            if self.teacher_source is None:
                raise UserError(
                    "The method needs a teacher, but none was given. Pass teacher_model=..., or use the method 'none'."
                )
            teacher = self.teacher_source.signal(inputs, needs)
        sums = model(inputs, teacher, progress)
        assert self.step_counts is not None, "get_batch_samples runs before compute_loss"
        shares: dict[str, Tensor] = {}
        for name, (total, _) in sums.items():
            term = term_of(composite.terms, name)
            count = count_of(self.step_counts, term.unit(name))
            share = term.coefficient(name, progress) * total / count.to(total.dtype) * self.accelerator.num_processes
            shares[term.name] = shares[term.name] + share if term.name in shares else share
        self.term_log.add(sums)
        if self.term_log.measures_at(self.state.global_step):
            self.term_log.measure_gradients(shares, composite.student or composite.terms, self.state.global_step)
        return torch.stack(list(shares.values())).sum()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the student's task loss (not the whole objective: no teacher is run), logits and labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = student_signal(self.composite.student, inputs, frozenset()).logits
            assert logits is not None, "a student has a head"
            labels = inputs.get("labels")
            loss = task_loss(self.task, logits, inputs) if labels is not None else None
        if loss is not None:
            self.evaluated += torch.stack([loss.total.detach(), loss.count]).cpu().double()
        value = None if loss is None else loss.value
        return (value, None, None) if prediction_loss_only else (value, logits, labels)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as transformers does, with a loss of which every token of a text weighs the same.

        transformers takes the mean of the batches' means. On several processes the examples by which the last batch is
        filled up count in a language model's loss.
        """
        self.evaluated = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.task == "causal-lm" and output.metrics and f"{metric_key_prefix}_loss" in output.metrics:
            if self.args.world_size > 1:
                self.evaluated = self.accelerator.reduce(self.evaluated.float().to(self.args.device), "sum")
            total, count = self.evaluated.tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1.0)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms' means since the last log line; raises UserError when one of them is not finite."""
        if "loss" in logs:
            logs.update(self.term_log.take(self.accelerator, self.state.global_step))
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer, with the stage's own learning rates; one that is not installed is the user's mistake."""
        with explained_arguments():
            optimizer = super().create_optimizer(model)
        set_learning_rates(optimizer, self.stage.learning_rates)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Make the learning-rate schedule; one that lacks its arguments is the user's mistake."""
        with explained_arguments():
            return super().create_scheduler(num_training_steps, optimizer)

    # Data

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if not hasattr(dataset, "__len__") or strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        lengths = lengths_of(dataset, self.args.length_column_name) if strategy == "group_by_length" else None
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        # What one step sees together, so that processes and micro-batches do not change which examples that is.
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.epoch_sampler = EpochSampler(len(dataset), seed, lengths, batch_size)
        return self.epoch_sampler

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        # accelerate forwards set_epoch through at most two wrappers; a resumed distributed epoch has three.
        if self.epoch_sampler is not None:
            self.epoch_sampler.set_epoch(options["epoch"])
        super()._run_epoch(*args, **options)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            student = self.composite.student
            self._signature_columns: Any = [
                *(inspect.signature(student.forward).parameters if student is not None else ()),
                "label",
                "label_ids",
                "labels",
            ]

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.partial_folder) if self.partial_folder is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it into it, so that no half checkpoint is ever resumed."""
        self.term_log.refuse_pending(self.state.global_step)
        root = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        self.partial_folder = root / f"{PARTIAL_PREFIX}{name}"
        try:
            with explained_disk_errors("The checkpoint", root):
                if self.is_world_process_zero():
                    shutil.rmtree(self.partial_folder, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                self._name_best(root, name)
                if self.is_world_process_zero():
                    self._finish_checkpoint(self.partial_folder / name, root / name)
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(self.partial_folder, ignore_errors=True)
            self.partial_folder = None
        self.accelerator.wait_for_everyone()

    def _name_best(self, root: Path, newest: str) -> None:
        """Say where the best checkpoint lies, on every process: transformers has seen the partial folder only."""
        best = root / f"checkpoint-{self.state.best_global_step}"
        known = self.state.best_global_step and (best.name == newest or best.exists())
        self.state.best_model_checkpoint = str(best) if known else None

    def _finish_checkpoint(self, written: Path, target: Path) -> None:
        self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        sync_folder(written)
        replace_folder(written, target)
        limit, best_checkpoint = self.args.save_total_limit, self.state.best_model_checkpoint
        rotate_checkpoints(str(target.parent), save_total_limit=limit, best_model_checkpoint=best_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the student, as a stock `from_pretrained` folder if it is one, and its helpers; never a pickle."""
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self.composite.student is not None and self.stage.stock:
            save_student(self.composite.student, folder, self.processing_class)
        elif self.composite.student is not None:
            save_model(self.composite.student, str(folder / STUDENT_FILE))
        if helpers := {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.composite.helper_state().items()
        }:
            save_file(helpers, folder / HELPERS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_stage(self.composite, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        # Not by the path in the state, which is that of a folder that may have been moved before the run went on.
        load_stage(self.composite, Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}")


def save_student(student: Any, folder: Path | str, tokenizer: Any = None) -> None:
    """Write a model as plain transformers does: its own keys only, safetensors, with its tokenizer.

    A student with blocks of its own kind gets its modelling file beside it. Raises UserError where `folder` is a file.
    """
    if Path(folder).is_file():
        raise UserError(f"{folder} is a file, so no model can be saved there. Name a folder.")
    with hidden_bars():
        # Code beside a checkpoint reads tensors by the names of its modules; only stock classes are read otherwise.
        student.save_pretrained(folder, save_original_format=not has_own_code(student))
    write_own_code(student, Path(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def lengths_of(dataset: Any, column: str) -> list[int] | None:
    """Return the number of tokens of each example, None where they are not known or all equal."""
    columns = getattr(dataset, "column_names", ())
    if column not in columns and "input_ids" not in columns:
        return None
    lengths = list(dataset[column]) if column in columns else [len(ids) for ids in dataset["input_ids"]]
    return lengths if len(set(lengths)) > 1 else None


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Sequence[tuple[nn.Module, float]]) -> None:
    """Give the parameters of each module a learning rate of its own, by membership; raises ValueError for overlaps."""
    rate_of: dict[int, float] = {}
    for module, rate in rates:
        for parameter in module.parameters():
            if id(parameter) in rate_of:
                raise ValueError("a parameter is in two modules with learning rates of their own")
            rate_of[id(parameter)] = rate
    if not rate_of:
        return
    groups = []
    for group in optimizer.param_groups:
        for rate in dict.fromkeys(rate_of.get(id(parameter), group["lr"]) for parameter in group["params"]):
            members = [parameter for parameter in group["params"] if rate_of.get(id(parameter), group["lr"]) == rate]
            groups.append({**group, "params": members, "lr": rate})
    optimizer.param_groups[:] = groups


def load_stage(composite: Composite, folder: Path) -> None:
    """Read a student and its helpers back into the modules they came from; raises UserError when files do not fit.

    A stock student is opened as transformers opens it, because some architectures are saved under other names than
    their modules have (GPT-NeoX's head, the experts of a mixture).
    """
    student = composite.student
    try:
        if (folder / STUDENT_FILE).exists():
            load_model(student, folder / STUDENT_FILE)
        elif student is not None:
            with hidden_bars():
                saved = type(student).from_pretrained(
                    folder, dtype=student.dtype, use_safetensors=True, local_files_only=True
                )
            student.load_state_dict(saved.state_dict())
        if (folder / HELPERS_FILE).exists():
            composite.terms.load_state_dict(load_file(folder / HELPERS_FILE))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"The checkpoint {folder} cannot be read ({error}). Delete that folder and give the same command again: "
            "training goes on from the checkpoint before it, or from the start."
        ) from error


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Keep transformers' bars for reading and writing files off the terminal."""
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()


def as_columns(dataset: Any, columns: Sequence[str]) -> Any:
    """Return a dataset with only those of `columns` that it has; one that does not tell its columns is left alone."""
    if not isinstance(dataset, Dataset | IterableDataset) or dataset.column_names is None:
        return dataset
    return dataset.select_columns([name for name in columns if name in dataset.column_names])
