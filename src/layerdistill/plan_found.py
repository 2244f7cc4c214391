"""What a plan finds done already: the run in its output folder, the teacher's signals in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerdistill.core.errors import UserError
from layerdistill.models.config import TeacherConfig
from layerdistill.prepare import Prepared
from layerdistill.recipe import Recipe
from layerdistill.run_folder import EVALUATION_FILE, RECIPE_FILE, refuse_another_recipe
from layerdistill.signals.cache_folder import MANIFEST_FILE, differences, read_manifest
from layerdistill.signals.cache_rows import StoredDtype
from layerdistill.teacher_cache import (
    SHARE_OF_DISK,
    WORTH_KEEPING,
    asking_stages,
    cache_home,
    data_identity,
    free_at,
    spoken,
)
from layerdistill.train.stage import FINISHED, newest_checkpoint, read_state

OF_THE_TEACHER = ("teacher", "teacher's class", "padding token")
"""What a cache belongs to that is known only once the teacher is loaded."""


def found_run(recipe: Recipe) -> str:
    """Return what `train` would do with the run that is in the output folder, empty where there is none."""
    folder = Path(recipe.output)
    if not (folder / RECIPE_FILE).exists():
        return ""
    try:
        refuse_another_recipe(folder, recipe)
    except UserError as error:
        return f"`train` would refuse this: {' '.join(error.problems)}"
    if (folder / EVALUATION_FILE).exists():
        return f"{folder} is finished: `train` would only show its result (--again starts anew)."
    stages = [said for path in sorted((folder / "checkpoints").glob("*/")) if (said := progress(path))]
    return f"{folder} was begun: `train` goes on with it ({', '.join(stages) or 'nothing is trained yet'})."


def progress(stage: Path) -> str:
    """Return how far a stage came, empty where nothing of it is kept."""
    if (stage / FINISHED).exists():
        return f"stage {stage.name} done"
    newest = newest_checkpoint(stage)
    if newest is None:
        return ""
    state = read_state(newest)
    return f"stage {stage.name} at step {state['global_step']:,} of {state['max_steps']:,}"


def found_cache(prepared: Prepared, section: TeacherConfig, names: Sequence[str], dtype: StoredDtype) -> str:
    """Return what is kept already of the signals `names` for this recipe's data, empty where nothing is.

    The teacher's weights are not read for it; a run compares them and refuses, or passes over, another teacher's cache.
    """
    here = {**data_identity(prepared.datasets["train"], prepared.tokenizer), "cache_dtype": dtype}
    named = section.cache_folder is not None
    paths = [Path(section.cache_folder)] if section.cache_folder else sorted(cache_home().glob("*/"))
    there: list[tuple[Path, dict[str, Any]]] = []
    for path in paths:
        if not (path / MANIFEST_FILE).exists():
            continue
        try:
            manifest = read_manifest(path / MANIFEST_FILE)
        except UserError as error:
            if named:
                return " ".join(error.problems)
            continue
        known = {name: value for name, value in manifest["identity"].items() if name not in OF_THE_TEACHER}
        if not (differ := differences(known, here)):
            there.append((path, manifest))
        elif named:
            return f"A run would refuse {path}, which was made for something else: {differ}."
    if not there:
        return ""
    path, manifest = max(there, key=lambda found: len(set(names) & set(found[1]["complete"])))
    lacking = [spoken(name) for name in names if name not in manifest["complete"]]
    state = f"all of it but {', '.join(lacking)}" if lacking else "all of it"
    return f"{path} holds {state} for these data, if its teacher is this one (the weights are compared by a run)."


def cache_to_come(prepared: Prepared, section: TeacherConfig, needed: int) -> str:
    """Return whether a run will keep `needed` bytes of the teacher where nothing is yet, and why if it will not."""
    if section.cache == "require":
        return "A run would refuse this: nothing is kept yet. Run `layerdistill cache` first."
    free = free_at(Path(section.cache_folder) if section.cache_folder else cache_home())
    too_large = f"{free / 1e9:.3g} GB are free" if needed > SHARE_OF_DISK * free else ""
    if section.cache == "fill" and too_large:
        return f"A run would refuse this: {too_large}."
    if section.cache == "auto":
        passes = max((passes for asked, passes in asking_stages(prepared) if asked.teacher_at_all), default=0.0)
        if needed > section.cache_gb * 1e9:
            too_large = f"teacher.cache_gb allows {section.cache_gb:g}"
        if why := f"no stage passes over the data {WORTH_KEEPING:g} times" if passes < WORTH_KEEPING else too_large:
            return f"It would not be kept: {why}. The teacher is run at every step."
    return "Nothing of it is kept yet: a run fills it before its first step."
