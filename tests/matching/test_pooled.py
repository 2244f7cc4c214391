"""RAIL-KD's pooling and distance: the equations, padding, both gradients, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.matching import direction_distance, mean_over_tokens

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])


def states(seed: int = 0, width: int = 5) -> Tensor:
    return torch.randn(3, 4, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(student: list[list[float]], teacher: list[list[float]], power: int) -> float:
    """(1/B) sum over b of || s/||s|| - t/||t|| ||^power, entry by entry."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        norms = [math.sqrt(sum(x * x for x in side)) for side in (s, t)]
        total += math.sqrt(sum((a / norms[0] - b / norms[1]) ** 2 for a, b in zip(s, t, strict=True))) ** power
    return total / len(student)


@pytest.mark.parametrize("padded", [False, True])
def test_pooling_is_the_mean_over_real_tokens_or_over_all(padded: bool) -> None:
    hidden = states()
    found = mean_over_tokens(hidden, None if padded else MASK)
    assert found.dtype == torch.float64
    for text in range(3):
        places = [place for place in range(4) if padded or MASK[text, place]]
        for feature in range(5):
            expected = sum(hidden[text, place, feature].item() for place in places) / len(places)
            assert found[text, feature].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_padding_reaches_neither_value_nor_gradient(garbage: float) -> None:
    clean = states()
    dirty = clean.clone()
    dirty[MASK == 0] = garbage
    dirty.requires_grad_()
    found = mean_over_tokens(dirty, MASK)
    assert torch.equal(found, mean_over_tokens(clean, MASK))
    found.sum().backward()
    assert dirty.grad is not None
    expected = (MASK / MASK.sum(1, keepdim=True)).unsqueeze(-1).expand(3, 4, 5)
    assert torch.allclose(dirty.grad, expected.double())


def test_an_example_without_real_tokens_is_zero_and_half_precision_becomes_float32() -> None:
    found = mean_over_tokens(states().half(), MASK * torch.tensor([[1], [0], [1]]))
    assert found.dtype == torch.float32
    assert not found[1].any()
    assert found[0].any()


@pytest.mark.parametrize("squared", [True, False])
def test_distance_is_the_equation(squared: bool) -> None:
    student, teacher = states(1)[:, 0], 7 * states(2)[:, 0]
    mean = direction_distance(student, teacher, squared)
    expected = distance(student.tolist(), teacher.tolist(), 2 if squared else 1)
    assert mean.value.item() == pytest.approx(expected, rel=1e-12)
    assert mean.count.item() == 3
    assert direction_distance(student, -3 * student, squared).value.item() == pytest.approx(4 if squared else 2)
    parts = [direction_distance(student[row : row + 1], teacher[row : row + 1], squared) for row in range(3)]
    assert (parts[0] + parts[1] + parts[2]).value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("squared", [True, False])
def test_both_sides_get_the_gradient_of_the_value(squared: bool) -> None:
    student, teacher = states(1)[:, 0].requires_grad_(), states(2)[:, 0].requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: direction_distance(s, t, squared).value, (student, teacher))


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("case", ["equal", "zero"])
def test_equal_and_zero_vectors_have_no_broken_gradient(squared: bool, case: str) -> None:
    student = (states(1)[:, 0] * (case == "equal")).requires_grad_()
    teacher = student.detach().clone() if case == "equal" else states(2)[:, 0]
    value = direction_distance(student, teacher, squared).value
    assert value.item() == pytest.approx(0.0 if case == "equal" else 1.0)
    value.backward()
    assert student.grad is not None
    assert not student.grad.any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"\(3, 5\), but must be \(batch, seq, hidden\)"):
        mean_over_tokens(states()[:, 0])
    with pytest.raises(UserError, match=r"mask has shape \(3, 3\).*\(3, 4\)"):
        mean_over_tokens(states(), MASK[:, :3])
    with pytest.raises(UserError, match=r"\(3, 5\) and the teacher's \(3, 6\)"):
        direction_distance(states()[:, 0], states(width=6)[:, 0])
