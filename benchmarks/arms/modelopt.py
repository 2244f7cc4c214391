"""NVIDIA ModelOpt: `modelopt.torch.distill.convert` with one criterion per pair of modules."""

from __future__ import annotations

from typing import Any

import modelopt.torch.distill as mtd
import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from benchmarks.plain import DISTANCES
from benchmarks.setting import Setting, StepDone
from benchmarks.works import (
    Work,
    endless,
    head_path,
    make_loader,
    make_projections,
    make_student,
    make_teacher,
    module_pairs,
)


class ModuleDistance(_Loss):
    """A distance over all positions, padding too: ModelOpt hands every criterion the same arguments, without a mask."""

    def __init__(self, work: Work, projection: nn.Module | None) -> None:
        super().__init__()
        self.projection = projection
        self.distance = DISTANCES[work.hidden]

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance of `(batch, seq, hidden)` states."""
        student = self.projection(student) if self.projection is not None else student
        return self.distance(student, teacher, torch.ones_like(student[..., 0]))


class ModelOpt:
    """A `DistillationModel`, its `LogitsDistillationLoss` and a `StaticLossBalancer`."""

    def __init__(self, setting: Setting) -> None:
        self.work, self.device = setting.work, setting.device
        work = self.work
        pairs = module_pairs(work) if work.hidden != "none" else []
        projections = list(make_projections(work)) or [None] * len(pairs)
        head = head_path(work)
        criteria = {pair: ModuleDistance(work, projection) for pair, projection in zip(pairs, projections, strict=True)}
        criteria[head, head] = mtd.LogitsDistillationLoss(temperature=work.temperature, reduction="none")
        terms = 3 if pairs else 2
        weights = [*(1 / (terms * len(pairs)) for _ in pairs), 1 / terms]
        config = {
            "teacher_model": make_teacher(work),
            "criterion": criteria,
            "loss_balancer": mtd.StaticLossBalancer(weights),
        }
        self.student = mtd.convert(make_student(work), mode=[("kd_loss", config)]).to(self.device)
        self.loader = make_loader(work, setting.examples, setting.collate)
        self.balancer = self.student.loss_balancer
        self.balancer.register_forward_pre_hook(self.keep)
        self.found: dict[str, Tensor] = {}

    def keep(self, module: nn.Module, inputs: tuple[dict[str, Tensor]]) -> None:
        """Keep the terms that the balancer is given."""
        self.found = {name: value.detach() for name, value in inputs[0].items()}

    @property
    def losses(self) -> dict[str, Tensor]:
        """The terms of the last step."""
        hidden = [value for name, value in self.found.items() if name.startswith("ModuleDistance")]
        named = {"student_loss": "task", "LogitsDistillationLoss": "logits"}
        found = {
            named[name.rsplit("_", 1)[0] if name[-1].isdigit() else name]: value
            for name, value in self.found.items()
            if not name.startswith("ModuleDistance")
        }
        return {**found, "hidden": torch.stack(hidden).mean()} if hidden else found

    def train(self, step_done: StepDone) -> None:
        """Train until `step_done` raises."""
        model: Any = self.student
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.work.learning_rate)
        for batch in endless(self.loader, self.device):
            output = model(**batch)
            model.compute_kd_loss(output.loss, loss_reduction_fn=torch.mean).backward()
            optimizer.step()
            optimizer.zero_grad()
            step_done()
