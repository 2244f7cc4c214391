"""The folder of a run: who holds it, which recipe it belongs to, what it says when it is finished."""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection, Mapping, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from torch import nn

from layerdistill.core.errors import UserError
from layerdistill.core.files import (
    PARTIAL_PREFIX,
    explained_disk_errors,
    read_json,
    sweep_partials,
    write_json,
    write_text,
)
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.core.processes import agreed, held
from layerdistill.data import fingerprint_dataset
from layerdistill.prepare import Prepared
from layerdistill.recipe import Recipe, dump_recipe, load_recipe

RECIPE_FILE, EVALUATION_FILE, STUDENT_FOLDER = "recipe.yaml", "evaluation.json", "student"
ENVIRONMENT_FILE, CHECKPOINTS = "environment.json", "checkpoints"
DIAGNOSIS_FOLDER = "diagnose"
CONTENT = ("the training data", "the teacher")
"""What a run is made of besides its recipe, by names that a message can use."""
MEASURED_AT_THE_END = {f"evaluation.{name}" for name in ("cost", "latency", "latency_batch_sizes", "latency_seq")}
"""Keys without a part in the training."""


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


def lock(folder: Path) -> AbstractContextManager[None]:
    """Hold the run folder for this command; a second command on the same folder is refused."""
    return held(folder / ".lock", "The run folder", wait=False)


def refuse_another_recipe(folder: Path, recipe: Recipe) -> None:
    """Raise UserError when the folder holds a run of another recipe, naming the keys that differ.

    One that is not finished may go on with another way of measuring what it costs.
    """
    path = folder / RECIPE_FILE
    if not path.exists():
        return
    before = flatten(with_defaults(yaml.safe_load(path.read_text(encoding="utf-8"))))
    now = flatten(yaml.safe_load(dump_recipe(recipe)))
    free = {"output"}
    finished = (folder / EVALUATION_FILE).exists()
    if not finished:
        free |= MEASURED_AT_THE_END
        # Rows by which a method chooses are read in batches of this size: another one rounds otherwise.
        free |= {"evaluation.batch_size"} if getattr(recipe.method, "calibration", None) is None else set()
    differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and key not in free)
    if not finished and (before.get("teacher.cache"), now.get("teacher.cache")) == ("require", "fill"):
        differ = [
            key for key in differ if key != "teacher.cache"
        ]  # it reads the same numbers, and makes what is lacking
    if "method.name" in differ:  # its options differ only because it does
        differ = ["method.name", *(key for key in differ if not key.startswith("method."))]
    if differ:
        shown = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differ[:5])
        raise UserError(
            f"{folder} holds a run of another recipe ({shown}). Choose another output (--set output=FOLDER), or give "
            "--again to delete that run and start anew."
        )


def refuse_other_content(folder: Path, content: Mapping[str, str], known: Collection[str] = CONTENT) -> None:
    """Raise UserError where stages were trained in the folder on other `content` than there is now, as far as `known`.

    The recipe's text may be the same: files change under their paths. Content that an older run did not note passes.
    """
    path = folder / ENVIRONMENT_FILE
    noted = agreed(read_json(path).get("content", {}) if path.exists() else {})
    trained = agreed(any((folder / CHECKPOINTS).glob("*/*")))
    if trained and (differ := [name for name in known if name in noted and noted[name] != content.get(name)]):
        raise UserError(
            f"{folder} holds a run that was begun with other content under the same recipe: {', '.join(differ)} "
            "changed since. Put back what was there, choose another output (--set output=FOLDER), or give --again to "
            "delete that run and start anew."
        )


def content_of(train: Any, teacher: nn.Module | None = None) -> dict[str, str]:
    """Return fingerprints of what a run is made of, by names that a message can use; a stream has none."""
    data = {CONTENT[0]: fingerprint_dataset(train)} if isinstance(train, Sized) else {}
    return data | ({CONTENT[1]: fingerprint_model(teacher)} if teacher is not None else {})


def recipe_folder(folder: Path) -> Path | None:
    """Return where relative paths of a run's recipe began, None where that is not known or not there any more."""
    path = folder / ENVIRONMENT_FILE
    noted = read_json(path).get("recipe_folder") if path.exists() else None
    return Path(noted) if noted and Path(noted).is_dir() else None


def with_defaults(given: Any) -> Any:
    """Return a recipe as it was dumped, with the keys that came since then at their defaults."""
    try:
        return yaml.safe_load(dump_recipe(load_recipe(given)))
    except UserError:
        return given  # of a recipe that is none any more every difference is named


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
        # A kill in here must not leave a student or a checkpoint that the next run takes for its own.
        for name in (STUDENT_FOLDER, DIAGNOSIS_FOLDER, CHECKPOINTS, "helpers"):
            if (folder / name).exists():
                (folder / name).rename(folder / f"{PARTIAL_PREFIX}old-{name}")
        for path in folder.glob("predictions*.parquet"):
            path.unlink()
        for name in (EVALUATION_FILE, ENVIRONMENT_FILE, "decisions.json", "metrics.jsonl", RECIPE_FILE):
            (folder / name).unlink(missing_ok=True)
        sweep_partials(folder)
    PartialState().wait_for_everyone()


def record_start(folder: Path, recipe: Recipe, prepared: Prepared, content: Mapping[str, str]) -> None:
    """Write the complete recipe, the environment it runs in, and fingerprints of the content it is made of."""
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
            "examples": {
                name: len(split) if isinstance(split, Sized) else None for name, split in prepared.datasets.items()
            },
            "seed": recipe.seed,
            "recipe_folder": str(recipe.base) if recipe.base is not None else None,
            "content": dict(content),
        }
        write_json(folder / ENVIRONMENT_FILE, environment)


def read_result(folder: Path) -> RunResult:
    """Read a finished run back."""
    found = read_json(folder / EVALUATION_FILE)
    return RunResult(folder, found.get("student", {}), found.get("teacher", {}), found.get("cost", {}))
