"""Vectors divided by their length, and the squared distance between two of them with its gradient written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def directions(rows: Tensor) -> Tensor:
    """Return each row of `(rows, features)` divided by its L2 norm; a zero row stays zero and gets no gradient."""
    square = rows.square().sum(-1, keepdim=True)
    return rows * _per_length(square, torch.finfo(rows.dtype).tiny)


def direction_distances(student: Tensor, teacher: Tensor, shortest: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the squared distance of each row's two directions, and how many of the two sides have none; `(...)` each.

    Both are `(..., features)`; only the student's side gets a gradient. A row whose norm is `shortest` or less
    (default: the root of the smallest normal number) has no direction: it counts as zero and gets no gradient. The
    distance and its gradient are exactly 0 where the two are equal. NaN goes through.
    """
    smallest = torch.finfo(student.dtype).tiny if shortest is None else shortest**2
    return _DirectionDistance.apply(student, teacher, smallest)


class _DirectionDistance(torch.autograd.Function):
    """With d = s/|s| - t/|t| the gradient of |d|^2 is 2/|s| (d - <s/|s|, d> s/|s|), and <s/|s|, d> = |d|^2 / 2.

    Without a t/|t| that inner product is 1. Autograd would go over the rows, which are the largest tensors of a hidden
    term, five times as often.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
        per_length, theirs = (
            _per_length(torch.linalg.vector_norm(side, dim=-1, keepdim=True).square(), smallest)
            for side in (student, teacher)
        )
        # Not one fused multiply-add, which would not be exactly 0 at equality.
        difference = student * per_length
        difference -= teacher * theirs
        distances = torch.linalg.vector_norm(difference, dim=-1).square()
        without = (theirs == 0).squeeze(-1)
        inner = torch.where(without, torch.ones_like(distances), distances / 2)
        ctx.save_for_backward(student, difference, per_length, inner.unsqueeze(-1))
        missing = without.to(distances.dtype) + (per_length == 0).squeeze(-1).to(distances.dtype)
        ctx.mark_non_differentiable(missing)
        return distances, missing

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        student, difference, per_length, inner = ctx.saved_tensors
        gradient = torch.addcmul(difference, student, inner * per_length, value=-1)
        gradient *= 2 * per_length * upstream.unsqueeze(-1)
        return gradient, None, None


def _per_length(square: Tensor, smallest: float) -> Tensor:
    """Return 1 / length of squared lengths, and 0 (with a gradient of 0) for those up to `smallest`."""
    # Written with <=, which is false for NaN, so that a NaN in a real token is not turned into a zero vector.
    without = square <= smallest
    return torch.where(without, torch.zeros_like(square), torch.where(without, torch.ones_like(square), square).rsqrt())
