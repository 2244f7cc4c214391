"""torchdistill: a `DistillationBox` with forward hooks, its `KDLoss`, and one loss per matched pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.core.distillation import get_distillation_box
from torchdistill.losses.mid_level import KDLoss
from torchdistill.losses.registry import register_low_level_loss, register_mid_level_loss
from torchdistill.models.registry import register_auxiliary_model_wrapper
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from benchmarks.plain import cka, cosine
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


@register_auxiliary_model_wrapper
class ProjectedStudent(AuxiliaryModelWrapper):
    """The student with a linear map behind each hooked module."""

    def __init__(self, student_model: nn.Module, projections: nn.ModuleList, paths: list[str], **options: Any) -> None:
        super().__init__()
        self.student, self.projections, self.paths = student_model, projections, paths

    def forward(self, **batch: Tensor) -> Any:
        """Run the student."""
        return self.student(**batch)

    def secondary_forward(self, io_dict: dict[str, Any]) -> None:
        """Run the maps on what the hooks have found."""
        for path, projection in zip(self.paths, self.projections, strict=True):
            projection(io_dict[path]["output"])


@register_mid_level_loss
class TokenKDLoss(KDLoss):
    """`KDLoss` takes the softmax over axis 1: logits `(batch, seq, vocab)` are flattened to tokens before it."""

    def forward(
        self, student_io_dict: Any, teacher_io_dict: Any, targets: Tensor, *args: Any, **options: Any
    ) -> Tensor:
        """Compute torchdistill's loss at the positions that predict a token."""
        sides = []
        for io_dict, path in (
            (student_io_dict, self.student_module_path),
            (teacher_io_dict, self.teacher_module_path),
        ):
            sides.append({path: {"output": io_dict[path]["output"][:, :-1].flatten(0, 1)}})
        return super().forward(*sides, targets[:, 1:].flatten(), *args, **options)


class OverAllPositions(nn.Module):
    """A distance over all positions, padding too: torchdistill's wrappers hand a loss no mask."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance of `(batch, seq, hidden)` states."""
        return self.distance(student, teacher, torch.ones_like(student[..., 0]))


@register_low_level_loss
class CosineDistance(OverAllPositions):
    """One minus the cosine."""

    distance = staticmethod(cosine)


@register_low_level_loss
class CkaDistance(OverAllPositions):
    """One minus linear CKA."""

    distance = staticmethod(cka)


CRITERIA = {"mse": "MSELoss", "cosine": "CosineDistance", "cka": "CkaDistance"}


def config_of(work: Work, projections: nn.ModuleList) -> dict[str, Any]:
    """Return torchdistill's training configuration of a work."""
    pairs = module_pairs(work) if work.hidden != "none" else []
    inside = "student." if len(projections) else ""
    ours = [inside + path for path, _ in pairs]
    read = [f"projections.{number}" for number in range(len(ours))] if len(projections) else ours
    head, student_head = head_path(work), inside + head_path(work)
    kd = {
        "student_module_path": student_head, "student_module_io": "output", "teacher_module_path": head,
        "teacher_module_io": "output", "temperature": work.temperature, "alpha": 1.0, "beta": 1.0,
    }  # fmt: skip
    kd_name = "KDLoss" if work.family == "bert" else "TokenKDLoss"
    terms: dict[str, Any] = {"predictions": {"criterion": {"key": kd_name, "kwargs": kd}, "weight": 1.0}}
    for number, (path, (_, theirs)) in enumerate(zip(read, pairs, strict=True)):
        sides = {
            "input": {"is_from_teacher": False, "module_path": path, "io": "output"},
            "target": {"is_from_teacher": True, "module_path": theirs, "io": "output"},
        }
        terms[f"hidden {number}"] = {
            "criterion": {"key": CRITERIA[work.hidden], "kwargs": {}},
            "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": sides},
            "weight": 1 / len(pairs),
        }
    wrapper = {"key": "ProjectedStudent", "kwargs": {"projections": projections, "paths": ours}}
    return {
        "num_epochs": 1,
        "train_data_loader": {},
        "val_data_loader": {},
        "teacher": {
            "forward_proc": "forward_batch_only_as_kwargs",
            "forward_hook": {"output": sorted({head, *(path for _, path in pairs)})},
            "requires_grad": False,
        },
        "student": {
            "forward_proc": "forward_batch_only_as_kwargs",
            "forward_hook": {"output": sorted({student_head, *ours, *read})},
            **({"auxiliary_model_wrapper": wrapper} if len(projections) else {}),
        },
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": work.learning_rate}},
    }


class TorchDistill:
    """The loop of torchdistill's own examples around a `DistillationBox`."""

    def __init__(self, setting: Setting) -> None:
        self.work, self.device = setting.work, setting.device
        self.student = make_student(self.work).to(self.device)
        self.loader = make_loader(self.work, setting.examples, setting.collate)
        projections = make_projections(self.work).to(self.device)
        self.box = get_distillation_box(
            make_teacher(self.work).to(self.device), self.student, {}, config_of(self.work, projections),
            torch.device(self.device), None, False, 1,
        )  # fmt: skip
        self.found: dict[str, Tensor] = {}
        for name, (criterion, _) in self.box.criterion.term_dict.items():
            criterion.register_forward_hook(lambda module, inputs, output, name=name: self.keep(name, output))

    def keep(self, name: str, output: Tensor) -> None:
        """Keep a criterion's value."""
        self.found[name] = output.detach()

    @property
    def losses(self) -> dict[str, Tensor]:
        """The terms of the last step; torchdistill adds the labels' and the logits' up."""
        hidden = [value for name, value in self.found.items() if name.startswith("hidden")]
        found = {"task + logits": self.found["predictions"]}
        return {**found, "hidden": torch.stack(hidden).mean()} if hidden else found

    def train(self, step_done: StepDone) -> None:
        """Train until `step_done` raises."""
        self.box.pre_epoch_process(epoch=0)
        for batch in endless(self.loader, self.device):
            targets = batch.pop("labels")
            self.box.pre_forward_process()
            self.box.post_forward_process(loss=self.box.forward_process(batch, targets, None))
            step_done()
