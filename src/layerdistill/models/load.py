"""Load models, configurations and tokenizers from a folder, an installed package or the hub; safetensors only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.padding import set_padding
from layerdistill.core.seeds import seeded
from layerdistill.models.locate import is_local, resolve_model_source
from layerdistill.models.own_code import class_named, class_to_open
from layerdistill.models.tasks import class_for, set_task

_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, StrictDataclassError)


@dataclass(frozen=True)
class LoadedModel:
    """A model, where it came from, and the names of its tensors that the checkpoint did not have.

    `fresh_keys` were initialised from the seed: a teacher whose head is among them has not learned the task.
    """

    model: PreTrainedModel
    fresh_keys: tuple[str, ...]
    source: str


def load_config(source: str, trust_remote_code: bool = False, revision: str | None = None) -> PretrainedConfig:
    """Return a model's configuration; raises UserError when there is none or its code may not be run."""
    source = resolve_model_source(source)
    with _explained("the configuration", source), _quiet():
        return transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, revision=revision, local_files_only=is_local(source)
        )


def load_model(
    source: str,
    task: str,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
    dtype: str = "float32",
    revision: str | None = None,
    attn_implementation: str | None = None,
    pad_token_id: int | None = None,
    replace_head: bool = False,
    seed: int = 0,
) -> LoadedModel:
    """Return the model for `task` in eval mode, with the head of its checkpoint or a fresh one drawn from `seed`.

    `task` is a key of `TASK_CLASSES`. `num_labels` None keeps the checkpoint's (1 in regression). `pad_token_id` is set
    where the configuration has none that is a row of the embedding and the model finds the end of a text by it. With
    `replace_head` a head of another number of labels is thrown away and drawn anew. Raises UserError for an unknown
    task, a source that cannot be read, weights that are not safetensors or are damaged, and a head or blocks that do
    not fit.
    """
    model_class = class_for(task)
    source = resolve_model_source(source)
    config = load_config(source, trust_remote_code, revision)
    set_task(config, task, num_labels)
    if pad_token_id is not None:
        set_padding(config, task, pad_token_id)
    if is_local(source):
        check_weights(Path(source))
    model_class = class_to_open(model_class, config)
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _explained("the model", source), _quiet(), seeded(seed, "head"):
        model, info = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=revision,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=is_local(source),
            **extra,
        )
    fresh = _fresh_keys(model, info, source, replace_head)
    return LoadedModel(model.eval(), fresh, source)


def load_student(folder: str | Path) -> PreTrainedModel:
    """Return the student of a run folder, or of a folder that holds a model, in eval mode with its own head.

    Raises UserError when there is no model, or one of a class that transformers does not have.
    """
    place = Path(folder)
    place = place / "student" if (place / "student").is_dir() else place
    config = load_config(resolve_model_source(str(place)))
    check_weights(place)
    model_class = class_named(config)
    if model_class is None:
        name = next(iter(config.architectures or ()), None)
        raise UserError(f"{place / 'config.json'} names the class {name!r}, which transformers does not have.")
    with _explained("the student", str(place)), _quiet():
        return model_class.from_pretrained(place, use_safetensors=True, local_files_only=True).eval()


def check_weights(folder: Path) -> None:
    """Raise UserError unless `folder` holds whole safetensors files; only their headers are read."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error}): copy or save the model again.") from error
    if not files:
        pickles = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in folder.glob(ending))
        if pickles:
            raise UserError(
                f"{folder} holds weights only as {', '.join(pickles)}, a pickle, which can run code when opened and is "
                "never read here. Convert it where you trust it: AutoModel...from_pretrained(folder)."
                "save_pretrained(folder) writes model.safetensors."
            )
        raise UserError(f"there are no weights in {folder}: expected model.safetensors (or its parts and index).")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, though {index.name} names it: copy the whole model again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or cut off ({error}): copy or save the model again.") from error


def _fresh_keys(model: PreTrainedModel, info: dict[str, Any], source: str, replace_head: bool) -> tuple[str, ...]:
    """Return the tensors that were initialised anew, or raise UserError when that must not be."""
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    missing = set(info["missing_keys"])
    blocks = sorted(name for name in missing if name.startswith(base) and re.search(r"\.\d+\.", name))
    if blocks:
        raise UserError(
            f"the weights in {source} do not fit {type(model).__name__}: {len(blocks)} tensors of its blocks are not "
            f"in them, {blocks[0]} for example. Check that config.json belongs to these weights."
        )
    mismatched = {name: (tuple(stored), tuple(built)) for name, stored, built in info["mismatched_keys"]}
    inner = [name for name in mismatched if name.startswith(base)]
    if mismatched and (inner or not replace_head):
        name = sorted(inner or mismatched)[0]
        stored, built = mismatched[name]
        raise UserError(
            f"{name} in {source} has the shape {stored}, but {built} is needed: "
            + (
                "config.json does not belong to these weights."
                if inner
                else f"the model was trained for {stored[0]} labels and the data has {built[0]}. Use data with the "
                "same labels, or fine-tune the model on yours, which replaces its head."
            )
        )
    return tuple(sorted(missing | set(mismatched)))


@contextmanager
def _explained(what: str, source: str) -> Iterator[None]:
    """Turn what transformers raises about `source` into a UserError."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"the weights of {source} are damaged ({error}): delete that copy and load it again."
        ) from error
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split("Model type should be")[0].split())
        hint = (
            "Check the folder."
            if is_local(source)
            else "There is no such folder, so it was read as a hub id: check the spelling, the network and your access."
        )
        if "trust_remote_code" in reason:
            hint = (
                "It brings its own Python code: read that, and allow it with trust_remote_code: true if you trust it."
            )
        raise UserError(f"{what} of {source!r} cannot be loaded: {reason} {hint}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading report and progress bar off the terminal; `LoadedModel` says what matters of it."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
