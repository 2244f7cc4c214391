"""What is special to losses on predictions: infinite logits, padded vocabularies, one logit, hard labels."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean
from layerdistill.matching import (
    binary_cross_entropy,
    binary_kl,
    cross_entropy,
    forward_kl,
    js_divergence,
    logit_mse,
    mean_squared_error,
    next_token_labels,
    reverse_kl,
    soft_cross_entropy,
    wide_rows,
)

from . import references

CATEGORICAL = (forward_kl, reverse_kl, js_divergence, soft_cross_entropy)
each_categorical = pytest.mark.parametrize("loss", CATEGORICAL, ids=lambda loss: loss.__name__)
Divergence = Callable[..., Mean]


def logits(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each_categorical
def test_one_logit_is_refused(loss: Divergence) -> None:
    with pytest.raises(UserError, match=r"over one logit.*logit_mse"):
        loss(logits(4, 1, seed=0), logits(4, 1, seed=1))


@pytest.mark.parametrize("loss", [logit_mse, binary_kl])
def test_one_logit_is_fine_where_it_means_something(loss: Divergence) -> None:
    assert loss(logits(4, 1, seed=0), logits(4, 1, seed=1)).value.item() > 0


@pytest.mark.parametrize("loss", [*CATEGORICAL, logit_mse, binary_kl], ids=lambda loss: loss.__name__)
def test_ids_that_pad_a_vocabulary_count_on_neither_side(loss: Divergence) -> None:
    student, teacher = logits(3, 10, seed=0), logits(3, 12, seed=1)
    student[:, 8:], teacher[:, 8:] = 50.0, math.nan
    expected = loss(student[:, :8], teacher[:, :8]).value
    assert loss(student, teacher, vocab_size=8).value == expected
    assert loss(student[:, :8], teacher).value == expected
    student.requires_grad_()
    loss(student, teacher, vocab_size=8).value.backward()
    assert student.grad is not None
    assert not student.grad[:, 8:].any()
    with pytest.raises(UserError, match="vocab_size is 11, but must be from 1 to 10: the student has 10 logits"):
        loss(student, teacher, vocab_size=11)


@pytest.mark.parametrize("loss", [*CATEGORICAL, binary_kl], ids=lambda loss: loss.__name__)
def test_a_class_the_teacher_rules_out_gives_no_nan(loss: Divergence) -> None:
    student, teacher = logits(3, 5, seed=0).requires_grad_(), logits(3, 5, seed=1)
    teacher[0, 2] = teacher[1, 4] = -math.inf
    value = loss(student, teacher).value
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    limit = teacher.clamp(min=-100.0)
    assert value.item() == pytest.approx(loss(student, limit).value.item(), rel=0.06 if loss is reverse_kl else 1e-9)
    if loss is not soft_cross_entropy:
        both = teacher.clone().requires_grad_()
        equal = loss(both, teacher).value
        equal.backward()
        assert equal.item() == 0
        assert both.grad is not None
        assert not both.grad.any()


def test_js_divergence_is_bounded_and_symmetric() -> None:
    far = torch.tensor([[200.0, -200, 0], [-200, 200, 0]])
    assert js_divergence(far[:1], far[1:]).value.item() == pytest.approx(math.log(2), rel=1e-6)
    a, b = logits(4, 6, seed=0), logits(4, 6, seed=1)
    assert js_divergence(a, b).value.item() == pytest.approx(js_divergence(b, a).value.item(), rel=1e-12)


def test_the_squared_temperature_keeps_the_size_of_the_gradient() -> None:
    student, teacher = 0.01 * logits(4, 6, seed=0), 0.01 * logits(4, 6, seed=1)
    sizes = []
    for temperature in (1.0, 10.0):
        leaf = student.clone().requires_grad_()
        forward_kl(leaf, teacher, temperature=temperature).value.backward()
        assert leaf.grad is not None
        sizes.append(leaf.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=r"temperature is .* greater than 0"):
        forward_kl(logits(2, 3, seed=0), logits(2, 3, seed=1), temperature=temperature)


def test_cross_entropy_counts_the_labels_that_are_there() -> None:
    scores, labels = logits(2, 4, 5, seed=0), torch.tensor([[1, -100, 4, 0], [-100, -100, -100, 2]])
    expected = [
        -math.log(references.softmax(scores[i, j].numpy(), 1.0)[labels[i, j]])
        for i in range(2)
        for j in range(4)
        if labels[i, j] != -100
    ]
    mean = cross_entropy(scores, labels)
    assert mean.count.item() == 4
    assert mean.value.item() == pytest.approx(sum(expected) / 4, rel=1e-12)
    parts = cross_entropy(scores[:1], labels[:1]) + cross_entropy(scores[1:], labels[1:])
    assert parts.value.item() == pytest.approx(mean.value.item(), rel=1e-14)
    scores[labels == -100] = math.nan
    scores.requires_grad_()
    unseen = cross_entropy(scores, labels)
    unseen.value.backward()
    assert unseen.value.item() == pytest.approx(mean.value.item(), rel=1e-14)
    assert scores.grad is not None
    assert not scores.grad[labels == -100].any()
    assert cross_entropy(scores, torch.full_like(labels, -100)).value.item() == 0
    assert cross_entropy(scores, torch.where(labels == -100, 7, labels), ignore_index=7).count.item() == 4


def test_binary_cross_entropy_is_the_mean_over_classes_and_counts_examples() -> None:
    scores, labels = logits(4, 3, seed=0), torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    probabilities = 1 / (1 + np.exp(-scores.numpy()))
    expected = -np.where(labels.numpy() == 1, np.log(probabilities), np.log(1 - probabilities)).mean()
    mean = binary_cross_entropy(scores, labels)
    assert mean.count.item() == 4
    assert mean.value.item() == pytest.approx(expected, rel=1e-12)


def test_mean_squared_error_does_not_broadcast() -> None:
    scores, labels = logits(4, 1, seed=0), torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = sum((scores[i, 0].item() - labels[i].item()) ** 2 for i in range(4)) / 4
    for shaped in (labels, labels.unsqueeze(1)):
        mean = mean_squared_error(scores, shaped)
        assert mean.count.item() == 4
        assert mean.value.item() == pytest.approx(expected, rel=1e-12)
    two = mean_squared_error(logits(4, 2, seed=0), torch.zeros(4, 2))
    assert two.value.item() == pytest.approx((logits(4, 2, seed=0) ** 2).mean().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "scores", "labels"),
    [
        (cross_entropy, (4, 3), (4, 1)),
        (cross_entropy, (2, 4, 3), (2, 3)),
        (binary_cross_entropy, (4, 3), (4,)),
        (mean_squared_error, (4, 2), (4,)),
        (mean_squared_error, (4, 1), (1, 4)),
    ],
)
def test_labels_that_do_not_fit_are_refused(loss: Divergence, scores: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="labels have shape"):
        loss(torch.zeros(scores), torch.zeros(labels, dtype=torch.long))


def test_cross_entropy_over_one_class_is_refused() -> None:
    with pytest.raises(UserError, match=r"over one logit.*mean_squared_error"):
        cross_entropy(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy, mean_squared_error])
def test_label_losses_are_computed_in_float32_and_have_their_gradient(loss: Divergence) -> None:
    labels = torch.tensor([1, 0, 2]) if loss is cross_entropy else torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 1, 0]])
    scores = logits(3, 3, seed=0).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, labels).value, (scores,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = loss(scores.bfloat16(), labels)
    assert mean.total.dtype == mean.count.dtype == torch.float32
    assert mean.value.item() == pytest.approx(loss(scores.bfloat16().double(), labels).value.item(), rel=1e-6)


def test_next_token_labels_pairs_each_position_with_the_next_token() -> None:
    labels = torch.arange(10).reshape(2, 5)
    assert next_token_labels(labels).tolist() == [[1, 2, 3, 4, -100], [6, 7, 8, 9, -100]]


def test_pieces_of_rows_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = logits(3, 7, 50, seed=0), logits(3, 7, 50, seed=1), torch.randint(0, 50, (3, 7))
    labels[0, 3:] = -100
    found = []
    for elements in (1, 170, 10**6):
        monkeypatch.setattr(wide_rows, "PIECE", {"cpu": elements})
        ours = student.clone().requires_grad_()
        kl = forward_kl(ours, teacher, labels != -100, temperature=1.7, vocab_size=47)
        hard = cross_entropy(ours, labels)
        total = kl.value + 0.3 * hard.value
        first = torch.autograd.grad(total, ours, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(total, ours)[0]), "a graph that is kept can be used again"
        found.append((kl.total, hard.total, first))
    for one in found[1:]:
        for given, expected in zip(one, found[0], strict=True):
            torch.testing.assert_close(given, expected)
