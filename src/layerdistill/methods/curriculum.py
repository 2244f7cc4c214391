"""Coefficients that change from epoch to epoch: LoRAILD's curriculum, and the term that follows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import NonNegativeInt
from torch import nn

from layerdistill.core.config import SectionConfig
from layerdistill.core.types import Batch, Mean, Needs, Progress, Signal, Unit
from layerdistill.matching.vocabulary_loss import VocabularyPart

Coefficients = Mapping[str, float]
"""The multipliers of the terms `task`, `logits` and `hidden`."""

BEFORE: Coefficients = {"task": 1 / 2, "logits": 1 / 2, "hidden": 0.0}
AFTER: dict[str, Coefficients] = {
    "normal": {"task": 1 / 3, "logits": 1 / 3, "hidden": 1 / 3},
    "kd_rem": {"task": 1 / 2, "logits": 0.0, "hidden": 1 / 2},
}
"""The released code's values."""


class CurriculumConfig(SectionConfig):
    """When the loss on hidden states begins; it takes the place of `weights`."""

    start: NonNegativeInt | None = None
    """The epoch, from 0, in which it begins; null is no curriculum. Until then 1/2 task and 1/2 logits."""

    shape: Literal["sharp", "smooth"] = "sharp"
    """sharp: all at once; smooth: in equal steps from epoch to epoch, complete in the last one."""

    mode: Literal["normal", "kd_rem"] = "normal"
    """What it comes to: normal is 1/3 each; kd_rem is 1/2 task and 1/2 hidden, without the logits."""


def too_late(start: int | None, epochs: int) -> str | None:
    """Return a sentence when a curriculum begins after a training of so many epochs, else None (or without one)."""
    if start is None or start < epochs:
        return None
    return (
        f"method.curriculum.start is {start}, but the training has {epochs} epochs, counted from 0: the loss between "
        f"the adapters would never begin. Take at most {epochs - 1}, or train longer."
    )


@dataclass(frozen=True)
class Curriculum:
    """The coefficients of a training of `epochs` epochs, from 0.

    Source: LoRAILD's released code. `sharp` is a step at epoch `start`; `smooth` goes from before to after by
    `k = (epoch - start + 1) / (epochs - start)`.
    """

    start: int
    shape: str
    mode: str
    epochs: int

    def at(self, epoch: int) -> Coefficients:
        """Return the coefficients in force in an epoch."""
        if epoch < self.start:
            return BEFORE
        after = AFTER[self.mode]
        if self.shape == "sharp":
            return after
        share = min((epoch - self.start + 1) / (self.epochs - self.start), 1.0)
        return {name: (1 - share) * BEFORE[name] + share * after[name] for name in after}


class ScheduledTerm(nn.Module):
    """A term whose coefficient is the curriculum's; where that is 0 it is not computed and asks for nothing."""

    def __init__(self, term: Any, curriculum: Curriculum) -> None:
        super().__init__()
        self.name = term.name
        self.term = term
        self.curriculum = curriculum

    def factor(self, progress: Progress) -> float:
        """Return what the curriculum multiplies the term by at this point of training."""
        return self.curriculum.at(progress.epoch)[self.name]

    def needs(self, progress: Progress) -> Needs:
        """What the term needs, while it counts."""
        return self.term.needs(progress) if self.factor(progress) else Needs()

    def vocabulary_part(self, progress: Progress) -> VocabularyPart | None:
        """The term's, while it counts."""
        part = getattr(self.term, "vocabulary_part", None)
        return part(progress) if part is not None and self.factor(progress) else None

    def unit(self, name: str) -> Unit:
        """The term's."""
        return self.term.unit(name)

    def coefficient(self, name: str, progress: Progress) -> float:
        """The term's own, multiplied by the curriculum's."""
        return self.term.coefficient(name, progress) * self.factor(progress)

    def forward(self, student: Signal, teacher: Signal | None, batch: Batch, progress: Progress) -> dict[str, Mean]:
        """Return the term's means, none while it does not count."""
        return self.term(student, teacher, batch, progress) if self.factor(progress) else {}
