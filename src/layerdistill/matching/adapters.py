"""What LoRAILD compares: the outputs of LoRA's down-projections, of both models and of all matched layers together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean
from layerdistill.matching.directions import direction_distances
from layerdistill.matching.rows import in_full_precision, in_one_dtype, real_rows, same_rows, summed, upcast

Normalise = Literal["concatenation", "layer", "none"]

EPSILON = 1e-8
"""A vector of at most this L2 norm has no direction; the released code divides by the norm whatever it is."""


@in_full_precision
def adapter_features(inputs: Tensor, matrix: Tensor) -> Tensor:
    """Return `inputs A^T`, `(..., rank)`: what LoRA's A `(rank, in_features)` makes of `(..., in_features)`."""
    rows, a = in_one_dtype(upcast(inputs), upcast(matrix))
    return rows @ a.T


def adapter_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None = None,
    normalise: Normalise = "concatenation",
) -> Mean:
    """Distance per token between the A outputs of the two models, averaged over real tokens; the count is in tokens.

    Each sequence holds one tensor per matched pair, `(batch, seq, features)` with `mask` `(batch, seq)`, or
    `(tokens, features)`; `features` is the rank times the number of projections. No gradient reaches the teacher.

    - `concatenation`: `|| u_t / ||u_t|| - u_s / ||u_s|| ||^2` with u the concatenation over all pairs: `2 (1 - cos)`,
      0 to 4. A pair with a large norm dominates.
    - `layer`: the same for each pair on its own, averaged over the pairs; 0 to 4.
    - `none`: `|| u_t - u_s ||`, not squared, as in the released code's unused variant.

    Source: LoRAILD (Suzuki et al. 2025, doi 10.18653/v1/2025.insights-1.10), their released code. Deviations: padding
    does not count (no mask: all positions do), and a vector of norm 1e-8 or less is taken as 0 and gets no gradient.
    Normalised distances are once differentiable.
    Raises UserError when the two sides differ in shape.
    """
    _refuse_unequal(student, teacher)
    ours = torch.stack([real_rows(side, mask) for side in student], dim=1)
    theirs = torch.stack([real_rows(side.detach(), mask) for side in teacher], dim=1)
    return _distance(ours, theirs, normalise)


@in_full_precision
def _distance(student: Tensor, teacher: Tensor, normalise: Normalise) -> Mean:
    """Return the mean over tokens for two `(tokens, pairs, features)` tensors."""
    s, t = in_one_dtype(student, teacher)
    if normalise == "layer":
        return summed(direction_distances(s, t, EPSILON)[0].mean(-1))
    s, t = s.flatten(1), t.flatten(1)
    if normalise == "none":
        return summed(torch.linalg.vector_norm(s - t, dim=-1))
    return summed(direction_distances(s, t, EPSILON)[0])


def _refuse_unequal(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if not student or len(student) != len(teacher):
        raise UserError(
            f"adapter_loss got {len(student)} student tensors and {len(teacher)} of the teacher: give one of each per "
            "matched pair, at least one."
        )
    widths = [side.shape[-1] for side in student], [side.shape[-1] for side in teacher]
    if len({*widths[0], *widths[1]}) > 1:
        raise UserError(
            f"the student's adapters give {widths[0]} features per pair and the teacher's {widths[1]}: they must be "
            "equal everywhere. Give both models adapters of the same rank on the same projections."
        )
    for ours, theirs in zip(student, teacher, strict=True):
        same_rows(ours, theirs)
