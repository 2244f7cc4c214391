"""What a plan says of the output folder: what `train` would do with the run that is there."""

from __future__ import annotations

from pathlib import Path

from layerdistill.core.errors import UserError
from layerdistill.prepare import Prepared
from layerdistill.run_folder import (
    CHECKPOINTS,
    CONTENT,
    EVALUATION_FILE,
    RECIPE_FILE,
    content_of,
    refuse_another_recipe,
    refuse_other_content,
)
from layerdistill.train.stage import FINISHED, newest_checkpoint, read_state


def found_run(prepared: Prepared) -> str:
    """Return what `train` would do with the run that is in the output folder, empty where there is none."""
    recipe = prepared.recipe
    folder = Path(recipe.output)
    finished = (folder / EVALUATION_FILE).exists()
    if not finished and not (folder / RECIPE_FILE).exists():
        return ""
    try:
        refuse_another_recipe(folder, recipe)
        if not finished:
            refuse_other_content(folder, content_of(prepared.datasets["train"]), CONTENT[:1])
    except UserError as error:
        return f"`train` would refuse this: {' '.join(error.problems)}"
    if finished:
        return f"{folder} is finished: `train` would only show its result (--again starts anew)."
    stages = [said for path in sorted((folder / CHECKPOINTS).glob("*/")) if (said := progress(path))]
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
