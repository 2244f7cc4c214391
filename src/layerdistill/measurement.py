"""How good a recipe's models are on its data, and what they cost."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig

from layerdistill import evaluate
from layerdistill.core.errors import UserError
from layerdistill.core.fingerprint import fingerprint_files, fingerprint_model
from layerdistill.core.padding import unusual_padding
from layerdistill.data import Collator, collate, fingerprint_dataset
from layerdistill.evaluate import chance_levels, kept_predictions, measure_costs, predict, save_predictions, scores
from layerdistill.finetune import open_model
from layerdistill.models import load_config, resolve_model_source
from layerdistill.prepare import Prepared, make_collator, own_tokenizer, padded_for, prepare, read_with
from layerdistill.recipe import Recipe
from layerdistill.recipe_problems import order_problems, warn_of_other_names
from layerdistill.run_folder import RECIPE_FILE, STUDENT_FOLDER
from layerdistill.teacher_cache import fingerprint_tokenizer


def measure(prepared: Prepared, models: dict[str, nn.Module], folder: Path | None) -> dict[str, Any]:
    """Return metrics on the test split (else validation) and cost of each model; predictions go into `folder`."""
    section, data = prepared.recipe.evaluation, prepared.recipe.data
    split = "test" if "test" in prepared.datasets else "validation"
    result: dict[str, Any] = {"split": split}
    for name, model in models.items():
        if split not in prepared.datasets or (name == "teacher" and not reads_the_data(prepared)):
            result[name] = {}
            continue
        found = scores(answers(prepared, name, model, split), data.task, section.metrics_for(data.task))
        result[name] = found.metrics
        if found.undefined:
            result.setdefault("undefined", {})[name] = found.undefined
        if folder is not None:
            file = "predictions.parquet" if name == "student" else f"predictions-{name}.parquet"
            save_predictions(found.predictions, folder / file)
    if split in prepared.datasets:
        result["chance"] = chance_levels(section.metrics_for(data.task), data.task, prepared.datasets[split])
    if section.cost:
        folders = {name: folder_of(model) for name, model in models.items()}
        if folder is not None:
            folders["student"] = folder / STUDENT_FOLDER
        result["cost"] = measure_costs(
            models, section.seq_for(data.max_length), section, folders, PartialState().device
        )
    return result


def answers(prepared: Prepared, name: str, model: Any, split: str) -> pa.Table:
    """Return the predictions of a model; a teacher's are kept for all its runs, unless `teacher.cache` is off."""
    reader = prepared.for_teacher if name == "teacher" else prepared
    recipe, device, rows = prepared.recipe, PartialState().device, reader.datasets[split]
    # Each by itself: what fills up is what this model knows as padding, whatever the other's is.
    collator = make_collator(recipe, reader.tokenizer, [model.config])

    def ask() -> pa.Table:
        return predict(model, rows, collator, recipe.data.task, recipe.evaluation.batch_size, device)

    section = recipe.teacher if name == "teacher" else None
    if section is None or section.cache == "off" or section.trust_remote_code:  # code from elsewhere has no fingerprint
        return ask()
    return kept_predictions(identity_of(model, collator, rows, recipe), ask)


def identity_of(model: Any, collator: Collator, rows: Dataset, recipe: Recipe) -> dict[str, Any]:
    """Return all that the predictions of a model depend on, our own code among it."""
    filler = unusual_padding(model.config, recipe.data.task, collator)
    described = model.config.to_dict() if isinstance(model.config, PreTrainedConfig) else {}
    return {
        "model": fingerprint_model(model),
        "class": type(model).__name__,
        "config": {name: value for name, value in described.items() if name != "_name_or_path"},
        "attention": getattr(model.config, "_attn_implementation", None),
        "data": fingerprint_dataset(rows),
        "tokenizer": fingerprint_tokenizer(collator.tokenizer),
        "padding": [recipe.data.padding, recipe.data.max_length],
        **({"padding token": filler} if filler is not None else {}),
        "task": recipe.data.task,
        "batch size": recipe.evaluation.batch_size,
        "device": PartialState().device.type,
        "versions": [version(name) for name in ("torch", "transformers")],
        "code": fingerprint_files([*sorted(Path(evaluate.__file__).parent.glob("*.py")), Path(collate.__file__)]),
    }


def folder_of(model: Any) -> Path | None:
    """Return the folder that a model was loaded from, None for one from the hub or made here."""
    return Path(model.name_or_path) if model.name_or_path and Path(model.name_or_path).is_dir() else None


def reads_the_data(prepared: Prepared) -> bool:
    """Whether the teacher knows the data's token ids: they are the student's, which may have a tokenizer of its own."""
    return prepared.vocabulary is None or prepared.vocabulary.identical


def evaluate_folder(model: str, recipe: Recipe) -> dict[str, Any]:
    """Return metrics and cost of a run's student, a model folder or a hub id on a recipe's data.

    The data is read by the model's own tokenizer where it brings one.
    Raises UserError when the model's outputs do not fit the data's labels.
    """
    prepared = prepare(recipe, together=False)
    if "test" not in prepared.datasets and "validation" not in prepared.datasets:
        raise UserError("There is nothing to evaluate on: data.validation and data.test are missing. Add one of them.")
    folder = Path(model)
    if (folder / RECIPE_FILE).exists() and not (folder / STUDENT_FOLDER).is_dir():
        raise UserError(
            f"{folder} holds a run that is not finished: there is no student yet. Run `layerdistill train` again."
        )
    source = str(folder / STUDENT_FOLDER) if (folder / STUDENT_FOLDER).is_dir() else resolve_model_source(model, None)
    tokenizer = own_tokenizer(source, prepared.tokenizer)
    if tokenizer.get_vocab() != prepared.tokenizer.get_vocab():
        prepared = read_with(prepared, tokenizer)
    section = recipe.student_loading
    config = load_config(source, section.trust_remote_code, section.revision)
    if problems := order_problems(config, prepared.labels, source, recipe.data):
        raise UserError(*problems)
    warn_of_other_names(config, prepared.labels, source)
    prepared = padded_for(prepared, config)
    loaded = open_model(prepared, source, section, section.dtype)
    if loaded.fresh_keys:
        raise UserError(
            f"{source} has no trained head for this recipe's task and labels (new weights: "
            f"{', '.join(loaded.fresh_keys[:4])}). Give a model trained on the same task, or the recipe it belongs to."
        )
    return measure(prepared, {"model": loaded.model}, None)
