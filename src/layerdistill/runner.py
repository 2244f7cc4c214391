"""The spine: one recipe -> one finished run folder."""

from __future__ import annotations

import fcntl
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from torch import nn

from layerdistill.core.errors import UserError
from layerdistill.core.files import (
    explained_disk_errors,
    read_json,
    sweep_partials,
    whole_folder,
    write_json,
    write_text,
)
from layerdistill.core.types import Pair
from layerdistill.evaluate import evaluate_model, measure_costs, save_predictions
from layerdistill.finetune import load_teacher, open_model
from layerdistill.models import make_student, resolve_model_source
from layerdistill.prepare import Prepared, prepare, shape_of
from layerdistill.recipe import Recipe, dump_recipe, load_recipe
from layerdistill.signals import LiveTeacher
from layerdistill.train.stage import StageInput, run_stage
from layerdistill.train.trainer import save_student

RECIPE_FILE, EVALUATION_FILE, STUDENT_FOLDER = "recipe.yaml", "evaluation.json", "student"


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, the metrics of the student and the teacher, and their cost."""

    folder: Path
    metrics: dict[str, float | None]
    teacher_metrics: dict[str, float | None]
    cost: dict[str, Any]

    @property
    def student(self) -> Path:
        """The folder that plain transformers opens."""
        return self.folder / STUDENT_FOLDER


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
        prepared = prepare(recipe)
        teacher = load_teacher(prepared, lambda where: stage_input(prepared, where, console), console)
        pair = replace(prepared.pair, teacher=teacher, student=load_student_model(prepared, teacher))
        # Only now nothing of the recipe can be wrong any more, and what an earlier run left may go.
        if again:
            forget(folder)
        record_start(folder, recipe, prepared)
        train(prepared, pair, folder, console)
        return evaluate_run(prepared, pair, folder)


def train(prepared: Prepared, pair: Pair, folder: Path, console: Console) -> None:
    """Run the method's stages and write the student."""
    given = stage_input(prepared, folder, console)
    source = LiveTeacher(pair.teacher) if pair.teacher is not None else None
    for stage in prepared.method.stages(pair, prepared.recipe.method):
        run_stage(stage, given, source)
    target = folder / STUDENT_FOLDER
    if PartialState().is_main_process:
        with explained_disk_errors("The student", target), whole_folder(target) as partial:
            save_student(pair.student, partial, prepared.tokenizer)
    PartialState().wait_for_everyone()


def evaluate_run(prepared: Prepared, pair: Pair, folder: Path) -> RunResult:
    """Measure student and teacher and write evaluation.json, whose presence means that the run is finished."""
    if PartialState().is_main_process:
        models = {"student": pair.student} | ({"teacher": pair.teacher} if pair.teacher is not None else {})
        result = measure(prepared, models, folder)
        with explained_disk_errors("The evaluation", folder):
            write_json(folder / EVALUATION_FILE, result)
    PartialState().wait_for_everyone()
    return read_result(folder)


def measure(prepared: Prepared, models: dict[str, nn.Module], folder: Path | None) -> dict[str, Any]:
    """Return metrics on the test split (else validation) and cost of each model; predictions go into `folder`."""
    section, data = prepared.recipe.evaluation, prepared.recipe.data
    split = "test" if "test" in prepared.datasets else "validation"
    result: dict[str, Any] = {"split": split}
    for name, model in models.items():
        if split not in prepared.datasets or (name == "teacher" and not reads_the_data(prepared)):
            result[name] = {}
            continue
        found = evaluate_model(
            model,
            prepared.datasets[split],
            prepared.collator,
            data.task,
            section.metrics_for(data.task),
            section.batch_size,
        )
        result[name] = found.metrics
        if found.undefined:
            result.setdefault("undefined", {})[name] = found.undefined
        if folder is not None:
            file = "predictions.parquet" if name == "student" else f"predictions-{name}.parquet"
            save_predictions(found.predictions, folder / file)
    if section.cost:
        folders = {name: folder_of(model) for name, model in models.items()}
        if folder is not None:
            folders["student"] = folder / STUDENT_FOLDER
        result["cost"] = measure_costs(models, section.seq_for(data.max_length), section, folders)
    return result


def folder_of(model: Any) -> Path | None:
    """Return the folder that a model was loaded from, None for one from the hub or made here."""
    return Path(model.name_or_path) if model.name_or_path and Path(model.name_or_path).is_dir() else None


def reads_the_data(prepared: Prepared) -> bool:
    """Whether the teacher knows the data's token ids: they are the student's, which may have a tokenizer of its own."""
    return prepared.vocabulary is None or prepared.vocabulary.identical


def evaluate_folder(model: str, recipe: Recipe) -> dict[str, Any]:
    """Return metrics and cost of a run's student, a model folder or a hub id on a recipe's data.

    Raises UserError when the model's outputs do not fit the data's labels.
    """
    prepared = prepare(recipe)
    folder = Path(model)
    source = str(folder / STUDENT_FOLDER) if (folder / STUDENT_FOLDER).is_dir() else resolve_model_source(model, None)
    loaded = open_model(prepared, source, recipe.student, recipe.student.dtype)
    if loaded.fresh_keys and recipe.data.task != "causal-lm":
        raise UserError(
            f"{source} has no trained head for this recipe's task and labels (new weights: "
            f"{', '.join(loaded.fresh_keys[:4])}). Give a model trained on the same task, or the recipe it belongs to."
        )
    return measure(prepared, {"model": loaded.model}, None)


def load_student_model(prepared: Prepared, teacher: nn.Module | None) -> nn.Module:
    """Return the student at its start: cut out of the teacher, or a pretrained model of its own."""
    section = prepared.recipe.student
    if prepared.student_source is not None:
        return open_model(prepared, prepared.student_source, section, section.dtype).model
    assert teacher is not None, "prepare() has seen to it"
    student = make_student(teacher, **shape_of(prepared.recipe))
    return student if section.dtype == "auto" else student.to(getattr(torch, section.dtype))


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
    )


# The folder


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for this command; a second command on the same folder is refused."""
    if not PartialState().is_main_process:
        yield
        return
    with explained_disk_errors("The run folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("w")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another command is working in {folder}. Wait for it, or choose another output.") from None
        yield


def refuse_another_recipe(folder: Path, recipe: Recipe) -> None:
    """Raise UserError when the folder holds a run of another recipe, naming the keys that differ."""
    path = folder / RECIPE_FILE
    if not path.exists():
        return
    before = flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    now = flatten(yaml.safe_load(dump_recipe(recipe)))
    differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and key != "output")
    if differ:
        shown = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differ[:5])
        raise UserError(
            f"{folder} holds a run of another recipe ({shown}). Choose another output (--set output=FOLDER), or give "
            "--again to delete that run and start anew."
        )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one mapping from dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in flatten(inner, f"{prefix}.{name}".strip(".")).items()
    }


def forget(folder: Path) -> None:
    """Delete what an earlier run left in the folder; nothing but a run's own files is touched."""
    if PartialState().is_main_process:
        for name in (RECIPE_FILE, EVALUATION_FILE, "environment.json", "decisions.json", "metrics.jsonl"):
            (folder / name).unlink(missing_ok=True)
        for path in folder.glob("predictions*.parquet"):
            path.unlink()
        for name in (STUDENT_FOLDER, "checkpoints", "helpers"):
            shutil.rmtree(folder / name, ignore_errors=True)
    PartialState().wait_for_everyone()


def record_start(folder: Path, recipe: Recipe, prepared: Prepared) -> None:
    """Write the complete recipe and the environment it runs in."""
    if not PartialState().is_main_process:
        return
    sweep_partials(folder)
    with explained_disk_errors("The run folder", folder):
        write_text(folder / RECIPE_FILE, dump_recipe(recipe))
        packages = ("layerdistill", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy")
        environment = {
            "command": sys.argv,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: version(name) for name in packages},
            "threads": torch.get_num_threads(),
            "device": str(PartialState().device),
            "processes": PartialState().num_processes,
            "examples": {name: len(split) for name, split in prepared.datasets.items()},
            "seed": recipe.seed,
        }
        write_json(folder / "environment.json", environment)


def read_result(folder: Path) -> RunResult:
    """Read a finished run back."""
    found = read_json(folder / EVALUATION_FILE)
    return RunResult(folder, found.get("student", {}), found.get("teacher", {}), found.get("cost", {}))
