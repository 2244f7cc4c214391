"""The distance between A outputs, against loops over tokens in float64 written from the equation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.matching.adapters import adapter_features, adapter_loss

BATCH, SEQ, PAIRS, FEATURES = 3, 5, 4, 6


def drawn(seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(seed)
    made = [
        [torch.randn(BATCH, SEQ, FEATURES, generator=draw, dtype=torch.float64) * (pair + 1) for pair in range(PAIRS)]
        for _ in range(2)
    ]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    return made[0], made[1], mask


def unit(values: list[float]) -> list[float]:
    norm = math.sqrt(sum(value * value for value in values))
    return [value / norm for value in values]


def reference(student: list[Tensor], teacher: list[Tensor], mask: Tensor, normalise: str) -> tuple[float, int]:
    """The sum over tokens and their number, number by number."""
    total, count = 0.0, 0
    for row in range(BATCH):
        for place in range(SEQ):
            if not mask[row, place]:
                continue
            count += 1
            ours = [side[row, place].tolist() for side in student]
            theirs = [side[row, place].tolist() for side in teacher]
            if normalise == "layer":
                pairs = [
                    sum((t - s) ** 2 for s, t in zip(unit(s_), unit(t_), strict=True))
                    for s_, t_ in zip(ours, theirs, strict=True)
                ]
                total += sum(pairs) / len(pairs)
                continue
            s, t = ([value for side in sides for value in side] for sides in (ours, theirs))
            if normalise == "none":
                total += math.sqrt(sum((a - b) ** 2 for a, b in zip(t, s, strict=True)))
            else:
                total += sum((a - b) ** 2 for a, b in zip(unit(t), unit(s), strict=True))
    return total, count


@pytest.mark.parametrize("normalise", ["concatenation", "layer", "none"])
@pytest.mark.parametrize("padded", [True, False])
def test_equals_the_slow_reference(normalise: str, padded: bool) -> None:
    student, teacher, mask = drawn()
    given = mask if padded else torch.ones_like(mask)
    mean = adapter_loss(student, teacher, mask if padded else None, normalise)
    total, count = reference(student, teacher, given, normalise)
    assert mean.total.item() == pytest.approx(total, rel=1e-12)
    assert mean.count.item() == count


def test_is_twice_one_minus_the_cosine_of_the_concatenation() -> None:
    student, teacher, _ = drawn(1)
    cosine = torch.nn.functional.cosine_similarity(torch.cat(student, -1), torch.cat(teacher, -1), dim=-1)
    torch.testing.assert_close(adapter_loss(student, teacher).value, (2 * (1 - cosine)).mean())


@pytest.mark.parametrize("normalise", ["concatenation", "layer"])
def test_ranges_from_0_to_4_whatever_the_scale(normalise: str) -> None:
    student, _, mask = drawn(2)
    for factor, expected in ((1.0, 0.0), (7.0, 0.0), (-0.1, 4.0)):
        mean = adapter_loss(student, [factor * side for side in student], mask, normalise)
        assert mean.value.item() == pytest.approx(expected, abs=1e-12)


def test_a_large_pair_dominates_unless_each_is_normalised() -> None:
    student, teacher, _ = drawn(3)
    teacher[:3] = student[:3]
    student[3], teacher[3] = 1e-3 * student[3], -1e-3 * student[3]
    assert adapter_loss(student, teacher, normalise="concatenation").value < 1e-4
    assert adapter_loss(student, teacher, normalise="layer").value.item() == pytest.approx(1.0)


def test_equal_and_zero_vectors_have_finite_gradients() -> None:
    for normalise in ("concatenation", "layer", "none"):
        equal = torch.ones(2, 3, requires_grad=True)
        adapter_loss([equal], [torch.ones(2, 3)], normalise=normalise).value.backward()
        assert torch.equal(equal.grad, torch.zeros(2, 3))
        zero = torch.zeros(2, 3, requires_grad=True)
        adapter_loss([zero], [torch.ones(2, 3)], normalise=normalise).value.backward()
        assert zero.grad.isfinite().all()


def test_padding_reaches_neither_the_value_nor_the_gradient() -> None:
    student, teacher, mask = drawn(4)
    expected = adapter_loss(student, teacher, mask).value
    broken = [side.clone() for side in student]
    for side in broken:
        side[mask == 0] = float("nan")
        side.requires_grad_()
    found = adapter_loss(broken, teacher, mask).value
    assert torch.equal(found, expected)
    found.backward()
    assert all(side.grad[mask == 0].eq(0).all() and side.grad[mask == 1].ne(0).all() for side in broken)


def test_no_gradient_reaches_the_teacher_and_half_precision_is_raised() -> None:
    student, teacher, _ = drawn(5)
    theirs = [side.bfloat16().requires_grad_() for side in teacher]
    ours = [side.bfloat16().requires_grad_() for side in student]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = adapter_loss(ours, theirs).value
        features = adapter_features(ours[0], torch.ones(2, FEATURES))
    assert value.dtype == features.dtype == torch.float32
    value.backward()
    assert all(side.grad is None for side in theirs)
    assert all(side.grad is not None for side in ours)
    exact = adapter_loss([side.double() for side in ours], [side.double() for side in theirs]).value
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_micro_batches_add_up() -> None:
    student, teacher, mask = drawn(6)
    whole = adapter_loss(student, teacher, mask)
    parts = [
        adapter_loss([side[rows] for side in student], [side[rows] for side in teacher], mask[rows])
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close((parts[0] + parts[1]).value, whole.value)


def test_features_are_the_inputs_times_a_transposed() -> None:
    inputs, a = torch.randn(2, 3, 5), torch.randn(4, 5)
    expected = torch.einsum("bsd,rd->bsr", inputs.double(), a.double())
    torch.testing.assert_close(adapter_features(inputs, a).double(), expected, atol=1e-6, rtol=1e-5)


def test_sides_that_cannot_be_compared_are_refused() -> None:
    student, teacher, _ = drawn()
    with pytest.raises(UserError, match="4 student tensors and 3 of the teacher"):
        adapter_loss(student, teacher[:3])
    with pytest.raises(UserError, match="must be equal everywhere"):
        adapter_loss([side[..., :2] for side in student], teacher)
    with pytest.raises(UserError, match="token by token"):
        adapter_loss([side[:2] for side in student], teacher)
