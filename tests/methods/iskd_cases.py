"""Pairs, stages and short trainings that the tests of iskd share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from tiny_models import DECODERS, tiny_model
from torch import nn
from toy import ToyCollator, toy_dataset

import layerdistill as ld
from layerdistill.api import make_pair
from layerdistill.context import LiveContext
from layerdistill.core.types import Pair, Stage
from layerdistill.data import set_aside
from layerdistill.evaluate import EvaluationConfig
from layerdistill.methods.iskd import METHOD
from layerdistill.methods.iskd_config import IskdConfig
from layerdistill.models import find_stacks
from layerdistill.models.modeling_compact import CompactBlock
from layerdistill.signals import LiveTeacher
from layerdistill.train.stage import StageInput, run_stage

QUICK: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "save_steps": 2, "logging_steps": 1,
    "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant",
}  # fmt: skip


def task_of(family: str) -> str:
    return "causal-lm" if family in DECODERS else "sequence-classification"


def pair_for(family: str = "gpt2", seed: int = 7, **options: Any) -> Pair:
    """A teacher and a student that is a copy of it."""
    teacher = tiny_model(family, task_of(family), **{"num_layers": 4, "hidden_size": 48, "seed": 1, **options})
    return make_pair(teacher, ld.make_student(teacher).float(), seed)


def given_for(pair: Pair, folder: Path, config: IskdConfig, **training: Any) -> StageInput:
    datasets = {"train": toy_dataset(pair.task, size=48, seed=3), "validation": toy_dataset(pair.task, size=16, seed=4)}
    if config.calibration is not None:
        datasets = set_aside(datasets, config.calibration, pair.seed)
    args = {**QUICK, **training}
    return StageInput(
        pair.task, datasets, ToyCollator(pair.task), None, args, pair.seed, folder, Console(quiet=True)
    )  # fmt: skip


class Heard(LiveContext):
    """A run's context that keeps what the user was told."""

    said: list[str]

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


def stages_of(
    pair: Pair, config: IskdConfig, folder: Path, **training: Any
) -> tuple[Iterator[Stage], StageInput, Heard]:
    given = given_for(pair, folder, config, **training)
    context = Heard(given, EvaluationConfig().metrics_for(pair.task))
    context.said = []
    return METHOD.stages(pair, config, context), given, context


def train(pair: Pair, config: IskdConfig, folder: Path, **training: Any) -> list[str]:
    """Run all stages and return their names."""
    stages, given, _ = stages_of(pair, config, folder, **training)
    names = []
    source = LiveTeacher(pair.teacher)
    for stage in stages:
        run_stage(stage, given, source)
        names.append(stage.name)
    return names


def replaced_places(model: nn.Module) -> list[int]:
    return [n for n, block in enumerate(find_stacks(model)[""].blocks) if isinstance(block, CompactBlock)]
