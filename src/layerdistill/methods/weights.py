"""The named coefficients of the objective's terms."""

from __future__ import annotations

from pydantic import Field

from layerdistill.core.config import SectionConfig


class TaskWeights(SectionConfig):
    """Coefficients of a method that learns from the labels only."""

    task: float = Field(1.0, ge=0)
    """Multiplies the loss on the labels."""


class LogitsWeights(TaskWeights):
    """Coefficients of a method that also learns from the teacher's predictions."""

    logits: float = Field(1.0, ge=0)
    """Multiplies the loss between the two models' logits (already multiplied by temperature squared)."""


class HiddenWeights(LogitsWeights):
    """Coefficients of a method that also learns from the teacher's hidden states."""

    hidden: float = Field(1.0, ge=0)
    """Multiplies the loss between hidden states, after it was averaged (or summed) over the matched pairs."""
