"""The loop written by hand (R0), and the floor under it: the same loop with the teacher's outputs in memory."""

from __future__ import annotations

from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.plain import objective
from benchmarks.setting import Setting, StepDone
from benchmarks.works import Batch, endless, make_loader, make_projections, make_student, make_teacher


class Naive:
    """The teacher in float32 at every step, random batches, dynamic padding, AdamW as torch has it."""

    def __init__(self, setting: Setting) -> None:
        self.work, self.device = setting.work, setting.device
        self.teacher = make_teacher(self.work).to(self.device)
        self.student = make_student(self.work).to(self.device)
        self.projections = make_projections(self.work).to(self.device)
        self.loader = make_loader(self.work, setting.examples, setting.collate)
        self.losses: dict[str, torch.Tensor] = {}

    def train(self, step_done: StepDone) -> None:
        """Train until `step_done` raises."""
        parameters = [*self.student.parameters(), *self.projections.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self.work.learning_rate)
        for batch in endless(self.loader, self.device):
            self.step(batch, self.teacher_output(batch), optimizer)
            step_done()

    def teacher_output(self, batch: Batch) -> Any:
        """Return the teacher's logits and all its hidden states."""
        with torch.no_grad():
            return self.teacher(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
            )

    def step(self, batch: Batch, teacher: Any, optimizer: torch.optim.Optimizer) -> None:
        """Do one optimisation step."""
        student = self.student(**batch, output_hidden_states=True)
        terms = objective(self.work, student, teacher, self.projections, batch)
        sum(terms.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        self.losses = {name: term.detach() for name, term in terms.items()}


FLOOR_BATCHES = {"bert": 24, "gpt2": 2}
"""Batches whose teacher outputs are held; in a language model each is 0.4 GB and all have the same shape."""


class Floor(Naive):
    """The student's own forward, backward and optimizer step, and the losses: what no way of distilling can avoid.

    It goes round a few batches, whose teacher outputs (mapped layers and logits) are computed before the base memory is
    read.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.held = []
        wanted = {layer for _, layer in self.work.pairs}
        for batch in islice(endless(self.loader, self.device), FLOOR_BATCHES[self.work.family]):
            found = self.teacher_output(batch)
            hidden = [state if layer in wanted else None for layer, state in enumerate(found.hidden_states)]
            self.held.append((batch, SimpleNamespace(logits=found.logits, hidden_states=hidden)))

    def train(self, step_done: StepDone) -> None:
        """Train until `step_done` raises."""
        parameters = [*self.student.parameters(), *self.projections.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self.work.learning_rate)
        for batch, teacher in cycle(self.held):
            self.step(batch, teacher, optimizer)
            step_done()
