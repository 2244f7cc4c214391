"""The command `diagnose`: a recipe's teacher and student, or a finished run's, looked at and never changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from torch import nn

from layerdistill.core.errors import UserError
from layerdistill.core.files import explained_disk_errors, write_bytes, write_json, write_text
from layerdistill.core.seeds import random_for
from layerdistill.core.types import Batch
from layerdistill.data import Collator
from layerdistill.diagnose.figures import png
from layerdistill.diagnose.parts import chosen_parts, find_parts
from layerdistill.diagnose.subject import Subject
from layerdistill.diagnose.tables import Finding, markdown_page, rich_table
from layerdistill.evaluate.evaluator import rows_at_once
from layerdistill.finetune import in_students_ids, load_teacher, open_model
from layerdistill.measurement import reads_the_data
from layerdistill.prepare import Prepared, own_tokenizer, prepare
from layerdistill.recipe import Recipe, load_recipe
from layerdistill.run_folder import DIAGNOSIS_FOLDER, EVALUATION_FILE, RECIPE_FILE, STUDENT_FOLDER, recipe_folder
from layerdistill.runner import load_student_model, stage_input

BATCH_SIZE = 32

CHANGEABLE = ("data.", "teacher.model", "student.model")
"""What `--set` may change of a finished run: where things lie, or which rows are shown; not what was trained."""


@dataclass(frozen=True)
class Source:
    """A recipe, the finished run that it belongs to (None where only a recipe was given), and where results go."""

    recipe: Recipe
    run: Path | None
    output: Path


def diagnose(
    source: Path,
    overrides: Sequence[str] | None = None,
    output: Path | None = None,
    examples: int = 256,
    parts: str | None = None,
    flatten: bool = False,
    console: Console | None = None,
) -> Path:
    """Diagnose a recipe's teacher and student at its start, and the trained student too where `source` is a run.

    Writes diagnose.md, PNGs and, last, diagnose.json into `output` (`diagnose/` in the run, or
    `diagnose/<name>/` beside the recipe's output), prints the tables and returns that folder. `examples` rows of the
    validation split are drawn with the recipe's seed. `parts` is a list with commas (all by default); a part named
    there must fit the models and the data, of all parts those that do not are left out with the reason.
    Raises UserError for a folder that holds no finished run, for unknown parts, and without a teacher.
    """
    console = console or Console()
    names = chosen_parts(parts)
    if examples < 2:
        raise UserError(f"--examples is {examples}, but must be at least 2.")
    given = open_source(source, list(overrides or []), output)
    prepared = prepare(given.recipe)
    split, rows = rows_to_show(prepared, examples)
    subject = open_subject(prepared, given, rows, flatten, console)
    about = describe(prepared, given, split, subject)
    for sentence in about:
        console.print(sentence, highlight=False, markup=False)
    findings, left_out = find_parts(subject, names, lambda name: console.print(f"Measuring {name} ...", style="dim"))
    if parts is not None and left_out:
        raise UserError(*(f"--parts {name} cannot be measured here: {reason}." for name, reason in left_out.items()))
    show(findings, left_out, console)
    write(given.output, findings, left_out, about, facts(prepared, given, split, subject))
    console.print(f"Everything is in {given.output} (diagnose.md, diagnose.json, figures).", highlight=False)
    return given.output


def open_source(source: Path, overrides: list[str], output: Path | None) -> Source:
    """Return the recipe of a file or of a finished run, and where its results go."""
    if not source.is_dir():
        recipe = load_recipe(source, overrides)
        beside = Path(recipe.output)
        return Source(recipe, None, output or beside.parent / DIAGNOSIS_FOLDER / beside.name)
    if not (source / RECIPE_FILE).is_file():
        raise UserError(
            f"{source} holds no run (there is no {RECIPE_FILE} in it). Give a recipe file, or the folder that "
            "`layerdistill train` has written (the recipe's `output`)."
        )
    if not (source / EVALUATION_FILE).is_file() or not (source / STUDENT_FOLDER).is_dir():
        raise UserError(
            f"{source} holds a run that is not finished. Run `layerdistill train` again to finish it, or give the "
            "recipe file to diagnose the student at its start."
        )
    if refused := [override for override in overrides if not override.startswith(CHANGEABLE)]:
        raise UserError(
            f"--set {refused[0]!r} would change what this run was. Of a finished run only {', '.join(CHANGEABLE)} may "
            "be set (other rows, or where files now lie)."
        )
    return Source(
        load_recipe(source / RECIPE_FILE, overrides, recipe_folder(source)), source, output or source / DIAGNOSIS_FOLDER
    )


def rows_to_show(prepared: Prepared, examples: int) -> tuple[str, Dataset]:
    """Return the name of the split and its rows: all, or so many drawn with the recipe's seed."""
    readable = [name for name in ("validation", "test", "train") if isinstance(prepared.datasets.get(name), Dataset)]
    if not readable:
        raise UserError("data.streaming is true and there are no other data to look at. Add data.validation.")
    split = readable[0]
    rows = prepared.datasets[split]
    if len(rows) <= examples:
        return split, rows
    chosen = random_for(prepared.recipe.seed, "diagnose").sample(range(len(rows)), examples)
    return split, rows.select(sorted(chosen))


def open_subject(prepared: Prepared, given: Source, rows: Dataset, flatten: bool, console: Console) -> Subject:
    """Return the models on the device, the students in float32, with the rows as batches."""
    loaded = load_teacher(prepared, lambda where: stage_input(prepared, where, console), console).model
    teacher = in_students_ids(prepared, loaded)
    if teacher is None:
        raise UserError(
            "The recipe has no teacher, and all that is measured is relative to one. Add teacher: {model: ...}."
        )
    if not reads_the_data(prepared):
        assert prepared.vocabulary is not None
        raise UserError(
            f"Teacher and student read different token ids ({prepared.vocabulary.reason}), so their hidden states are "
            "of different inputs. Take a student with the teacher's tokenizer."
        )
    device = PartialState().device
    students: dict[str, nn.Module] = {"start": load_student_model(prepared, teacher)}
    if given.run is not None:
        section, folder = prepared.recipe.student_loading, str(given.run / STUDENT_FOLDER)
        refuse_another_vocabulary(prepared, folder)
        students["trained"] = open_model(prepared, folder, section, section.dtype).model
    is_class_task = prepared.recipe.data.task == "sequence-classification"
    return Subject(
        teacher=teacher.to(device).requires_grad_(False),
        students={name: student.float().to(device).requires_grad_(True) for name, student in students.items()},
        task=prepared.recipe.data.task,
        classes=prepared.labels.num_labels if is_class_task else 0,
        batches=as_batches(rows, prepared.collator, device),
        flat_batches=as_batches(rows, one_length(prepared), device) if flatten else None,
    )


def refuse_another_vocabulary(prepared: Prepared, folder: str) -> None:
    """Raise UserError where the training data now gives another trimmed vocabulary than that of the run's student."""
    theirs = own_tokenizer(folder, prepared.tokenizer).get_vocab()
    if prepared.whole is not None and theirs != prepared.tokenizer.get_vocab():
        raise UserError(
            f"The student in {folder} has a trimmed vocabulary of {len(theirs)} tokens, and the training data now "
            f"gives another one of {len(prepared.tokenizer)}: data.train or data.max_train_examples has changed. "
            "Set only the other splits (data.validation, data.test)."
        )


def one_length(prepared: Prepared) -> Collator:
    """Return the recipe's collator, but padding every text to `data.max_length`."""
    return replace(prepared.collator, padding="max_length", max_length=prepared.recipe.data.max_length)


def as_batches(rows: Dataset, collator: Collator, device: torch.device) -> list[Batch]:
    """Return the rows in order, in batches on the device; fewer than BATCH_SIZE where logits would be too large."""
    size = rows_at_once(rows, collator, collator.task, collator.tokenizer, BATCH_SIZE)
    found: list[Batch] = []
    for start in range(0, len(rows), size):
        batch = collator([rows[row] for row in range(start, min(start + size, len(rows)))])
        found.append({name: value.to(device) for name, value in batch.items()})
    return found


def facts(prepared: Prepared, given: Source, split: str, subject: Subject) -> dict[str, Any]:
    """Return what the numbers are about, for diagnose.json."""
    return {
        "run": str(given.run) if given.run is not None else None,
        "teacher": prepared.recipe.teacher.name if prepared.recipe.teacher is not None else None,
        "students": list(subject.students),
        "method": prepared.recipe.method.name,
        "task": prepared.recipe.data.task,
        "split": split,
        "examples": sum(len(batch["input_ids"]) for batch in subject.batches),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in subject.batches),
        "seed": prepared.recipe.seed,
    }


def describe(prepared: Prepared, given: Source, split: str, subject: Subject) -> list[str]:
    """Return the sentences that say what is looked at."""
    known = facts(prepared, given, split, subject)
    states = "the student at its start" + (" and after training" if "trained" in subject.students else "")
    return [
        f"Teacher {known['teacher']} and {states} (method {known['method']}, task {known['task']}).",
        f"Rows: {known['examples']} of the {split} split, {known['tokens']:,} real tokens; nothing is trained or "
        "chosen on them here.",
        "Layers: 0 is the embedding output, k the output of block k, before any final norm.",
    ]


def show(findings: dict[str, Finding], left_out: dict[str, str], console: Console) -> None:
    """Print the brief tables with their sentences."""
    for finding in findings.values():
        console.print(f"\n[bold]{finding.title}[/bold]")
        for grid in finding.grids:
            if grid.brief:
                console.print(rich_table(grid))
        for sentence in finding.reading:
            console.print(sentence, highlight=False, markup=False)
    for name, reason in left_out.items():
        console.print(f"\nLeft out: {name}, because {reason}.", highlight=False, markup=False)


def write(
    folder: Path, findings: dict[str, Finding], left_out: dict[str, str], about: list[str], known: dict[str, Any]
) -> None:
    """Write figures, the page, and the numbers last."""
    with explained_disk_errors("The diagnosis", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for finding in findings.values():
            for name, figure in finding.figures.items():
                write_bytes(folder / name, png(figure))
        write_text(folder / "diagnose.md", markdown_page("Diagnosis", about, findings, left_out))
        parts = {name: {"reading": found.reading, **found.data} for name, found in findings.items()}
        write_json(folder / "diagnose.json", {**known, "parts": parts, "left_out": left_out})
