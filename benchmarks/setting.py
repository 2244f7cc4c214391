"""What an arm is given, and what it has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from benchmarks.works import Collate, Work

StepDone = Callable[[], None]
"""Called by an arm after each optimisation step; it waits for the next command, and raises `Stop` at the end."""


class Stop(Exception):
    """Enough was measured."""


@dataclass(frozen=True)
class Setting:
    """A work with its data on a device; `folder` is for what an arm must write."""

    work: Work
    examples: list[dict[str, Any]]
    collate: Collate
    device: str
    folder: Path


class Running(Protocol):
    """An arm with its models loaded.

    `losses` holds the terms of the last step by the names `task`, `logits` and `hidden`, without weights; `student` is
    the module that is trained. An arm may have `parts`: the processor seconds of named parts of its steps so far.
    """

    student: Any
    losses: dict[str, Tensor]

    def train(self, step_done: StepDone) -> None:
        """Train without end, calling `step_done` after each optimisation step."""
        ...
