"""Fine-tuning on the labels alone: what every distillation has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn

from layerdistill.core.config import SectionConfig
from layerdistill.core.types import Pair, RunContext, Stage, StagePreview
from layerdistill.methods.preview import preview_stages
from layerdistill.methods.task_term import TaskTerm


class NoneConfig(SectionConfig):
    """`method: {name: none}`; no teacher is run."""

    name: Literal["none"] = "none"


class NoDistillation:
    """Train the student on the labels only, from the same start and with the same budget."""

    name = "none"
    summary = "fine-tuning on the labels alone, no teacher: what every method has to beat"
    Config = NoneConfig
    one_stage = True
    grows_student = False

    def stages(self, pair: Pair, config: NoneConfig, context: RunContext | None = None) -> Iterator[Stage]:
        """One stage with the task term."""
        yield Stage("distill", pair.student, nn.ModuleList([TaskTerm(pair.task, 1.0)]))

    def preview(self, pair: Pair, config: NoneConfig) -> list[StagePreview]:
        """The one stage."""
        return preview_stages(self.stages(pair, config))

    def problems(self, config: NoneConfig, pair: Pair) -> list[str]:
        """Nothing can be wrong."""
        return []


METHOD = NoDistillation()
