"""TRL's losses between vocabularies in place of the hand-written KL; all else is the loop written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from benchmarks.arms.naive import Naive
from benchmarks.plain import hidden_term
from benchmarks.works import Batch


class Gkd(Naive):
    """`GKDTrainer.generalized_jsd_loss` with beta 0, the forward KL."""

    def step(self, batch: Batch, teacher: Any, optimizer: torch.optim.Optimizer) -> None:
        """Do one optimisation step."""
        student = self.student(**batch, output_hidden_states=True)
        divergence = GKDTrainer.generalized_jsd_loss(
            student.logits[:, :-1], teacher.logits[:, :-1], batch["labels"][:, 1:], 0.0, self.work.temperature
        )
        self.finish(batch, student.loss, divergence, student.hidden_states, teacher.hidden_states, optimizer)

    def finish(
        self, batch: Batch, task: Tensor, divergence: Tensor, ours: Any, theirs: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the terms up and step; TRL's divergence is not multiplied by the squared temperature."""
        hidden = hidden_term(self.work, ours, theirs, self.projections, batch["attention_mask"])
        terms = {"task": task, "logits": divergence * self.work.temperature**2, "hidden": hidden}
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        self.losses = {name: term.detach() for name, term in terms.items()}


class Chunked(Gkd):
    """The chunked divergence of TRL's `DistillationTrainer`, which makes no logits for all tokens; the labels' do."""

    def teacher_output(self, batch: Batch) -> Any:
        """Return the teacher's hidden states; its head is in the divergence."""
        with torch.no_grad():
            return self.teacher.transformer(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
            )

    def step(self, batch: Batch, teacher: Any, optimizer: torch.optim.Optimizer) -> None:
        """Do one optimisation step."""
        student = self.student.transformer(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        )
        labels, ours = batch["labels"][:, 1:], student.last_hidden_state[:, :-1]
        task = cross_entropy(self.student.lm_head(ours).flatten(0, 1), labels.flatten())
        divergence, _, _ = _chunked_divergence_loss(
            ours, teacher.last_hidden_state[:, :-1], self.student.lm_head.weight, self.teacher.lm_head.weight,
            labels != -100, 0.0, temperature=self.work.temperature,
        )  # fmt: skip
        self.finish(batch, task, divergence, student.hidden_states, teacher.hidden_states, optimizer)
