"""Predictions over a teacher's likeliest tokens: the equations, fused and plain, and what they are beside the whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import TopK, TopTokens
from layerdistill.matching import (
    VocabularyHead,
    forward_kl,
    likeliest_tokens,
    top_k_divergence,
    vocabulary_loss,
    vocabulary_losses,
)

from . import references

DIVERGENCES = ("forward_kl", "reverse_kl", "js_divergence", "soft_cross_entropy")
ROWS, VOCABULARY, WIDTH = 9, 23, 20


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_loss, "FEWEST_ROWS", 4)
    monkeypatch.setattr(vocabulary_loss, "CHUNK", {"cpu": 1})
    monkeypatch.setattr(vocabulary_loss, "PIECE", {"cpu": 2 * VOCABULARY})


def logits(seed: int, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)


def outcomes(row: Tensor, ids: list[int], temperature: float, width: int) -> Any:
    """The probabilities of some tokens and of all others together."""
    p = references.softmax(row[:width].numpy(), temperature)
    others = sum(p[token] for token in range(width) if token not in ids)
    return np.array([*(p[token] for token in ids), others])


def divergence_of(p: Any, q: Any, name: str) -> float:
    """D(teacher p, student q), from its definition."""
    if name == "forward_kl":
        return references.kl(p, q)
    if name == "reverse_kl":
        return references.kl(q, p)
    if name == "soft_cross_entropy":
        return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    middle = (p + q) / 2
    return (references.kl(p, middle) + references.kl(q, middle)) / 2


def reference(student: Tensor, teacher: Tensor, k: int, temperature: float, width: int, name: str) -> float:
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        ids = sorted(range(width), key=lambda token: -float(theirs[token]))[:k]
        total += divergence_of(outcomes(theirs, ids, temperature, width), outcomes(ours, ids, temperature, width), name)
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (5, 2.0), (WIDTH - 1, 0.7)])
def test_values_and_gradients_against_the_equations(name: Any, k: int, temperature: float) -> None:
    student, teacher = logits(1).requires_grad_(), logits(2)
    top = likeliest_tokens(teacher, TopK(k, temperature, WIDTH))
    options: dict[str, Any] = {"divergence": name, "temperature": temperature, "vocab_size": WIDTH}
    found = top_k_divergence(student, top, **options).value
    assert found.item() == pytest.approx(reference(student.detach(), teacher, k, temperature, WIDTH, name), rel=1e-10)
    (gradient,) = torch.autograd.grad(found, student)
    step, at = 1e-6, [(0, 0), (3, 7), (8, WIDTH - 1), (5, VOCABULARY - 1)]
    for row, token in at:
        sides = []
        for sign in (1, -1):
            moved = student.detach().clone()
            moved[row, token] += sign * step
            sides.append(reference(moved, teacher, k, temperature, WIDTH, name))
        assert gradient[row, token].item() == pytest.approx((sides[0] - sides[1]) / 2 / step, abs=1e-8)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_fused_form_is_the_plain_one(name: Any) -> None:
    rows = torch.randn(ROWS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    weight = torch.randn(
        VOCABULARY, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    ).requires_grad_()
    labels = torch.arange(ROWS) % WIDTH
    top = likeliest_tokens(logits(2), TopK(5, 2.0, WIDTH))
    options: dict[str, Any] = {"divergence": name, "temperature": 2.0, "vocab_size": WIDTH}
    task, fused = vocabulary_losses(rows, VocabularyHead(weight), labels, teacher_top=top, logits_weight=0.7, **options)
    assert task is not None
    assert fused is not None
    plain = top_k_divergence(rows @ weight.T, top, **options)
    plain_task = torch.nn.functional.cross_entropy(rows @ weight.T, labels)
    assert fused.value.item() == pytest.approx(plain.value.item(), rel=1e-12)
    assert task.value.item() == pytest.approx(plain_task.item(), rel=1e-12)
    ours = torch.autograd.grad(task.value + 0.7 * fused.value, (rows, weight))
    theirs = torch.autograd.grad(plain_task + 0.7 * plain.value, (rows, weight))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_all_tokens_but_one_are_the_whole_and_fewer_say_less() -> None:
    student, teacher = logits(1), logits(2)
    whole = forward_kl(student, teacher, temperature=2.0).value.item()
    found = [
        top_k_divergence(student, likeliest_tokens(teacher, TopK(k, 2.0)), temperature=2.0).value.item()
        for k in (1, 4, 12, VOCABULARY - 1)
    ]
    assert found[-1] == pytest.approx(whole, rel=1e-12)
    assert found == sorted(found), "the log sum inequality"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_models_are_at_rest(name: Any) -> None:
    student = logits(1).requires_grad_()
    top = likeliest_tokens(student.detach(), TopK(5, 2.0))
    found = top_k_divergence(student, top, divergence=name, temperature=2.0).value
    (gradient,) = torch.autograd.grad(found, student)
    assert gradient.abs().max() < 1e-15
    if name != "soft_cross_entropy":
        assert abs(found.item()) < 1e-14


def test_a_student_that_is_sure_keeps_finite_numbers() -> None:
    sure = torch.zeros(2, VOCABULARY)
    sure[:, 0] = 300.0
    top = likeliest_tokens(torch.zeros(2, VOCABULARY), TopK(2))
    head, labels = VocabularyHead(torch.eye(VOCABULARY)), torch.zeros(2, dtype=torch.long)
    for name in DIVERGENCES:
        rows = sure.clone().requires_grad_()
        _, found = vocabulary_losses(rows, head, labels, teacher_top=top, divergence=name)  # type: ignore[arg-type]
        assert found is not None
        found.value.backward()
        assert found.value.isfinite()
        assert rows.grad is not None
        assert rows.grad.isfinite().all()


def test_the_likeliest_are_sorted_and_add_up_to_one() -> None:
    top = likeliest_tokens(logits(2), TopK(5, 2.0, WIDTH))
    assert top.ids.shape == (ROWS, 5)
    assert top.ids.max() < WIDTH
    assert top.log_probabilities.exp().sum(-1).tolist() == pytest.approx([1.0] * ROWS, rel=1e-12)
    assert (top.log_probabilities[:, :-1].diff(dim=-1) <= 0).all()
    nothing = likeliest_tokens(torch.zeros(0, VOCABULARY), TopK(3))
    assert nothing.ids.shape == (0, 3)


def test_only_kept_positions_count() -> None:
    student, teacher, mask = logits(1), logits(2), torch.arange(ROWS) % 2
    teacher[mask == 0] = float("nan")
    top = likeliest_tokens(torch.nan_to_num(teacher), TopK(5))
    broken = TopTokens(top.ids, torch.where(mask.bool()[:, None], top.log_probabilities, torch.nan))
    found = top_k_divergence(student, broken, mask)
    kept = mask.bool()
    alone = top_k_divergence(student[kept], TopTokens(top.ids[kept], top.log_probabilities[kept]))
    assert found.value.item() == pytest.approx(alone.value.item(), rel=1e-12)
    assert found.count == kept.sum()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="k is 23, but must be from 1 to 22"):
        likeliest_tokens(logits(1), TopK(VOCABULARY))
    top = likeliest_tokens(logits(2), TopK(5))
    head, labels = VocabularyHead(torch.eye(VOCABULARY).double()), torch.zeros(ROWS, dtype=torch.long)
    with pytest.raises(UserError, match="both given"):
        vocabulary_losses(logits(1), head, labels, logits(2), head, top)
    with pytest.raises(UserError, match="9 rows of the student, 8 of the teacher"):
        vocabulary_losses(logits(1), head, labels, teacher_top=TopTokens(top.ids[1:], top.log_probabilities[1:]))


def test_what_either_side_excludes_keeps_finite_numbers() -> None:
    teacher, student = logits(2), logits(1)
    teacher[:, 3:] = -torch.inf
    student[:, 0] = -torch.inf
    student.requires_grad_()
    top = likeliest_tokens(teacher, TopK(5))
    assert top.log_probabilities.isfinite().all()
    for name in DIVERGENCES:
        found = top_k_divergence(student, top, divergence=name).value  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(found, student)
        assert found.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("width", [640, 1031, 1055])
@pytest.mark.parametrize("place", ["spread", "in one group", "at the end"])
def test_the_likeliest_of_a_wide_row_are_found_wherever_they_are(width: int, place: str) -> None:
    k, draw = 5, torch.Generator().manual_seed(width)
    rows = torch.randn(40, width, generator=draw, dtype=torch.float64)
    if place != "spread":
        start = width - 7 if place == "at the end" else 64
        rows[:, start : start + 7] += 20
    rows[3] = -torch.inf
    rows[3, width - 1], rows[3, 1] = 0.0, 1.0
    before = rows.clone()
    top = likeliest_tokens(rows, TopK(k, 2.0))
    assert torch.equal(rows, before), "the logits are somebody else's"
    likely = torch.softmax(rows / 2.0, -1)
    values, ids = likely.topk(k, -1)
    assert torch.allclose(top.log_probabilities.exp()[:, :k], values, rtol=1e-12, atol=1e-40)
    finite = values > 1e-30
    assert torch.equal(top.ids[finite], ids[finite])
    others = 1 - values.sum(-1) if place == "spread" else likely.scatter(1, ids, 0.0).sum(-1)
    assert torch.allclose(top.log_probabilities.exp()[:, k], others, rtol=1e-9, atol=1e-14)
    assert all(len(set(row)) == k for row in top.ids.tolist())
