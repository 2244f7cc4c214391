"""The loss on the labels of every task, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from layerdistill.core.errors import UserError
from layerdistill.matching.task_loss import label_unit, task_loss


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def surprise(scores: list[float], label: int) -> float:
    return math.log(sum(math.exp(score) for score in scores)) - scores[label]


def test_classes() -> None:
    logits, labels = draw(4, 3), torch.tensor([0, 2, 1, 2])
    mean = task_loss("sequence-classification", logits, {"labels": labels})
    rows = [surprise(row, label) for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True)]
    assert mean.value.item() == pytest.approx(sum(rows) / 4, rel=1e-6)
    assert mean.count.item() == 4


def test_several_labels() -> None:
    logits, labels = draw(4, 3), torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    mean = task_loss("multi-label-classification", logits, {"labels": labels})
    total = 0.0
    for row, truth in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for score, label in zip(row, truth, strict=True):
            probability = 1 / (1 + math.exp(-score))
            total -= math.log(probability if label else 1 - probability)
    assert mean.value.item() == pytest.approx(total / 3 / 4, rel=1e-6), "averaged over the labels, as transformers does"
    assert mean.count.item() == 4


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_numbers(shape: tuple[int, ...]) -> None:
    logits, labels = draw(4, 1), draw(*shape, seed=1)
    mean = task_loss("regression", logits, {"labels": labels})
    rows = [(a - b) ** 2 for a, b in zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True)]
    assert mean.value.item() == pytest.approx(sum(rows) / 4, rel=1e-6)
    assert mean.count.item() == 4


def test_the_next_token() -> None:
    logits = draw(2, 4, 5).requires_grad_()
    labels = torch.tensor([[1, 2, 3, 4], [0, -100, 2, -100]])
    mean = task_loss("causal-lm", logits, {"labels": labels})
    places = [(0, 0, 2), (0, 1, 3), (0, 2, 4), (1, 1, 2)]
    rows = [surprise(logits[text, place].double().tolist(), label) for text, place, label in places]
    assert mean.value.item() == pytest.approx(sum(rows) / 4, rel=1e-6)
    assert mean.count.item() == 4
    mean.total.backward()
    assert logits.grad is not None
    touched = {tuple(place) for place in logits.grad.abs().sum(-1).nonzero().tolist()}
    assert touched == {(text, place) for text, place, _ in places}


def test_no_label_at_all_is_a_loss_of_zero() -> None:
    logits = draw(1, 3, 5).requires_grad_()
    mean = task_loss("causal-lm", logits, {"labels": torch.full((1, 3), -100)})
    mean.value.backward()
    assert mean.value.item() == mean.count.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_half_precision_is_computed_in_float32(task: str) -> None:
    shape = (2, 3, 50) if task == "causal-lm" else (6, 50)
    logits = (20 * draw(*shape)).bfloat16()
    labels = torch.arange(6).reshape(shape[:-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = task_loss(task, logits, {"labels": labels})
    exact = task_loss(task, logits.double(), {"labels": labels})
    assert mean.total.dtype == torch.float32
    assert exact.total.dtype == torch.float64
    assert mean.value.item() == pytest.approx(exact.value.item(), rel=1e-6)


def test_one_class_is_refused_because_its_loss_is_always_zero() -> None:
    with pytest.raises(UserError, match="softmax is always 1"):
        task_loss("sequence-classification", draw(4, 1), {"labels": torch.zeros(4, dtype=torch.long)})


def test_what_is_counted() -> None:
    assert label_unit("causal-lm") == "label"
    others = ("sequence-classification", "multi-label-classification", "regression")
    assert {label_unit(task) for task in others} == {"example"}
