"""Fine-tuning alone: no teacher is run, and the step is that of the labels' loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from term_references import pair_of
from tiny_models import tiny_model
from toy import ToyCollator, toy_dataset

import layerdistill as ld
from layerdistill.core.types import Progress
from layerdistill.methods.none import METHOD

TASK = "sequence-classification"


def test_there_is_one_stage_with_the_task_alone() -> None:
    stages = list(METHOD.stages(pair_of(), METHOD.Config()))
    assert [[term.name for term in stage.terms] for stage in stages] == [["task"]]
    term: Any = stages[0].terms[0]
    assert not term.needs(Progress()).teacher_at_all
    assert term.coefficient("task", Progress()) == 1.0
    assert list(stages[0].terms.parameters()) == []


def test_a_step_is_plain_gradient_descent_and_the_teacher_is_never_called(tmp_path: Path) -> None:
    student = tiny_model("bert", TASK, num_layers=2, seed=1)
    by_hand = tiny_model("bert", TASK, num_layers=2, seed=1)
    teacher = tiny_model("bert", TASK, num_layers=2, seed=2)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was run")

    teacher.forward = fail
    rows = toy_dataset(TASK, size=8)
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=1, optim="sgd", learning_rate=0.5,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    ld.LayerDistillationTrainer(student, teacher, "none", args, rows, data_collator=ToyCollator(TASK)).train()
    batch = ToyCollator(TASK)(list(rows))
    logits = by_hand(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
    for (name, ours), theirs in zip(student.named_parameters(), by_hand.parameters(), strict=True):
        step = torch.zeros_like(theirs) if theirs.grad is None else 0.5 * theirs.grad
        torch.testing.assert_close(ours, theirs - step, atol=1e-6, rtol=1e-5, msg=name)
