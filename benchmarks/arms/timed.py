"""The processor time of parts of a step: of the teacher's signals, and of hidden terms with their gradients."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layerdistill.core.types import Mean, Needs, Signal


class TimedTeacher:
    """A teacher source whose processor time is counted."""

    def __init__(self, source: Any) -> None:
        self.source, self.model, self.seconds = source, source.model, 0.0

    def signal(self, batch: Any, needs: Needs) -> Signal:
        """Return what the source says."""
        began = time.process_time()
        found = self.source.signal(batch, needs)
        self.seconds += time.process_time() - began
        return found


class TimedTerm:
    """Counts what a hidden term takes, forward and backward, by standing in the place of its `forward`.

    The engine goes back through nodes in the order in which they were made, last first. The hidden term is the last of
    the terms, so its nodes come one after the other: from the first loss that gets a gradient to the last state that
    does. The optimizer's share for the projections is not counted.
    """

    def __init__(self, term: Any) -> None:
        self.computed, self.seconds, self.began = term.forward, 0.0, 0.0
        term.forward = self

    def __call__(self, student: Signal, teacher: Signal | None, batch: Any, progress: Any) -> dict[str, Mean]:
        """Return what the term makes of the signals."""
        hidden = {layer: _Mark.apply(state, self.end) for layer, state in student.hidden.items()}
        began = time.process_time()
        means = self.computed(replace(student, hidden=hidden), teacher, batch, progress)
        self.seconds += time.process_time() - began
        self.waiting = len(means)
        return {name: Mean(_Mark.apply(mean.total, self.start), mean.count) for name, mean in means.items()}

    def start(self) -> None:
        """A loss gets its gradient: the first of them begins the backward."""
        if not self.began:
            self.began = time.process_time()

    def end(self) -> None:
        """A state gets its gradient: what went by since the start, or since the last state, was spent on it."""
        now = time.process_time()
        self.seconds += now - self.began
        self.waiting -= 1
        self.began = now if self.waiting else 0.0


class _Mark(torch.autograd.Function):
    """The identity, which says when its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, passed: Any) -> Tensor:
        ctx.passed = passed
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        ctx.passed()
        return upstream, None
