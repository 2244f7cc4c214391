"""`layerdistill cache`: run a recipe's teacher once over the training data and keep what the method will read."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from layerdistill.core.errors import UserError
from layerdistill.finetune import in_students_ids, load_teacher, settle_dtype
from layerdistill.prepare import prepare
from layerdistill.recipe import Recipe
from layerdistill.runner import stage_input
from layerdistill.teacher_cache import CacheConfig, StageTeachers, refuse_cache_of_other_data
from layerdistill.teacher_needs import asking_stages, needs_of


def fill_cache(recipe: Recipe, console: Console) -> Path:
    """Fill the teacher cache of a recipe and return its folder; what is there already is not done again.

    Raises UserError for a recipe that reads nothing of a teacher, for one whose method chooses what it reads while it
    runs, and when the disk is too small.
    """
    prepared = prepare(recipe)
    stages = asking_stages(prepared)
    section = recipe.teacher
    if section is None or not stages:
        raise UserError(
            f"The method {recipe.method.name!r} reads nothing of a teacher while it trains: no cache helps."
        )
    if recipe.data.streaming:
        raise UserError(
            "data.streaming is true: what the teacher says of a stream is kept while it is trained on. Write "
            "teacher.cache: fill and train."
        )
    if not all(stage.certain for stage in stages):
        raise UserError(
            f"The method {recipe.method.name!r} chooses blocks while it runs, and by them the layers that it reads. "
            "Write teacher.cache: fill and train: each stage keeps what is lacking, and other runs read it."
        )
    refuse_cache_of_other_data(prepared)
    teacher = load_teacher(prepared, lambda where: stage_input(prepared, where, console), console)
    given = stage_input(prepared, Path(recipe.output), console)
    model = in_students_ids(prepared, teacher.model)
    settle_dtype(section, (model,), console)
    config = CacheConfig("fill", section.cache_dtype, section.cache_folder, section.cache_gb)
    teachers = StageTeachers(model, config, given)
    teachers.source(needs_of(stages), epochs=1.0)
    return teachers.open().folder
