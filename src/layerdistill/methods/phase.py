"""Training arguments that one phase of a method may have for itself, and the phase in which a model must not move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from layerdistill.core.config import SectionConfig
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.models.trainable import trainable_again


class PhaseTraining(SectionConfig):
    """What a phase changes in the recipe's training section; what is left out stays as it is there."""

    num_train_epochs: PositiveFloat | None = None
    """Passes over the training data; this or max_steps."""

    max_steps: PositiveInt | None = None
    """Optimisation steps; this or num_train_epochs."""

    learning_rate: PositiveFloat | None = None
    """Peak learning rate."""

    per_device_train_batch_size: PositiveInt | None = None
    """Examples per micro-batch on each process."""

    warmup_steps: NonNegativeInt | None = None
    """Steps in which the learning rate rises from 0 to its peak."""

    def overrides(self) -> dict[str, Any]:
        """Return the fields that are given as TrainingArguments fields; epochs take the place of the recipe's steps."""
        given = {name: getattr(self, name) for name in PhaseTraining.model_fields if getattr(self, name) is not None}
        return {"max_steps": -1, **given} if "num_train_epochs" in given else given


HELPERS_ONLY: dict[str, Any] = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "activation_checkpointing": False,
}
"""Training arguments of a phase that has no student: nothing that could be evaluated, or whose blocks are run twice."""


def phase_problems(given: PhaseTraining | None, place: str) -> list[str]:
    """Return why a phase's arguments contradict each other."""
    if given is not None and given.num_train_epochs is not None and given.max_steps is not None:
        return [f"{place} has num_train_epochs and max_steps, which say two things. Leave one out."]
    return []


@contextmanager
def frozen(model: nn.Module, whose: str, say: Callable[[str], None]) -> Iterator[None]:
    """Run a phase in which no weight of `model` may move; what trains, and the mode, are as before afterwards.

    Raises RuntimeError when a parameter or a buffer did move, which is a mistake of ours and not of the user.
    """
    before = fingerprint_model(model)
    training = model.training
    try:
        with trainable_again(model):
            model.requires_grad_(False)
            yield
    finally:
        model.train(training)
    after = fingerprint_model(model)
    if after != before:
        raise RuntimeError(f"the weights of the {whose} moved in a phase that freezes them: {before} is now {after}")
    say(f"No weight of the {whose} changed (fingerprint {after}).")
