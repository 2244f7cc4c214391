"""A plain subclass of transformers' Trainer, as forum answers have it: `compute_loss` runs the teacher."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.plain import objective
from benchmarks.setting import Setting, StepDone
from benchmarks.works import Batch, make_projections, make_student, make_teacher


def arguments_of(setting: Setting) -> dict[str, Any]:
    """Return the training arguments that every Trainer here is given; all else is left at its default."""
    return {
        "output_dir": str(setting.folder),
        "per_device_train_batch_size": setting.work.batch_size,
        "learning_rate": setting.work.learning_rate,
        "max_steps": 1_000_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": setting.device == "cpu",
    }


class AfterStep(TrainerCallback):
    """Calls `step_done` after each optimisation step."""

    def __init__(self, step_done: StepDone) -> None:
        self.step_done = step_done

    def on_step_end(self, *args: Any, **options: Any) -> None:
        """An optimisation step has been done."""
        self.step_done()


class DistillingTrainer(Trainer):
    """`compute_loss` and an optimizer that also trains the projections."""

    def __init__(self, setting: Setting, teacher: nn.Module, projections: nn.ModuleList, **options: Any) -> None:
        super().__init__(args=TrainingArguments(**arguments_of(setting)), data_collator=setting.collate, **options)
        self.work = setting.work
        self.teacher = teacher.to(self.args.device)
        self.projections = projections.to(self.args.device)
        self.terms: dict[str, torch.Tensor] = {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Add the projections to the parameters that train."""
        optimizer = super().create_optimizer(model)
        if len(self.projections):
            optimizer.add_param_group({"params": list(self.projections.parameters())})
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run student and teacher and add the terms up."""
        student = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            teacher = self.teacher(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True
            )
        terms = objective(self.work, student, teacher, self.projections, inputs)
        self.terms = {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum()


class TrainerSubclass:
    """The Trainer with its defaults: fused AdamW, gradient clipping, a linear schedule."""

    def __init__(self, setting: Setting) -> None:
        self.student = make_student(setting.work)
        self.trainer = DistillingTrainer(
            setting, make_teacher(setting.work), make_projections(setting.work), model=self.student,
            train_dataset=Dataset.from_list(setting.examples),
        )  # fmt: skip

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """The terms of the last step."""
        return self.trainer.terms

    def train(self, step_done: StepDone) -> None:
        """Train until `step_done` raises."""
        self.trainer.add_callback(AfterStep(step_done))
        self.trainer.train()
