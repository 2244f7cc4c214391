"""Run one stage to its end, from wherever an earlier command left it."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from layerdistill.core.errors import Interrupted, UserError
from layerdistill.core.files import explained_disk_errors, sweep_partials, whole_folder
from layerdistill.core.processes import agreed
from layerdistill.core.types import Stage, TeacherSource
from layerdistill.train.composite import Composite
from layerdistill.train.config import build_arguments
from layerdistill.train.interruption import Interruption
from layerdistill.train.metrics_file import MetricsFile
from layerdistill.train.progress_bar import ProgressBar
from layerdistill.train.trainer import StageTrainer, as_columns, load_stage

logger = logging.getLogger(__name__)

FINISHED = "finished"
"""The folder of a stage's end state inside its checkpoint folder."""


@dataclass(frozen=True)
class StageInput:
    """What every stage of a run is trained on and with; `datasets` may hold `validation`."""

    task: str
    datasets: dict[str, Any]
    collator: Any
    tokenizer: Any
    training: dict[str, Any] | TrainingArguments
    seed: int
    folder: Path
    console: Console
    compute_metrics: Any = None


def run_stage(stage: Stage, given: StageInput, teacher: TeacherSource | None) -> None:
    """Train `stage.student` (if any) and the stage's helpers in place; raises Interrupted when the user stopped it.

    A stage that ended before is only loaded; one that was interrupted or killed goes on from its newest checkpoint.
    """
    folder = given.folder / "checkpoints" / stage.name
    finished = folder / FINISHED
    if agreed(finished.exists()):
        load_stage(Composite(stage.student, stage.terms), finished)
        return
    with explained_disk_errors("The run's checkpoints", folder):
        folder.mkdir(parents=True, exist_ok=True)
    if PartialState().is_main_process:
        sweep_partials(folder)
    trainer, interruption, bar = make_trainer(stage, given, teacher, folder)
    if isinstance(given.datasets["train"], Sized):
        refuse_no_batch(trainer.args, len(given.datasets["train"]))
    newest = newest_checkpoint(folder)
    try:
        with interruption.listening():
            if newest is not None and is_at_end(newest):
                load_stage(trainer.composite, best_or(newest, trainer.args.load_best_model_at_end))
            else:
                trainer.train(resume_from_checkpoint=str(newest) if newest is not None else None)
    finally:
        bar.close()
    if interruption.asked and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"Interrupted at step {trainer.state.global_step} of {trainer.state.max_steps} of stage {stage.name!r}; "
            f"the state is saved in {newest_checkpoint(folder)}. Give the same command again to go on."
        )
    if trainer.is_world_process_zero():
        with explained_disk_errors("The finished stage", finished), whole_folder(finished) as partial:
            trainer._save(str(partial))
        if trainer.args.save_total_limit == 1:
            remove_checkpoints(folder)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    if stage.student is not None:
        stage.student.eval()


def make_trainer(
    stage: Stage, given: StageInput, teacher: TeacherSource | None, folder: Path
) -> tuple[StageTrainer, Interruption, ProgressBar]:
    """Return the trainer of a stage with our callbacks in place of transformers' printing ones."""
    interruption = Interruption()
    bar = ProgressBar(stage.name, given.console)
    columns = ["input_ids", "attention_mask", "token_type_ids", "labels", "label", "length"]
    arguments = stage_arguments(given, stage, folder)
    trainer = StageTrainer(
        stage,
        given.task,
        arguments,
        as_columns(given.datasets["train"], columns),
        teacher,
        eval_dataset=as_columns(given.datasets.get("validation"), columns),
        data_collator=given.collator,
        processing_class=given.tokenizer,
        compute_metrics=given.compute_metrics,
        callbacks=[interruption, bar, MetricsFile(given.folder / "metrics.jsonl", stage.name)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer, interruption, bar


def stage_arguments(given: StageInput, stage: Stage, folder: Path) -> TrainingArguments:
    """Return the arguments of one stage: the recipe's fields (or what Python code gave) with the stage's own."""
    changes = {**stage.training, "remove_unused_columns": False}
    if isinstance(given.training, dict):
        return build_arguments({**given.training, **changes}, str(folder), given.seed)
    arguments = copy.copy(given.training)
    for name, value in {**changes, "output_dir": str(folder)}.items():
        setattr(arguments, name, value)
    return arguments


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step, passing over any that a kill left half deleted."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / TRAINER_STATE_NAME).exists()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a stage whose end state is written: a method with many stages would fill the disk."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def refuse_no_batch(arguments: TrainingArguments, examples: int) -> None:
    """Raise UserError when not one batch is full and batches that are not full are dropped."""
    needed = arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and examples < needed:
        raise UserError(
            f"Not one step would be trained: {examples} examples do not fill a batch of {needed}, and "
            "training.dataloader_drop_last drops such a batch. Take a smaller one, or leave dataloader_drop_last out."
        )


def is_at_end(checkpoint: Path) -> bool:
    """Whether training had done all its steps when the checkpoint was written; transformers would do one more."""
    state = read_state(checkpoint)
    return state["global_step"] >= state["max_steps"]


def best_or(checkpoint: Path, wants_best: bool) -> Path:
    """Return the best checkpoint when training was to end with it, else the one given.

    By its step and beside the one given: the path in the state is that of a folder that may have been moved since.
    """
    best = checkpoint.parent / f"checkpoint-{read_state(checkpoint).get('best_global_step')}"
    return best if wants_best and best.exists() else checkpoint


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's trainer state."""
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
