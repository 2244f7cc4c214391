"""Adapters on disk: peft's folders, and the A and B matrices that are kept beside a merged teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from layerdistill.core.errors import UserError
from layerdistill.models.adapters import adapted_layers, empty_adapters, peft_adapters
from layerdistill.models.config import AdapterConfig, TeacherConfig
from layerdistill.models.locate import is_local, resolve_model_source
from layerdistill.models.structure import unwrap
from layerdistill.models.tasks import empty_model

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
PEFT_A = ".lora_A.weight"


def save_matrices(file: Path, matrices: Mapping[str, tuple[Tensor, Tensor]], note: Mapping[str, object]) -> None:
    """Write A and B as `<module path>.A` and `<module path>.B`, with `note` as text in the header."""
    tensors = {f"{path}.{name}": pair[side] for path, pair in matrices.items() for side, name in enumerate("AB")}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        file,
        metadata={key: str(value) for key, value in note.items()},
    )


def load_matrices(file: Path) -> dict[str, Tensor]:
    """Return the A matrices of a file that `save_matrices` wrote, by module path; raises UserError if damaged."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}): delete its folder, and it is made again.") from error
    return {name.removesuffix(".A"): tensor for name, tensor in tensors.items() if name.endswith(".A")}


def find_peft_folder(text: str, base: Path | None = None) -> Path:
    """Return the folder that holds a LoRA adapter of peft; raises UserError when it is none, or holds a pickle only."""
    source = resolve_model_source(text, base)
    folder = Path(source)
    if not is_local(source) or not (folder / PEFT_CONFIG).is_file() or not (folder / PEFT_WEIGHTS).is_file():
        raise UserError(
            f"teacher.adapters is {text!r}, which is no folder with {PEFT_CONFIG} and {PEFT_WEIGHTS}: give what peft's "
            "save_pretrained writes (adapters on the hub must be downloaded first)."
        )
    try:
        kind = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / PEFT_CONFIG} is damaged ({error}): copy or save the adapter again.") from error
    if kind != "LORA":
        raise UserError(f"teacher.adapters is {text!r}, an adapter of the kind {kind}: only LORA can be compared.")
    return folder


def peft_folder_shapes(folder: Path) -> dict[str, Tensor]:
    """Return the A matrices in a peft folder without numbers (meta device), by module path."""
    try:
        with safe_open(folder / PEFT_WEIGHTS, framework="pt") as tensors:
            names = [name for name in list(tensors.keys()) if name.endswith(PEFT_A)]
            shapes = {name: tensors.get_slice(name).get_shape() for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / PEFT_WEIGHTS} is damaged ({error}): copy or save the adapter again.") from error
    return {
        name.removeprefix(PEFT_PREFIX).removesuffix(PEFT_A): torch.empty(shape, device="meta")
        for name, shape in shapes.items()
    }


def merge_peft_folder(model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Merge a peft folder into `model`, in place; return its A matrices and the names of the tensors it replaced.

    Raises UserError when the adapters belong to another model.
    """
    inner = unwrap(model)
    known = set(dict(inner.named_modules()))
    wanted = peft_folder_shapes(folder)
    foreign = sorted(set(wanted) - known)
    if foreign:
        raise UserError(
            f"teacher.adapters: {folder} adapts {foreign[0]}, which {type(inner).__name__} does not have. Give the "
            "adapters of this model, saved with the head of the same task."
        )
    try:
        wrapped = PeftModel.from_pretrained(inner, str(folder))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"teacher.adapters: {folder} does not fit the teacher ({error}).") from error
    if set(adapted_layers(wrapped)) != set(wanted):
        raise UserError(
            f"teacher.adapters: {folder / PEFT_CONFIG} adapts other modules than {PEFT_WEIGHTS} has weights for: copy "
            "or save the adapter again."
        )
    adapters = peft_adapters(wrapped)
    assert adapters is not None, "a PeftModel of the kind LORA"
    saved = getattr(wrapped.peft_config[wrapped.active_adapter], "modules_to_save", None) or ()
    wrapped.merge_and_unload()
    if hasattr(inner, "peft_config"):
        del inner.peft_config
    return adapters, {name for name, _ in inner.named_parameters() if set(saved) & set(name.split("."))}


def planned_adapters(
    section: TeacherConfig | None, config: PreTrainedConfig | None, task: str, base: Path | None, svd_rank: int | None
) -> dict[str, Tensor] | None:
    """Return the shapes of the adapters that a recipe's teacher will have (meta device); None for one without.

    `svd_rank` is the rank to take out of a full fine-tuning, None where nobody asks for that. Raises UserError for a
    folder without adapters, and for a singular value decomposition of a teacher that is not fully fine-tuned.
    """
    if section is None or config is None:
        return None
    finetune = section.finetune or {}
    if svd_rank is not None and (section.finetune is None or "lora" in finetune or section.model is None):
        raise UserError(
            "method.teacher_adapters is 'svd', which takes adapters out of a full fine-tuning of a pretrained teacher. "
            "Give teacher.model with teacher.finetune and without lora, or leave teacher_adapters out."
        )
    if section.adapters is not None:
        return peft_folder_shapes(find_peft_folder(section.adapters, base))
    rank = AdapterConfig(**finetune["lora"]).rank if "lora" in finetune else svd_rank
    return empty_adapters(empty_model(config, task), rank) if rank is not None else None
