"""What each method needs to run on tiny models: its options, and what it asks of teacher and student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from toy import toy_dataset
from toy_recipe import toy_tokenizer
from transformers import PreTrainedModel

import layerdistill as ld
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.methods.table import METHODS
from layerdistill.models.projections import projection_paths

ENCODERS = ("bert", "roberta", "deberta-v2", "modernbert")
DECODERS = ("gpt2", "opt", "gpt-neox", "llama", "qwen3", "phi")
FAMILIES = (*ENCODERS, *DECODERS)
PAIRS = [(method, family) for method in METHODS for family in FAMILIES]

OPTIONS: dict[str, dict[str, Any]] = {
    "lora_ild": {"rank": 4},
    "rail_kd": {"projection_size": 8},
    "iskd": {
        "num_replaced": 2, "new_learning_rate": 5e-3, "warmup_steps": 6,
        "block": {"hidden_size": 16, "num_attention_heads": 2, "num_inner_blocks": 1},
    },
    "layer_prune": {"num_removed": 2, "calibration": {"examples": 8}, "repair": {"scope": "all"}},
    "l1_prune": {"removed": 0.1},
}  # fmt: skip
"""Options beside the name; methods that are not here run with their defaults."""


def task_of(family: str) -> str:
    return "causal-lm" if family in DECODERS else "sequence-classification"


def auto_class(family: str) -> type:
    decoder = family in DECODERS
    return transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForSequenceClassification


def make_teacher(method: str, family: str) -> Any:
    """A teacher of four blocks; with LoRA adapters that do something for the method that compares those."""
    teacher = tiny_model(family, task_of(family), num_layers=4, hidden_size=32, num_heads=4, seed=1)
    if method != "lora_ild":
        return teacher
    config = LoraConfig(r=4, lora_alpha=8, target_modules=projection_paths(teacher), fan_in_fan_out=family == "gpt2")
    adapted = get_peft_model(teacher, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapted


def make_start(method: str, family: str, teacher: Any) -> PreTrainedModel | None:
    """The student at its start; None where the method makes it of the teacher."""
    if METHODS[method].grows_student:
        return None
    base = teacher
    if method == "lora_ild":
        base = tiny_model(family, task_of(family), num_layers=4, hidden_size=32, num_heads=4, seed=1)
    if method == "ted" and family in DECODERS:  # the filters of a language model need the model's width
        return ld.make_student(base, num_blocks=2)
    return ld.make_student(base, num_blocks=2, hidden_size=16, init="truncate")


def distilled(method: str, family: str, folder: Path, steps: int, **changes: Any) -> tuple[Any, PreTrainedModel]:
    """Run a method from its start with a teacher of its own; return the teacher and the student."""
    teacher = make_teacher(method, family)
    args = ld.LayerDistillationConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=16, learning_rate=5e-3, use_cpu=True,
        logging_steps=5, disable_tqdm=True, lr_scheduler_type="constant", seed=11, **{"save_steps": 4, **changes},
    )  # fmt: skip
    before = fingerprint_model(teacher)
    result = ld.distill(
        teacher if method != "none" else None, make_start(method, family, teacher),
        toy_dataset(task_of(family), size=56, seed=3), method=method, processing_class=toy_tokenizer(), args=args,
        **OPTIONS.get(method, {}),
    )  # fmt: skip
    assert fingerprint_model(teacher) == before, "the teacher keeps its weights"
    return teacher, result.student
