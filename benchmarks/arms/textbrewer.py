"""TextBrewer: `GeneralDistiller.train` with `hidden_mse` matches and linear projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from textbrewer.presets import MATCH_LOSS_MAP
from torch.utils.data import DataLoader

from benchmarks.plain import cka, cosine
from benchmarks.setting import Setting, StepDone
from benchmarks.works import Batch, Work, make_loader, make_projections, make_student, make_teacher

MATCH_LOSS_MAP["masked_cosine"] = cosine
MATCH_LOSS_MAP["cka"] = cka
LOSS_NAMES = {"mse": "hidden_mse", "cosine": "masked_cosine", "cka": "cka"}


class KeepingDistiller(GeneralDistiller):
    """Keeps the terms that TextBrewer computes."""

    def compute_loss(self, results_S: Any, results_T: Any) -> Any:
        """Compute the loss as TextBrewer does."""
        total, self.terms = super().compute_loss(results_S, results_T)
        return total, self.terms


class SteppedLoader:
    """A loader that says when the step on its last batch is over: when the next one is asked for."""

    def __init__(self, loader: DataLoader, step_done: StepDone) -> None:
        self.loader, self.step_done = loader, step_done

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield batch
            self.step_done()


def matches_of(work: Work) -> list[dict[str, Any]]:
    """Return a work's matched layers as TextBrewer is told them."""
    if work.hidden == "none":
        return []
    matches: list[dict[str, Any]] = [
        {
            "layer_S": ours, "layer_T": theirs, "feature": "hidden", "loss": LOSS_NAMES[work.hidden],
            "weight": 1 / len(work.pairs),
        }
        for ours, theirs in work.pairs
    ]  # fmt: skip
    if work.hidden != "cka":
        for match in matches:
            match["proj"] = ["linear", work.student.width, work.teacher.width]
    return matches


class TextBrewer:
    """`GeneralDistiller` on dynamic batches."""

    def __init__(self, setting: Setting) -> None:
        self.work, self.device = setting.work, setting.device
        self.student = make_student(self.work).to(self.device)
        self.loader = make_loader(self.work, setting.examples, setting.collate)
        self.distiller = KeepingDistiller(
            TrainingConfig(output_dir=str(setting.folder), device=self.device, ckpt_steps=10**9),
            DistillationConfig(
                temperature=self.work.temperature, kd_loss_weight=self.work.temperature**2, hard_label_weight=1,
                intermediate_matches=matches_of(self.work),
            ),
            make_teacher(self.work).to(self.device), self.student, self.adaptor, self.adaptor,
        )  # fmt: skip
        for projection, given in zip(self.distiller.projs, make_projections(self.work), strict=False):
            projection.load_state_dict(given.state_dict(), strict=False)

    def adaptor(self, batch: Batch, output: Any) -> dict[str, Any]:
        """Return a model's output as TextBrewer reads it."""
        logits = output.logits if self.work.family == "bert" else output.logits[:, :-1]
        return {
            "logits": logits, "hidden": output.hidden_states, "losses": output.loss,
            "inputs_mask": batch["attention_mask"],
        }  # fmt: skip

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """The terms of the last step; the one on the logits is left out because it is no KL."""
        terms = self.distiller.terms
        hidden = [term for name, term in terms.items() if name.startswith("unweighted_hidden")]
        found = {"task": terms["unweighted_hard_label_loss"].detach()}
        return {**found, "hidden": torch.stack(hidden).mean().detach()} if hidden else found

    def train(self, step_done: StepDone) -> None:
        """Train until `step_done` raises."""
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=self.work.learning_rate)
        with self.distiller:
            self.distiller.train(
                optimizer, SteppedLoader(self.loader, step_done), num_steps=10**9, output_hidden_states=True
            )
