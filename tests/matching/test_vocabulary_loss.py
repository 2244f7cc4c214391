"""The chunked vocabulary losses against references from the equations: values, every gradient, chunks, dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean
from layerdistill.matching import VocabularyHead, vocabulary_loss, vocabulary_losses
from layerdistill.matching.vocabulary_head import HeadGradients

from . import references

DIVERGENCES = ("forward_kl", "reverse_kl", "js_divergence", "soft_cross_entropy")
STUDENT_VOCABULARY, TEACHER_VOCABULARY, ROWS = 17, 15, 11
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "cap": {"cap": 1.5},
    "scale": {"scale": 0.3},
    "all": {"bias": True, "cap": 1.5, "scale": 0.3},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows a chunk and three a piece, so that every test has chunks and pieces that are not full."""
    monkeypatch.setattr(vocabulary_loss, "FEWEST_ROWS", 4)
    monkeypatch.setattr(vocabulary_loss, "CHUNK", {"cpu": 1})
    monkeypatch.setattr(vocabulary_loss, "PIECE", {"cpu": 3 * STUDENT_VOCABULARY})


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_head(
    vocabulary: int, width: int, seed: int, bias: bool = False, scale: float = 1.0, cap: float | None = None
) -> VocabularyHead:
    return VocabularyHead(
        draw(vocabulary, width, seed=seed), draw(vocabulary, seed=seed + 1) if bias else None, scale, cap
    )


def problem(rows: int = ROWS, **head: Any) -> tuple[Tensor, VocabularyHead, Tensor, Tensor, VocabularyHead]:
    """Rows, head and labels of a student, rows and head of a wider teacher with fewer tokens."""
    labels = torch.arange(rows) * 5 % STUDENT_VOCABULARY
    student = make_head(STUDENT_VOCABULARY, 5, 10, **head)
    teacher = make_head(TEACHER_VOCABULARY, 7, 20, **head)
    return draw(rows, 5, seed=1), student, labels, draw(rows, 7, seed=2), teacher


def by_equation(rows: Tensor, head: VocabularyHead) -> list[np.ndarray]:
    """The logits, one number after the other."""
    weight, bias = head.weight.tolist(), head.bias.tolist() if head.bias is not None else [0.0] * len(head.weight)
    found = []
    for row in rows.tolist():
        logits = [
            head.scale * (sum(a * b for a, b in zip(row, line, strict=True)) + extra)
            for line, extra in zip(weight, bias, strict=True)
        ]
        found.append(np.array([z if head.cap is None else head.cap * math.tanh(z / head.cap) for z in logits]))
    return found


def differentiable(
    rows: Tensor, head: VocabularyHead, labels: Tensor, teacher_logits: Tensor, divergence: str, t: float, width: int
) -> tuple[Tensor, Tensor]:
    """The two totals by their equations, with all logits at once and autograd's gradient."""
    bias = head.bias if head.bias is not None else torch.zeros(())
    logits = head.scale * (rows @ head.weight.T + bias)
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    task = -sum((logits[i].log_softmax(-1)[labels[i]] for i in range(len(rows))), torch.zeros((), dtype=rows.dtype))
    log_q, log_p = (logits[:, :width] / t).log_softmax(-1), (teacher_logits[:, :width] / t).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    per_entry = {
        "forward_kl": p * (log_p - log_q),
        "reverse_kl": q * (log_q - log_p),
        "js_divergence": (p * (log_p - log_m) + q * (log_q - log_m)) / 2,
        "soft_cross_entropy": -p * log_q,
    }[divergence]
    return task, t**2 * per_entry.sum()


def leaves(rows: Tensor, head: VocabularyHead) -> list[Tensor]:
    """What gradients reach, as leaves."""
    return [tensor.requires_grad_() for tensor in (rows, head.weight, head.bias) if tensor is not None]


def total(mean: Mean | None) -> Tensor:
    assert mean is not None
    return mean.total


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("temperature", "vocab_size"), [(1.0, None), (2.5, 9)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_against_the_equations(
    divergence: Any, temperature: float, vocab_size: int | None, head: dict[str, Any]
) -> None:
    rows, student, labels, teacher_rows, teacher = problem(**head)
    task, logits = vocabulary_losses(
        rows, student, labels, teacher_rows, teacher, divergence=divergence, temperature=temperature,
        vocab_size=vocab_size,
    )  # fmt: skip
    assert task is not None
    assert logits is not None
    ours, theirs = by_equation(rows, student), by_equation(teacher_rows, teacher)
    expected = -sum(math.log(references.softmax(z, 1.0)[label]) for z, label in zip(ours, labels.tolist(), strict=True))
    assert task.total.item() == pytest.approx(expected, rel=1e-12)
    width = vocab_size or TEACHER_VOCABULARY
    reference: Callable[..., float] = getattr(references, divergence)
    mean = reference([z[:width] for z in ours], [z[:width] for z in theirs], temperature)
    assert logits.value.item() == pytest.approx(mean, rel=1e-10)
    assert task.count.item() == logits.count.item() == ROWS


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("temperature", "vocab_size"), [(1.0, None), (2.5, 9)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_in_the_expected_ratio_and_in_any_other(
    divergence: Any, temperature: float, vocab_size: int | None, head: dict[str, Any]
) -> None:
    rows, student, labels, teacher_rows, teacher = problem(**head)
    inputs = leaves(rows, student)
    found = vocabulary_losses(
        rows, student, labels, teacher_rows, teacher, task_weight=0.3, logits_weight=0.9, divergence=divergence,
        temperature=temperature, vocab_size=vocab_size,
    )  # fmt: skip
    theirs = torch.tensor(np.array(by_equation(teacher_rows, teacher)))
    expected = differentiable(rows, student, labels, theirs, divergence, temperature, vocab_size or TEACHER_VOCABULARY)
    for task, logits in [(0.3, 0.9), (-0.1, -0.3), (0.3, 0.0), (0.0, 2.0), (1.0, 0.2)]:
        wanted = torch.autograd.grad(task * expected[0] + logits * expected[1], inputs, retain_graph=True)
        objective = task * total(found[0]) + logits * total(found[1])
        made = torch.autograd.grad(objective, inputs, retain_graph=True)
        for ours, theirs_too in zip(made, wanted, strict=True):
            torch.testing.assert_close(ours, theirs_too, atol=1e-11, rtol=1e-9)
    alone = torch.autograd.grad(total(found[1]), inputs)
    for ours, theirs_too in zip(alone, torch.autograd.grad(expected[1], inputs), strict=True):
        torch.testing.assert_close(ours, theirs_too, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 12, 13])
def test_any_number_of_rows(rows: int) -> None:
    states, student, labels, teacher_rows, teacher = problem(rows, bias=True)
    inputs = leaves(states, student)
    task, logits = vocabulary_losses(states, student, labels, teacher_rows, teacher, temperature=2.0)
    assert task is not None
    assert task.count.item() == rows
    theirs = teacher_rows @ teacher.weight.T + teacher.bias
    expected = differentiable(states, student, labels, theirs, "forward_kl", 2.0, TEACHER_VOCABULARY)
    wanted = torch.autograd.grad(expected[0] + expected[1], inputs)
    made = torch.autograd.grad(task.total + total(logits), inputs)
    assert task.total.item() == pytest.approx(expected[0].item(), rel=1e-12)
    for ours, theirs_too in zip(made, wanted, strict=True):
        torch.testing.assert_close(ours, theirs_too, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_numerical_gradients(divergence: Any) -> None:
    rows, student, labels, teacher_rows, teacher = problem(5, bias=True, cap=2.0, scale=0.5)

    def both(rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        head = VocabularyHead(weight, bias, student.scale, student.cap)
        task, logits = vocabulary_losses(
            rows, head, labels, teacher_rows, teacher, divergence=divergence, temperature=1.5, vocab_size=12
        )
        return total(task), total(logits)

    assert torch.autograd.gradcheck(both, leaves(rows, student))


@pytest.mark.parametrize("with_teacher", [False, True])
def test_one_loss_alone(with_teacher: bool) -> None:
    rows, student, labels, teacher_rows, teacher = problem(bias=True)
    inputs = leaves(rows, student)
    theirs = teacher_rows @ teacher.weight.T + teacher.bias
    expected = differentiable(rows, student, labels, theirs, "forward_kl", 1.0, TEACHER_VOCABULARY)
    if with_teacher:
        neither, mean = vocabulary_losses(rows, student, labels, teacher_rows, teacher, task_weight=None)
    else:
        mean, neither = vocabulary_losses(rows, student, labels)
    assert neither is None
    assert total(mean).item() == pytest.approx(expected[with_teacher].item(), rel=1e-12)
    wanted = torch.autograd.grad(3 * expected[with_teacher], inputs)
    for ours, theirs_too in zip(torch.autograd.grad(3 * total(mean), inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs_too, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_weight_of_zero_changes_no_value_and_no_gradient(weights: tuple[float, float]) -> None:
    rows, student, labels, teacher_rows, teacher = problem()
    inputs = leaves(rows, student)
    results = []
    for task_weight, logits_weight in (weights, (1.0, 1.0)):
        task, logits = vocabulary_losses(
            rows, student, labels, teacher_rows, teacher, task_weight=task_weight, logits_weight=logits_weight
        )
        sums = total(task), total(logits)
        results.append([*sums, *torch.autograd.grad(sums[0] + 0.5 * sums[1], inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_embeddings_that_are_the_head_get_both_gradients() -> None:
    _, student, labels, *_ = problem()
    embedding = student.weight.requires_grad_()
    ids = torch.arange(ROWS) * 3 % STUDENT_VOCABULARY
    task, _ = vocabulary_losses(torch.tanh(embedding[ids]), VocabularyHead(embedding), labels)
    made = torch.autograd.grad(total(task), embedding)[0]
    logits = torch.tanh(embedding[ids]) @ embedding.T
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(made, torch.autograd.grad(expected, embedding)[0], atol=1e-11, rtol=1e-10)


def test_gradients_are_made_once_in_the_expected_ratio_and_never_without_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[int] = []
    add = HeadGradients.add

    def counted(self: HeadGradients, slope: Tensor, rows: Tensor, part: slice) -> None:
        chunks.append(len(rows))
        add(self, slope, rows, part)

    monkeypatch.setattr(HeadGradients, "add", counted)
    rows, student, labels, teacher_rows, teacher = problem()
    leaves(rows, student)
    with torch.no_grad():
        task, logits = vocabulary_losses(rows, student, labels, teacher_rows, teacher)
    assert chunks == []
    assert not total(task).requires_grad
    task, logits = vocabulary_losses(rows, student, labels, teacher_rows, teacher, task_weight=0.7, logits_weight=0.1)
    count = torch.tensor(float(ROWS), dtype=torch.float64)
    (0.7 * total(task) / count + 0.1 * total(logits) / count).backward(retain_graph=True)
    assert chunks == [4, 4, 3]
    first = rows.grad
    assert first is not None
    rows.grad = None
    (0.7 * total(task) / count + 0.1 * total(logits) / count).backward(retain_graph=True)
    torch.testing.assert_close(rows.grad, first, atol=0, rtol=0)
    assert chunks == [4, 4, 3]
    total(task).backward()
    assert chunks == [4, 4, 3, 4, 4, 3]


def test_a_frozen_head_gets_no_gradient_and_costs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[HeadGradients] = []
    monkeypatch.setattr(vocabulary_loss, "HeadGradients", lambda *given: made.append(HeadGradients(*given)) or made[-1])
    rows, student, labels, *_ = problem(bias=True)
    task, _ = vocabulary_losses(rows.requires_grad_(), student, labels)
    total(task).backward()
    assert rows.grad is not None
    assert rows.grad.any()
    assert student.weight.grad is None
    assert [(found.weight, found.bias) for found in made] == [(None, None)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_token_that_the_teacher_rules_out(divergence: Any) -> None:
    rows, student, labels, teacher_rows, teacher = problem(bias=True)
    assert teacher.bias is not None
    teacher.bias[3] = -math.inf
    found = vocabulary_losses(
        rows.requires_grad_(), student, labels, teacher_rows, teacher, divergence=divergence, task_weight=None
    )[1]
    teacher.bias[3] = -100.0
    limit = vocabulary_losses(rows, student, labels, teacher_rows, teacher, divergence=divergence)[1]
    total(found).backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()
    assert total(found).item() == pytest.approx(total(limit).item(), rel=0.06 if divergence == "reverse_kl" else 1e-9)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js_divergence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_models_are_exactly_at_rest(divergence: Any, dtype: torch.dtype) -> None:
    rows, weight = draw(ROWS, 5, seed=1, dtype=dtype), draw(STUDENT_VOCABULARY, 5, seed=2, dtype=dtype)
    labels = torch.zeros(ROWS, dtype=torch.long)
    teacher = VocabularyHead(weight.clone())
    _, logits = vocabulary_losses(
        rows.requires_grad_(), VocabularyHead(weight), labels, rows.detach(), teacher, task_weight=None,
        divergence=divergence, temperature=3.0,
    )  # fmt: skip
    total(logits).backward()
    assert rows.grad is not None
    assert total(logits).item() == 0
    assert not rows.grad.any()


def test_sixteen_bits_multiply_and_float32_does_the_rest() -> None:
    rows, student, labels, teacher_rows, teacher = problem(64, bias=True)
    inputs = leaves(rows, student)
    exact = vocabulary_losses(rows, student, labels, teacher_rows, teacher, temperature=2.0)
    wanted = torch.autograd.grad(total(exact[0]) + total(exact[1]), inputs)
    half = VocabularyHead(teacher.weight.bfloat16(), teacher.bias.bfloat16() if teacher.bias is not None else None)
    for dtype, autocast in [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]:
        leaf = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        head = VocabularyHead(leaf[1], leaf[2])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            task, logits = vocabulary_losses(leaf[0], head, labels, teacher_rows.bfloat16(), half, temperature=2.0)
        assert total(task).dtype == total(logits).dtype == torch.float32
        close = 1e-5 if dtype == torch.float32 and not autocast else 2e-2
        assert total(task).item() == pytest.approx(total(exact[0]).item(), rel=close)
        assert (total(task).item() == pytest.approx(total(exact[0]).item(), rel=1e-6)) == (close < 1e-4)
        assert total(logits).item() == pytest.approx(total(exact[1]).item(), rel=2e-2)
        for ours, theirs in zip(torch.autograd.grad(total(task) + total(logits), leaf), wanted, strict=True):
            assert ours.dtype == dtype
            assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("equal", [0.2, 1.0])
def test_float16_sums_over_many_equal_labels_do_not_overflow(equal: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_loss, "FEWEST_ROWS", 2048)
    rows = torch.randn(2048, 16, generator=torch.Generator().manual_seed(1)) + 40
    weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(2)) * 0.02
    labels = torch.arange(2048) % 64
    labels[: int(equal * 2048)] = 0
    found = []
    for halved in (False, True):
        head = VocabularyHead(weight.clone().requires_grad_())
        with torch.autocast("cpu", torch.float16, enabled=halved):
            task, _ = vocabulary_losses(rows, head, labels)
        found.append(torch.autograd.grad(task.total / task.count, head.weight)[0])
    assert equal < 1 or found[0].abs().max() * 2048 > torch.finfo(torch.float16).max, "the sum of a whole chunk"
    torch.testing.assert_close(found[1], found[0], rtol=0.01, atol=0.01 * found[0].abs().max().item())


def test_what_does_not_fit_is_refused() -> None:
    rows, student, labels, teacher_rows, teacher = problem()
    with pytest.raises(UserError, match="vocab_size is 16, but must be from 2 to 15: the student has 17 logits"):
        vocabulary_losses(rows, student, labels, teacher_rows, teacher, vocab_size=16)
    with pytest.raises(UserError, match=r"temperature is 0.0.* greater than 0"):
        vocabulary_losses(rows, student, labels, teacher_rows, teacher, temperature=0.0)
    with pytest.raises(UserError, match="11 rows of the student, 10 of the teacher"):
        vocabulary_losses(rows, student, labels, teacher_rows[1:], teacher)
    with pytest.raises(UserError, match="give one of each per token"):
        vocabulary_losses(rows, student, labels[1:])
    with pytest.raises(UserError, match="only one is given: give both"):
        vocabulary_losses(rows, student, labels, teacher_head=teacher)
