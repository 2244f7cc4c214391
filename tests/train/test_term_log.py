"""What is logged of the terms: exact means, gradient norms, and an alarm for a term that does nothing."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from toy import ToyCollator, toy_dataset

import layerdistill as ld
from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean, Needs, Stage
from layerdistill.methods.task_term import TaskTerm
from layerdistill.train.term_log import QUIET_AFTER, TermLog
from layerdistill.train.trainer import StageTrainer

TASK = "sequence-classification"
ALONE = SimpleNamespace(reduce=lambda tensor, how: tensor)
"""Stands for accelerate in one process."""


def sums(**given: tuple[float, float]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (torch.tensor(total), torch.tensor(count)) for name, (total, count) in given.items()}


def alarms(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "ALARM" in record.getMessage()]


# Means


def test_a_line_holds_the_means_since_the_line_before() -> None:
    log = TermLog([], 0)
    log.add(sums(task=(6.0, 3.0), logits=(1.0, 8.0)))
    log.add(sums(task=(2.0, 5.0), logits=(3.0, 8.0)))
    assert log.take(ALONE, 2) == {"distill/task": 1.0, "distill/logits": 0.25}
    log.add(sums(task=(9.0, 3.0)))
    assert log.take(ALONE, 3) == {"distill/task": 3.0}, "a term that was not there is not in the line"
    assert log.take(ALONE, 4) == {}


def test_nothing_counted_is_a_mean_of_zero() -> None:
    log = TermLog([], 0)
    log.add(sums(task=(0.0, 0.0)))
    assert log.take(ALONE, 1) == {"distill/task": 0.0}


def test_processes_are_summed_and_not_averaged() -> None:
    log = TermLog([], 0)
    log.add(sums(task=(6.0, 3.0)))
    other = torch.tensor([[10.0, 1.0]], dtype=torch.float64)
    two = SimpleNamespace(reduce=lambda tensor, how: tensor + other if how == "sum" else None)
    assert log.take(two, 1) == {"distill/task": 4.0}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_sum_that_is_not_finite_stops_the_run_by_name(broken: float) -> None:
    log = TermLog([], 0)
    log.add(sums(task=(1.0, 1.0), logits=(broken, 1.0)))
    with pytest.raises(UserError, match=rf"before step 7: distill/logits = {broken}"):
        log.refuse_pending(7)
    with pytest.raises(UserError, match=r"distill/logits = .*Lower training\.learning_rate"):
        log.take(ALONE, 7)


# Gradients


def test_the_norm_is_that_of_the_terms_gradient_and_leaves_no_trace() -> None:
    student = nn.Linear(3, 1, bias=False)
    frozen = nn.Linear(3, 1)
    frozen.requires_grad_(False)
    model = nn.ModuleList([student, frozen])
    inputs = torch.tensor([[3.0, 0.0, 4.0]])
    shares = {"task": 2 * student(inputs).sum(), "hidden": student(inputs).sum() * 0.5}
    log = TermLog([], 10)
    log.measure_gradients(shares, model, 0)
    assert student.weight.grad is None
    log.add(sums(task=(1.0, 1.0)))
    line = log.take(ALONE, 0)
    assert line["grad_norm/task"] == pytest.approx(10.0), "2 |(3, 0, 4)|"
    assert line["grad_norm/hidden"] == pytest.approx(2.5)
    torch.stack(list(shares.values())).sum().backward()
    assert student.weight.grad is not None, "the graph is still there for the step itself"
    assert "grad_norm/task" not in log.take(ALONE, 1), "a norm is logged once, where it was measured"


def test_norms_are_measured_seldom_and_once_per_step() -> None:
    log = TermLog([], 3)
    assert [step for step in range(8) if log.measures_at(step)] == [0, 3, 6]
    log.measure_gradients({}, nn.Linear(1, 1), 3)
    assert not log.measures_at(3), "only the first micro-batch of a step"
    assert log.measures_at(6)
    assert not any(TermLog([], 0).measures_at(step) for step in range(8))


# Alarms


def test_a_mean_that_never_changes_raises_the_alarm_in_the_fourth_line(caplog: pytest.LogCaptureFixture) -> None:
    log = TermLog([], 0)
    for line in range(1, 9):
        log.add(sums(task=(float(line), 1.0), hidden=(0.5, 1.0)))
        log.take(ALONE, line)
        assert len(alarms(caplog)) == int(line >= 4), f"after {line} lines"
    assert QUIET_AFTER == 3
    assert alarms(caplog)[0].startswith("ALARM: 'distill/hidden' has been exactly 0.5 in 4 log lines.")


def test_a_mean_that_moves_again_starts_the_count_anew(caplog: pytest.LogCaptureFixture) -> None:
    log = TermLog([], 0)
    for value in (1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0):
        log.add(sums(hidden=(value, 1.0)))
        log.take(ALONE, 0)
    assert alarms(caplog) == []


def test_no_gradient_raises_the_alarm_after_three_measurements(caplog: pytest.LogCaptureFixture) -> None:
    student = nn.Linear(2, 1)
    log = TermLog([], 1)
    elsewhere = nn.Parameter(torch.ones(1))
    for step in range(6):
        loss = student(torch.ones(1, 2)).sum()
        shares = {"task": loss, "hidden": torch.tensor(3.0), "logits": elsewhere.sum(), "zero": loss * 0}
        log.measure_gradients(shares, student, step)
        assert len(alarms(caplog)) == (3 if step >= 2 else 0), f"after {step + 1} measurements"
    assert {text.split("'")[1] for text in alarms(caplog)} == {"hidden", "logits", "zero"}
    assert all("gave no gradient to the student in 3 measurements" in text for text in alarms(caplog))


class Useless(nn.Module):
    """A term that looks at nothing."""

    name = "hidden"

    def needs(self, progress: Any) -> Needs:
        return Needs()

    def unit(self, name: str) -> str:
        return "batch"

    def coefficient(self, name: str, progress: Any) -> float:
        return 1.0

    def forward(self, *_: Any) -> dict[str, Mean]:
        return {"hidden/1-2": Mean(torch.tensor(0.25), torch.tensor(1.0))}


@pytest.mark.parametrize(("steps", "expected"), [(2, []), (3, ["gradient"]), (4, ["gradient", "exactly 0.25 in 4"])])
def test_a_training_with_a_useless_term_says_so(
    steps: int, expected: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = tiny_model("bert", TASK, num_layers=1, seed=1)
    args = ld.LayerDistillationConfig(
        output_dir=str(tmp_path), max_steps=steps, logging_steps=1, term_gradient_steps=1, save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    stage = Stage("distill", student, nn.ModuleList([TaskTerm(TASK, 1.0), Useless()]))
    rows = toy_dataset(TASK, size=16)
    trainer = StageTrainer(stage, TASK, args, rows, data_collator=ToyCollator(TASK))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = alarms(caplog)
    assert len(found) == len(expected), found
    for fragment in expected:
        assert any(fragment in text and "hidden" in text for text in found)
    assert not any("task" in text for text in found), "a term that works is left in peace"
    assert [line["grad_norm/hidden"] for line in trainer.state.log_history if "loss" in line] == [0.0] * steps
