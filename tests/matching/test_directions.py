"""The distance between directions, and the gradient that is written out for it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerdistill.matching.directions import direction_distances, directions


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared distance as it is defined, for autograd."""
    ours = student / student.square().sum(-1, keepdim=True).sqrt()
    return (ours - teacher / teacher.square().sum(-1, keepdim=True).sqrt()).square().sum(-1)


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 5)], ids=["rows", "rows of pairs"])
def test_the_gradient_is_that_of_the_definition(shape: tuple[int, ...]) -> None:
    student, teacher, weights = rows(*shape, seed=1).requires_grad_(), rows(*shape, seed=2), rows(*shape[:-1], seed=3)
    found, missing = direction_distances(student, teacher)
    asked = by_hand(student, teacher)
    torch.testing.assert_close(found, asked, rtol=1e-12, atol=0)
    (ours,) = torch.autograd.grad((found * weights).sum(), student)
    (theirs,) = torch.autograd.grad((asked * weights).sum(), student)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert missing.count_nonzero() == 0


def test_a_side_without_a_direction_pulls_nowhere() -> None:
    student, teacher = rows(4, 5, seed=1), rows(4, 5, seed=2)
    student[0], teacher[1], student[2], teacher[2] = 0, 0, 0, 0
    student.requires_grad_()
    found, missing = direction_distances(student, teacher)
    found.sum().backward()
    assert found[:3].tolist() == pytest.approx([1, 1, 0], rel=1e-12)
    assert missing.tolist() == [1, 1, 2, 0]
    assert student.grad is not None
    # Beside a teacher without a direction |s/|s||^2 is 1 wherever the student goes.
    assert student.grad[:3].abs().max() < 1e-12
    assert student.grad[3].abs().max() > 1e-3


def test_equal_sides_give_exactly_nothing_in_float32() -> None:
    student = rows(50, 33).float().requires_grad_()
    found, _ = direction_distances(student, student.detach().clone())
    found.sum().backward()
    assert found.count_nonzero() == 0
    assert student.grad is not None
    assert student.grad.count_nonzero() == 0


def test_shortest_says_what_has_no_direction() -> None:
    student, teacher = torch.tensor([[1e-9, 0.0], [1e-7, 0.0]], dtype=torch.float64), torch.tensor([[1.0, 0.0]] * 2)
    found, missing = direction_distances(student, teacher.double(), shortest=1e-8)
    assert missing.tolist() == [1, 0]
    assert found.tolist() == pytest.approx([1, 0], abs=1e-12)


def test_a_nan_is_not_taken_for_a_zero_vector() -> None:
    student = torch.tensor([[math.nan, 1.0], [1.0, 1.0]], requires_grad=True)
    found, _ = direction_distances(student, torch.ones(2, 2))
    assert found.isnan().tolist() == [True, False]
    found.sum().backward()
    assert student.grad is not None
    assert student.grad.isnan().any(1).tolist() == [True, False]
    assert directions(student.detach())[0].isnan().all()


def test_both_sides_get_a_gradient_through_directions() -> None:
    vectors = rows(3, 4)
    vectors[1] = 0
    vectors.requires_grad_()
    assert torch.autograd.gradcheck(lambda given: directions(given)[[0, 2]], (vectors,))
    directions(vectors).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad[1].tolist() == [0, 0, 0, 0]
