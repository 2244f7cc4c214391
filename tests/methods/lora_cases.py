"""Pairs and stages that the tests of LoRAILD share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from tiny_models import tiny_model
from torch import Tensor, nn

from layerdistill.api import make_pair
from layerdistill.core.types import Pair, Stage
from layerdistill.methods.adapter_term import AdapterTerm
from layerdistill.methods.lora_ild import METHOD, LoraIldConfig
from layerdistill.models.adapters import empty_adapters

RANK = 4


class Context:
    """As much of a run's context as this method asks for."""

    epochs = 3


def config(**options: Any) -> LoraIldConfig:
    return LoraIldConfig(**{"rank": RANK, "dropout": 0.0, **options})


def adapters_of(teacher: nn.Module, rank: int = RANK, seed: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = empty_adapters(teacher, rank)
    return {path: torch.randn(shape.shape, generator=draw) for path, shape in shapes.items()}


def toy_pair(family: str = "bert", blocks: tuple[int, int] = (4, 2), adapters: bool = True) -> Pair:
    head = "causal-lm" if family in ("gpt2", "llama") else "sequence-classification"
    teacher = tiny_model(family, head, num_layers=blocks[0], hidden_size=32, seed=1)
    student = tiny_model(family, head, num_layers=blocks[1], hidden_size=16, seed=2)
    pair = make_pair(teacher, student, seed=3)
    return replace(pair, teacher_adapters=adapters_of(teacher)) if adapters else pair


def first_stage(pair: Pair, **options: Any) -> tuple[Stage, Iterator[Stage]]:
    stages = METHOD.stages(pair, config(**options), Context())
    return next(stages), stages


def finish(stages: Iterator[Stage]) -> None:
    assert next(stages, None) is None


def hidden_term(stage: Stage) -> AdapterTerm:
    return next(term for term in stage.terms if isinstance(term, AdapterTerm))
