"""The loss on the labels."""

from __future__ import annotations

from torch import nn

from layerdistill.core.types import Batch, Mean, Needs, Progress, Signal, Unit
from layerdistill.matching.task_loss import label_unit, task_loss
from layerdistill.matching.vocabulary_loss import VocabularyPart


class TaskTerm(nn.Module):
    """The student's loss on the labels; named `task`."""

    name = "task"

    def __init__(self, task: str, weight: float) -> None:
        super().__init__()
        self.task = task
        self.weight = weight

    def needs(self, progress: Progress) -> Needs:
        """The student's logits."""
        return Needs(student_logits=True)

    def vocabulary_part(self, progress: Progress) -> VocabularyPart | None:
        """The cross-entropy, in language modelling."""
        return VocabularyPart("task") if self.task == "causal-lm" else None

    def unit(self, name: str) -> Unit:
        """Labelled positions or examples."""
        return label_unit(self.task)

    def coefficient(self, name: str, progress: Progress) -> float:
        """The weight, at all times."""
        return self.weight

    def forward(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        """Return `{"task": loss on the labels}`."""
        assert student.logits is not None, "the composite always asks the student for logits"
        return {self.name: task_loss(self.task, student.logits, batch)}
