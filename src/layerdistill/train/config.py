"""Training arguments: transformers' own fields, with defaults that suit distillation and a few fields of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

TERM_GRADIENT_STEPS = 200
"""Steps between two measurements of the terms' gradient norms, where nothing else is asked for."""


@dataclass
class LayerDistillationConfig(TrainingArguments):
    """transformers' TrainingArguments with other defaults and the fields below; every transformers field works.

    Other defaults: logging every 50 steps; only the newest checkpoint is kept; no per-step check of the loss for NaN (a
    host synchronisation), because the logged means are checked; memory is pinned only where there is an accelerator;
    batches of examples of like length, shuffled (see `EpochSampler`), which hold little padding.
    """

    term_gradient_steps: int = field(
        default=TERM_GRADIENT_STEPS,
        metadata={"help": "Steps between two measurements of each term's gradient norm; 0 turns them off."},
    )
    padding_free: bool = field(
        default=True,
        metadata={
            "help": "Run blocks on packed texts, without padding, where that saves work and the models allow it."
        },
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two log lines."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept; the newest is always kept."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "Pin memory; by default with an accelerator."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length, random, sequential or batch_rebalance."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "See transformers' TrainingArguments."})


RESERVED = {
    "output_dir": "the recipe's `output` decides it",
    "seed": "the recipe's `seed` decides it",
    "data_seed": "the recipe's `seed` decides it",
    "resume_from_checkpoint": "the same command resumes by itself",
    "remove_unused_columns": "the data section decides which columns there are",
    "save_only_model": "a run must be able to go on from its checkpoints",
    "ignore_data_skip": "a resumed run sees the data that it has not seen",
    "label_smoothing_factor": "the task term is the loss on the labels, and a teacher smooths them anyway",
    "neftune_noise_alpha": "noise on the student's embeddings would be matched with the teacher's states",
    "use_liger_kernel": "it changes the model's own loss, which is not used here",
}
"""TrainingArguments that a recipe may not set, and why."""


def field_names() -> list[str]:
    """Return the names that a recipe's training section may use."""
    return [item.name for item in fields(LayerDistillationConfig) if item.init and item.name not in RESERVED]


NOT_LEARNING = frozenset(
    {
        "term_gradient_steps",
        "padding_free",
        "logging_steps",
        "save_total_limit",
        "dataloader_pin_memory",
        "logging_nan_inf_filter",
    }
)
"""Defaults of ours that change nothing about what is learned."""


def own_defaults() -> dict[str, Any]:
    """Return the defaults of ours that what is learned depends on, by field; transformers' follow from its version."""
    theirs = {item.name: item.default for item in fields(TrainingArguments)}
    return {
        item.name: item.default
        for item in fields(LayerDistillationConfig)
        if item.name not in NOT_LEARNING and item.default != theirs.get(item.name)
    }


def build_arguments(training: dict[str, Any], output_dir: str, seed: int) -> LayerDistillationConfig:
    """Return the arguments of one stage; raises ValueError or TypeError from transformers for impossible values.

    Without an accelerator `use_cpu` is set, because transformers refuses `bf16` on a processor otherwise.
    """
    ours = {"output_dir": output_dir, "seed": seed}
    if not torch.accelerator.is_available():
        ours["use_cpu"] = True
    arguments = LayerDistillationConfig(**{**training, **ours})
    if arguments.load_best_model_at_end and arguments.save_total_limit == 1:
        arguments.save_total_limit = 2  # transformers would delete the newest checkpoint when it is not the best
    return arguments


DEFAULTS = {item.name: item.default for item in fields(LayerDistillationConfig)}


def argument_of(training: Mapping[str, Any] | TrainingArguments, name: str) -> Any:
    """Return a training argument of a recipe's section or of what Python code gave, else its default.

    TrainingArguments are not built for it, which would disturb a running trainer; transformers' own lack our fields.
    """
    if isinstance(training, TrainingArguments):
        return getattr(training, name, DEFAULTS[name])
    return training.get(name, DEFAULTS[name])


def count_epochs(examples: int, argument: Callable[[str], Any]) -> int:
    """Return the passes over `examples` in one stage, on all processes together, rounded up.

    `argument` gives a training argument by its name.
    """
    max_steps = argument("max_steps")
    if max_steps <= 0:
        return math.ceil(argument("num_train_epochs"))
    per_step = argument("per_device_train_batch_size") * argument("gradient_accumulation_steps")
    steps = math.ceil(examples / (per_step * PartialState().num_processes))
    return math.ceil(max_steps / max(steps, 1))
