"""A tiny pair with a context, to run TED's stages one by one without a runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny_models import tiny_model
from torch import Tensor, nn
from toy import ToyCollator, toy_dataset

import layerdistill as ld
from layerdistill.api import make_pair
from layerdistill.context import LiveContext
from layerdistill.core.types import Batch, Pair, RunContext, Stage
from layerdistill.methods.ted import METHOD, TedConfig
from layerdistill.signals import LiveTeacher
from layerdistill.train.stage import StageInput, run_stage

QUIET = Console(quiet=True)

RUNNING: list[Any] = []
"""Generators in the middle of a phase: one that is thrown away would end it."""


class ToyContext:
    """What a method asks of a run; `decisions` are kept, `said` is what it told the user."""

    def __init__(self, task: str, epochs: int = 3, size: int = 12) -> None:
        self.epochs = epochs
        self.rows = toy_dataset(task, size)
        self.collate = ToyCollator(task)
        self.decisions: dict[str, Any] = {}
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def decide(self, name: str, choose: Callable[[], Any]) -> Any:
        if name not in self.decisions:
            self.decisions[name] = choose()
        return self.decisions[name]

    def training_batches(self) -> Iterator[Batch]:
        for start in range(0, len(self.rows), 4):
            yield self.collate([self.rows[row] for row in range(start, start + 4)])


def toy_pair(family: str, task: str = "sequence-classification", seed: int = 7) -> Pair:
    """A teacher of 4 blocks and a student of 2, which for language models is as wide as the teacher."""
    head = "causal-lm" if task == "causal-lm" else "sequence-classification"
    extra = {
        "regression": {"num_labels": 1, "problem_type": "regression"},
        "multi-label-classification": {"problem_type": "multi_label_classification"},
    }.get(task, {})
    teacher = tiny_model(family, head, seed=1, **extra)
    shape = {} if task == "causal-lm" else {"hidden_size": 16, "init": "truncate"}
    return make_pair(teacher, ld.make_student(teacher, num_blocks=2, **shape), seed)


def stages_of(pair: Pair, context: ToyContext | None = None, **options: Any) -> dict[str, Stage]:
    """All stages by name, without training any of them."""
    context = context or ToyContext(pair.task)
    found: RunContext = context  # type: ignore[assignment]
    return {stage.name: stage for stage in METHOD.stages(pair, TedConfig(**options), found)}


def stage_of(name: str, pair: Pair, context: ToyContext | None = None, **options: Any) -> Stage:
    """The stages up to `name`, while its own phase is going on."""
    stages = METHOD.stages(pair, TedConfig(**options), context or ToyContext(pair.task))  # type: ignore[arg-type]
    RUNNING.append(stages)
    return next(stage for stage in stages if stage.name == name)


def run_ted(pair: Pair, folder: Path, collator: Any = None, **options: Any) -> list[str]:
    """Run the whole method and return the names of its stages; `before` is told each of them before it runs."""
    training, before = options.pop("training", {}), options.pop("before", lambda stage: None)
    given = StageInput(
        pair.task,
        {"train": toy_dataset(pair.task, 24)},
        collator or ToyCollator(pair.task),
        None,
        {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "save_strategy": "no", **training},
        pair.seed,
        folder,
        QUIET,
    )
    names = []
    for stage in METHOD.stages(pair, TedConfig(**options), LiveContext(given, [])):
        before(stage.name)
        run_stage(stage, given, LiveTeacher(pair.teacher))
        names.append(stage.name)
    return names


def block_outputs(model: Any, batch: Batch) -> list[Tensor]:
    """What each block gives, in float64 and eval mode, by hooks of this test's own."""
    base = model.double().eval().base_model
    blocks = getattr(base, "layers", getattr(base, "h", None)) or base.encoder.layer
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda module, args, output: found.append(output if torch.is_tensor(output) else output[0])
        )
        for block in blocks
    ]
    with torch.no_grad():
        base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    return found


def linear(module: nn.Module, rows: Tensor) -> Tensor:
    """An affine map in float64."""
    return rows @ module.weight.detach().double().T + module.bias.detach().double()
