"""The teacher, fitted to the task first where a recipe asks for it; made once, kept by content, reused by every run."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.core.files import explained_disk_errors, whole_folder, write_json
from layerdistill.core.fingerprint import fingerprint_json, fingerprint_model
from layerdistill.core.home import MADE_FROM, TEACHERS, home, note_use
from layerdistill.core.padding import set_padding, unusual_padding
from layerdistill.core.processes import agreed, held
from layerdistill.core.types import Stage
from layerdistill.data import fingerprint_dataset
from layerdistill.methods.task_term import TaskTerm
from layerdistill.models import LoadedModel, TeacherConfig, load_model, new_model, to_dtype, trim_model
from layerdistill.models.adapter_files import find_peft_folder, load_matrices, merge_peft_folder, save_matrices
from layerdistill.models.adapters import (
    adapter_matrices,
    add_adapters,
    merge_adapters,
    svd_adapters,
    train_adapters_and_head,
)
from layerdistill.models.config import AdapterConfig
from layerdistill.models.fast_dtype import fast_dtype
from layerdistill.prepare import Prepared, make_collator, svd_rank
from layerdistill.recipe_problems import class_names, finetune_arguments
from layerdistill.train.config import own_defaults
from layerdistill.train.stage import StageInput, run_stage
from layerdistill.train.trainer import save_student

NAMES_ONLY = ("_name_or_path", "name_or_path", "transformers_version")
"""What a config says that changes nothing about the model."""

DEFAULT_SEED = 42
"""The teacher's seed where `teacher.finetune` has none: not the recipe's, so that all seeds of a study share it."""


ADAPTERS_FOLDER = "adapters"
"""The folder of A and B matrices inside that of a fine-tuned teacher: no part of the model, whose size is measured."""

ELSEWHERE = "with the environment variable LAYERDISTILL_HOME"
"""How another place for fine-tuned teachers is chosen, for messages."""


@dataclass(frozen=True)
class Teacher:
    """A teacher with weights that fit the task and, where there are any, the A matrices of its adapters by module path.

    The adapters are merged into the weights. `model` is None in a recipe without a teacher.
    """

    model: nn.Module | None
    adapters: Mapping[str, Tensor] | None = None


def kept_teachers() -> Path:
    """Return the folder of fine-tuned teachers."""
    return home() / TEACHERS


def load_teacher(prepared: Prepared, make_input: Callable[[Path], StageInput], console: Console) -> Teacher:
    """Return the teacher with weights that fit the task, fine-tuning it first if the recipe asks for that.

    Raises UserError when its head would be random and nothing trains it.
    """
    section = prepared.recipe.teacher
    if section is None:
        return Teacher(None)
    if section.finetune is None:
        return open_teacher(prepared, section)
    # Trained in float32 whatever the dtype it is run in: bf16 weights lose small updates.
    start = starting_model(prepared, section)
    name = teacher_fingerprint(prepared, start)
    folder = kept_teachers() / name
    # Runs of other methods or seeds want the same teacher: the second one waits, and finds it made.
    with held(folder.with_name(f"{name}.lock"), "The fine-tuned teacher", wait=True):
        PartialState().wait_for_everyone()
        if not agreed(folder.exists()):
            console.print(f"Training the teacher ({section.name}) on the task; it is kept in {folder} and reused.")
            make_teacher(prepared, start, folder, make_input)
        note_use(folder / MADE_FROM)
        adapters = kept_adapters(prepared, section, folder)
    return Teacher(open_model(prepared, str(folder), section, loading_dtype(section)).model, adapters)


def in_students_ids(prepared: Prepared, teacher: nn.Module | None) -> nn.Module | None:
    """Return the teacher as it is asked in training: where the student's vocabulary is trimmed, so is the teacher's."""
    return trim_model(teacher, prepared.whole.kept) if teacher is not None and prepared.whole is not None else teacher


def loading_dtype(section: TeacherConfig) -> str:
    """Return the dtype in which a teacher is opened; one of dtype `fast` is rounded when the student is made."""
    return "float32" if section.dtype == "fast" else section.dtype


def settle_dtype(section: TeacherConfig | None, models: Iterable[nn.Module | None], console: Console) -> None:
    """Bring teachers of dtype `fast` into the dtype that this machine runs fastest, and say which."""
    if section is None or section.dtype != "fast":
        return
    chosen = fast_dtype()
    console.print(f"The teacher runs in {chosen}, the fastest here (teacher.dtype: fast).", highlight=False)
    to_dtype(getattr(torch, chosen), [model for model in models if model is not None])


def open_teacher(prepared: Prepared, section: TeacherConfig) -> Teacher:
    """Return a teacher that is not fine-tuned here, with the adapters that the recipe names merged into it."""
    assert prepared.teacher_source is not None, "an architecture comes with finetune"
    if section.adapters is None:
        loaded = open_model(prepared, prepared.teacher_source, section, loading_dtype(section))
        refuse_random_head(prepared, loaded)
        return Teacher(loaded.model)
    # Merged in float32 whatever the dtype it is run in: bf16 weights lose small updates.
    auto = section.dtype == "auto"
    loaded = open_model(prepared, prepared.teacher_source, section, "auto" if auto else "float32")
    adapters, replaced = merge_peft_folder(loaded.model, find_peft_folder(section.adapters, prepared.recipe.base))
    fresh = tuple(name for name in loaded.fresh_keys if name not in replaced)
    refuse_random_head(prepared, replace(loaded, fresh_keys=fresh))
    model: nn.Module = loaded.model.eval().requires_grad_(True)
    if not auto:
        to_dtype(getattr(torch, loading_dtype(section)), [model])
    return Teacher(model, adapters)


def kept_adapters(prepared: Prepared, section: TeacherConfig, folder: Path) -> dict[str, Tensor] | None:
    """Return the A matrices of a kept teacher: those it was trained with, or those that the method asks to be made."""
    assert section.finetune is not None, "only such teachers are kept"
    if "lora" in section.finetune:
        return load_matrices(folder / ADAPTERS_FOLDER / "lora.safetensors")
    rank = svd_rank(prepared.recipe)
    if rank is None:
        return None
    place = folder / ADAPTERS_FOLDER / f"svd-{rank}"
    if not agreed(place.exists()):
        if PartialState().is_main_process:
            finetuned = open_model(prepared, str(folder), section, "float32").model
            matrices = svd_adapters(finetuned, starting_model(prepared, section), rank)
            with explained_disk_errors("The teacher's adapters", place, ELSEWHERE), whole_folder(place) as partial:
                save_matrices(partial / "svd.safetensors", matrices, {"rank": rank})
        PartialState().wait_for_everyone()
    return load_matrices(place / "svd.safetensors")


def open_model(prepared: Prepared, source: str, section: Any, dtype: str, replace_head: bool = False) -> LoadedModel:
    """Load a model with the head that the task needs, and with the names of the labels in its config."""
    reader = prepared.for_teacher if section is prepared.recipe.teacher else prepared
    loaded = load_model(
        source,
        prepared.recipe.data.task,
        num_labels=prepared.labels.num_labels or None,
        trust_remote_code=section.trust_remote_code,
        dtype=dtype,
        revision=section.revision,
        attn_implementation=section.attn_implementation,
        pad_token_id=reader.collator.filler,
        replace_head=replace_head,
        seed=DEFAULT_SEED,
    )
    if names := names_of_classes(prepared):
        loaded.model.config.id2label = dict(enumerate(names))
        loaded.model.config.label2id = {name: index for index, name in enumerate(names)}
    return loaded


def names_of_classes(prepared: Prepared) -> tuple[str, ...]:
    """Return the data's names; where they hold bare numbers, those of a teacher that has learned the task already."""
    labels, section, teacher = prepared.labels, prepared.recipe.teacher, prepared.teacher_config
    if labels.named or teacher is None or section is None or section.finetune is not None:
        return labels.names
    return class_names(teacher) if teacher.num_labels == labels.num_labels else labels.names


def starting_model(prepared: Prepared, section: TeacherConfig) -> nn.Module:
    """Return what fine-tuning starts from: the pretrained model with a head for the task, or random weights."""
    if prepared.teacher_source is not None:
        return open_model(prepared, prepared.teacher_source, section, "float32", replace_head=True).model
    assert prepared.teacher_config is not None, "prepare() has made it of the architecture"
    task, labels = prepared.recipe.data.task, prepared.labels.num_labels or None
    config = copy.deepcopy(prepared.teacher_config)
    set_padding(config, task, prepared.for_teacher.collator.filler)
    return new_model(config, task, labels, DEFAULT_SEED)


def refuse_random_head(prepared: Prepared, loaded: LoadedModel) -> None:
    """Raise UserError when the teacher has weights that no training gave it and the method learns from it."""
    learns = prepared.recipe.method.name != "none"
    if loaded.fresh_keys and learns:
        raise UserError(
            f"The teacher {prepared.teacher_source} has no trained head for this task (new weights: "
            f"{', '.join(loaded.fresh_keys[:4])}), so its predictions would be noise. Add "
            "teacher.finetune: {num_train_epochs: 3, learning_rate: 5.0e-5}, or give a fine-tuned model."
        )


def teacher_fingerprint(prepared: Prepared, model: Any) -> str:
    """Return what identifies a fine-tuned teacher: first weights, tokenised training data, arguments, versions."""
    assert prepared.recipe.teacher is not None
    lora = "lora" in (prepared.recipe.teacher.finetune or {})
    collator = make_collator(prepared.recipe, prepared.for_teacher.tokenizer, [model.config])
    filler = unusual_padding(model.config, prepared.recipe.data.task, collator)
    return fingerprint_json(
        {
            "weights": fingerprint_model(model),
            "config": {key: value for key, value in model.config.to_dict().items() if key not in NAMES_ONLY},
            "processes": PartialState().num_processes,
            "data": fingerprint_dataset(prepared.for_teacher.datasets["train"]),
            "task": prepared.recipe.data.task,
            "padding": [prepared.recipe.data.padding, prepared.recipe.data.pad_to_multiple_of],
            **({"padding token": filler} if filler is not None else {}),
            "finetune": {**own_defaults(), **(prepared.recipe.teacher.finetune or {})},
            "versions": [torch.__version__, transformers.__version__, *([peft.__version__] if lora else [])],
        }
    )


def make_teacher(prepared: Prepared, model: Any, folder: Path, make_input: Callable[[Path], StageInput]) -> None:
    """Fine-tune `model` on the labels and put it in `folder`; an interrupted fine-tuning goes on where it was."""
    assert prepared.recipe.teacher is not None and prepared.recipe.teacher.finetune is not None
    work = folder.with_name(f"{folder.name}.work")
    seed = int(prepared.recipe.teacher.finetune.get("seed", DEFAULT_SEED))
    given = replace(
        make_input(work),
        training=finetune_arguments(prepared.recipe),
        seed=seed,
        datasets=prepared.for_teacher.datasets,
        tokenizer=prepared.for_teacher.tokenizer,
        collator=make_collator(prepared.recipe, prepared.for_teacher.tokenizer, [model.config]),
    )
    lora = prepared.recipe.teacher.finetune.get("lora")
    if lora is not None:
        shape = AdapterConfig(**lora)
        add_adapters(model, shape.rank, shape.scale, shape.dropout, seed)
        train_adapters_and_head(model)
    stage = Stage("teacher", model, nn.ModuleList([TaskTerm(prepared.recipe.data.task, 1.0)]), stock=lora is None)
    run_stage(stage, given, teacher=None)
    matrices = adapter_matrices(model)
    merge_adapters(model)
    if PartialState().is_main_process:
        keep_teacher(prepared, model, folder, matrices)
        shutil.rmtree(work, ignore_errors=True)
    PartialState().wait_for_everyone()


def keep_teacher(
    prepared: Prepared, model: nn.Module, folder: Path, matrices: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Write a fine-tuned teacher, with what it was made from and the A and B merged into it, to its place."""
    assert prepared.recipe.teacher is not None and prepared.recipe.teacher.finetune is not None
    with explained_disk_errors("The fine-tuned teacher", folder, ELSEWHERE), whole_folder(folder) as partial:
        save_student(model, partial, prepared.for_teacher.tokenizer)
        if matrices:
            note = prepared.recipe.teacher.finetune["lora"]
            save_matrices(partial / ADAPTERS_FOLDER / "lora.safetensors", matrices, note)
        write_json(
            partial / MADE_FROM,
            {
                "model": prepared.recipe.teacher.model or prepared.recipe.teacher.architecture,
                "data": prepared.recipe.data.model_dump(mode="json"),
                "finetune": prepared.recipe.teacher.finetune,
            },
        )
