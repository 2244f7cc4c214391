"""Losses between two hidden states of equal width, averaged over real tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean
from layerdistill.matching.directions import direction_distances
from layerdistill.matching.rows import (
    counted,
    in_full_precision,
    in_one_dtype,
    real_row_numbers,
    real_rows,
    same_rows,
    square_sum,
    summed,
)

LAYER_NORM_EPS = 1e-5
"""What is added to the variance in `layer_norm_mse`: torch's default, which the released code uses."""


@in_full_precision
def masked_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None, divide_by_teacher: bool = False) -> Mean:
    """Squared difference, averaged over the hidden axis within a token and then over real tokens.

    `student` and `teacher` are `(batch, seq, hidden)` with `mask` `(batch, seq)`, or `(tokens, hidden)` with `mask`
    `(tokens,)`; no mask means that all tokens are real. The count is in tokens. No gradient reaches the teacher.

    `divide_by_teacher` divides by the mean square of the teacher's real entries in this call, which makes the loss 1
    for a student of zeros, whatever the layer's scale. It also makes the loss depend on how tokens are batched:
    micro-batches added together differ from their whole batch. A teacher of zeros is not divided by.

    Raises UserError when shapes differ.
    """
    s, t = _token_pairs(student, teacher, mask)
    total = _SquaredDistance.apply(s, t) / s.shape[1]
    return Mean(relative_to(total, t) if divide_by_teacher else total, counted(s))


def relative_to(total: Tensor, teacher: Tensor) -> Tensor:
    """Return a squared distance divided by the mean square of the teacher's rows, undivided where that is 0."""
    square = teacher.square().sum() / max(teacher.numel(), 1)
    return total / torch.where(square == 0, torch.ones_like(square), square)


class _SquaredDistance(torch.autograd.Function):
    """The sum of squared differences of two tensors of one shape; only the first gets a gradient.

    Autograd would go over the rows, which are the largest tensors of a hidden term, twice as often.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        difference = student - teacher
        ctx.save_for_backward(difference)
        return square_sum(difference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * upstream), None


@in_full_precision
def cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Mean:
    """One minus the cosine between the student's and the teacher's vector, averaged over real tokens; range 0 to 2.

    Shapes and mask as in `masked_mse`; the count is in tokens. A zero vector has no direction: its cosine is taken as
    0 (a loss of 1), and it receives no gradient. Once differentiable. Source: DistilBERT (Sanh et al. 2019), cosine
    embedding loss. Raises UserError when shapes differ.
    """
    distances, missing = direction_distances(*_token_pairs(student, teacher, mask))
    # Half the squared distance of unit vectors, because 1 - <s, t> would leave a rounding error at equality.
    return summed((distances + missing) / 2)


@in_full_precision
def normalised_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Mean:
    """Squared distance, summed over the hidden axis, of the two vectors each divided by its L2 norm.

    Equal to `2 (1 - cos)`, so it ranges from 0 to 4 and does not shrink with the width. Shapes and mask as in
    `masked_mse`; the count is in tokens. The distance is squared, so the gradient is smooth where the two agree (the
    un-squared distance of some code is not). A zero vector stays zero and receives no gradient. Once differentiable.

    Source: LoRAILD (Suzuki et al. 2025), per layer and over real tokens only; their code normalises the concatenation
    of all layers and averages over padding too. Raises UserError when shapes differ.
    """
    return summed(direction_distances(*_token_pairs(student, teacher, mask))[0])


@in_full_precision
def padded_normalised_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Mean:
    """`normalised_mse` averaged over all positions, padding included, times the share of positions that are real.

    Shapes as in `masked_mse`; the count is in real tokens. Equal to `normalised_mse` where nothing is padded. Source:
    the released code of Yu et al. (2025, https://arxiv.org/abs/2502.04499) for Qwen3, where padding pulls too and each
    real token weighs less the more padding there is; not for anything else. What stands in padding reaches the value
    and the gradient. Once differentiable. Raises UserError when shapes differ.
    """
    distances, _ = direction_distances(*_token_pairs(student, teacher, None))
    positions = distances.shape[0]
    real = counted(real_row_numbers(student, mask)).to(distances.dtype)
    return Mean(distances.sum() * (real / max(positions, 1)).square(), real)


@in_full_precision
def layer_norm_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Mean:
    """`masked_mse` after each side's real entries, all together, were brought to mean 0 and variance 1.

    Shapes and mask as in `masked_mse`; the count is in tokens. One mean and one variance for a whole call (eps 1e-5),
    not one per token, so the loss depends on how tokens are batched: micro-batches added together differ from their
    whole batch. Source: the released code of Yu et al. (2025, https://arxiv.org/abs/2502.04499) for T5,
    `layer_norm(x, x.shape)`. Deviation: theirs takes the mean and variance over padding too. Raises UserError when
    shapes differ.
    """
    s, t = (_standardised(side) for side in _token_pairs(student, teacher, mask))
    return summed((s - t).square().mean(-1))


def _standardised(rows: Tensor) -> Tensor:
    return layer_norm(rows, rows.shape, eps=LAYER_NORM_EPS) if rows.numel() else rows


def _token_pairs(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    equal_widths(student.shape[-1], teacher.shape[-1])
    same_rows(student, teacher)
    return in_one_dtype(real_rows(student, mask), real_rows(teacher.detach(), mask))


def equal_widths(student: int, teacher: int) -> None:
    """Raise UserError unless both sides are equally wide."""
    if student != teacher:
        raise UserError(
            f"the student's hidden states are {student} wide and the teacher's {teacher}, but this loss compares equal "
            "widths: put a projection (linear, orthogonal, frozen_random) before it, or use the cka loss, which needs "
            "none."
        )
