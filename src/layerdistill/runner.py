"""The spine: one recipe -> one finished run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn

from layerdistill.context import LiveContext
from layerdistill.core.errors import UserError
from layerdistill.core.files import explained_disk_errors, whole_folder, write_json
from layerdistill.core.types import Pair
from layerdistill.evaluate import metrics_in_training
from layerdistill.finetune import in_students_ids, load_teacher, open_model, settle_dtype
from layerdistill.measurement import measure
from layerdistill.models import freeze_embeddings, make_student, to_dtype
from layerdistill.prepare import Prepared, prepare, shape_of
from layerdistill.recipe import Recipe, load_recipe
from layerdistill.run_folder import (
    EVALUATION_FILE,
    STUDENT_FOLDER,
    RunResult,
    content_of,
    forget,
    lock,
    read_result,
    record_start,
    refuse_another_recipe,
    refuse_other_content,
)
from layerdistill.teacher_cache import CacheConfig, StageTeachers, refuse_cache_of_other_data
from layerdistill.teacher_needs import asking_stages
from layerdistill.train.stage import StageInput, run_stage
from layerdistill.train.trainer import save_student


def run(
    recipe: Recipe | dict[str, Any] | str | Path,
    overrides: list[str] | None = None,
    *,
    memory: dict[str, Any] | None = None,
    again: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Execute a recipe, or go on with it, and return its finished run; a finished one is not run again unless `again`.

    `memory` holds the splits (`datasets.Dataset` or lists of dicts) of a recipe with `data.train: in-memory`.
    Raises UserError for wrong input, before any model is loaded, and Interrupted when the user stopped it.
    """
    recipe = load_recipe(recipe, overrides)
    folder = Path(recipe.output)
    console = console or Console(quiet=not PartialState().is_main_process)
    with lock(folder):
        if not again:
            refuse_another_recipe(folder, recipe)
            if (folder / EVALUATION_FILE).exists():
                console.print(f"{folder} is finished; it is not run again (--again does).")
                return read_result(folder)
        prepared = prepare(recipe, memory)
        refuse_cache_of_other_data(prepared)
        teacher = load_teacher(prepared, lambda where: stage_input(prepared, where, console), console)
        shown = in_students_ids(prepared, teacher.model)
        student = load_student_model(prepared, shown)
        pair = replace(prepared.pair, teacher=shown, student=student, teacher_adapters=teacher.adapters)
        if pair.teacher is not None and (problems := prepared.method.problems(recipe.method, pair)):
            raise UserError(*problems)
        settle_dtype(recipe.teacher, (shown, teacher.model), console)
        given = stage_input(prepared, folder, console)
        teachers = StageTeachers(pair.teacher, CacheConfig.of(recipe.teacher), given)
        teachers.refuse_early(asking_stages(prepared))
        content = content_of(prepared.datasets["train"], teacher.model)
        if not again:
            refuse_other_content(folder, content)
        # Only now nothing of the recipe can be wrong any more, and what an earlier run left may go.
        if again:
            forget(folder)
        record_start(folder, recipe, prepared, content)
        thrown_away = train(prepared, pair, teachers, given)
        return evaluate_run(prepared, replace(pair, teacher=teacher.model), folder, thrown_away)


def train(prepared: Prepared, pair: Pair, teachers: StageTeachers, given: StageInput) -> int:
    """Run the method's stages, write the student, and return how many helper parameters were thrown away."""
    metrics = prepared.recipe.evaluation.metrics_for(prepared.recipe.data.task)
    context = LiveContext(given, metrics, prepared.recipe.evaluation.batch_size)
    helpers: dict[int, nn.Parameter] = {}
    for stage in prepared.method.stages(pair, prepared.recipe.method, context):
        run_stage(stage, given, teachers.of(stage))
        helpers |= {id(parameter): parameter for parameter in stage.terms.parameters()}  # a filter serves two stages
    target = given.folder / STUDENT_FOLDER
    if PartialState().is_main_process:
        with explained_disk_errors("The student", target), whole_folder(target) as partial:
            save_student(pair.student, partial, prepared.tokenizer)
    PartialState().wait_for_everyone()
    return sum(parameter.numel() for parameter in helpers.values())


def evaluate_run(prepared: Prepared, pair: Pair, folder: Path, thrown_away: int) -> RunResult:
    """Measure student and teacher and write evaluation.json, whose presence means that the run is finished."""
    if PartialState().is_main_process:
        models = {"student": pair.student} | ({"teacher": pair.teacher} if pair.teacher is not None else {})
        result = {**measure(prepared, models, folder), "thrown_away_parameters": thrown_away}
        with explained_disk_errors("The evaluation", folder):
            write_json(folder / EVALUATION_FILE, result)
    PartialState().wait_for_everyone()
    return read_result(folder)


def load_student_model(prepared: Prepared, teacher: nn.Module | None) -> nn.Module:
    """Return the student at its start, with the embeddings frozen if its section says so."""
    student = starting_student(prepared, teacher)
    if prepared.recipe.student is not None and prepared.recipe.student.freeze_embeddings:
        freeze_embeddings(student)
    return student


def starting_student(prepared: Prepared, teacher: nn.Module | None) -> nn.Module:
    """Return the student: cut out of the teacher, a copy of it, or a pretrained model of its own."""
    section = prepared.recipe.student
    if prepared.student_source is not None:
        assert section is not None, "the source is the section's"
        return open_model(prepared, prepared.student_source, section, section.dtype).model
    assert teacher is not None, "prepare() has seen to it"
    student = make_student(teacher, **shape_of(prepared.recipe))
    if section is None:
        return student.float()
    if section.attn_implementation is not None:
        student.set_attn_implementation(section.attn_implementation)
    if section.dtype != "auto":
        to_dtype(getattr(torch, section.dtype), [student])
    return student


def stage_input(prepared: Prepared, folder: Path, console: Console) -> StageInput:
    """Return what a stage of this recipe is trained on and with, in `folder`."""
    recipe = prepared.recipe
    return StageInput(
        recipe.data.task,
        prepared.datasets,
        prepared.collator,
        prepared.tokenizer,
        recipe.training,
        recipe.seed,
        folder,
        console,
        metrics_in_training(recipe.data.task, recipe.evaluation.metrics_for(recipe.data.task)),
    )
