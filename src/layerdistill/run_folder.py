"""The folder of a run: who holds it, which recipe it belongs to, what it says when it is finished."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState

from layerdistill.core.errors import UserError
from layerdistill.core.files import (
    PARTIAL_PREFIX,
    explained_disk_errors,
    read_json,
    sweep_partials,
    write_json,
    write_text,
)
from layerdistill.core.processes import held
from layerdistill.prepare import Prepared
from layerdistill.recipe import Recipe, dump_recipe, load_recipe

RECIPE_FILE, EVALUATION_FILE, STUDENT_FOLDER = "recipe.yaml", "evaluation.json", "student"
DIAGNOSIS_FOLDER = "diagnose"
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
    if not (folder / EVALUATION_FILE).exists():
        free |= MEASURED_AT_THE_END
        # Rows by which a method chooses are read in batches of this size: another one rounds otherwise.
        free |= {"evaluation.batch_size"} if getattr(recipe.method, "calibration", None) is None else set()
    differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and key not in free)
    if "method.name" in differ:  # its options differ only because it does
        differ = ["method.name", *(key for key in differ if not key.startswith("method."))]
    if differ:
        shown = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differ[:5])
        raise UserError(
            f"{folder} holds a run of another recipe ({shown}). Choose another output (--set output=FOLDER), or give "
            "--again to delete that run and start anew."
        )


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
        for name in (STUDENT_FOLDER, DIAGNOSIS_FOLDER, "checkpoints", "helpers"):
            if (folder / name).exists():
                (folder / name).rename(folder / f"{PARTIAL_PREFIX}old-{name}")
        for path in folder.glob("predictions*.parquet"):
            path.unlink()
        for name in (EVALUATION_FILE, "environment.json", "decisions.json", "metrics.jsonl", RECIPE_FILE):
            (folder / name).unlink(missing_ok=True)
        sweep_partials(folder)
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
            "examples": {
                name: len(split) if isinstance(split, Sized) else None for name, split in prepared.datasets.items()
            },
            "seed": recipe.seed,
        }
        write_json(folder / "environment.json", environment)


def read_result(folder: Path) -> RunResult:
    """Read a finished run back."""
    found = read_json(folder / EVALUATION_FILE)
    return RunResult(folder, found.get("student", {}), found.get("teacher", {}), found.get("cost", {}))
