"""RAIL-KD's two steps: hidden states averaged over tokens, and the distance between directions of mapped averages."""

from __future__ import annotations

import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import Mean
from layerdistill.matching.directions import directions
from layerdistill.matching.rows import in_full_precision, in_one_dtype, summed, upcast


@in_full_precision
def mean_over_tokens(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of `(batch, seq, hidden)` states over the real tokens of each example, `(batch, hidden)`.

    `mask` is `(batch, seq)`, 1 on real tokens; no mask averages over all positions, padding included. What stands in
    padding, NaN included, reaches neither the value nor the gradient. An example without a real token gives zeros.
    The result is float32 (float64 stays float64). Source: RAIL-KD (Haidar et al. 2022), as LoRAILD's released code has
    it, which averages over padding. Raises UserError for shapes that do not fit.
    """
    if hidden.dim() != 3:
        raise UserError(f"hidden states have the shape {tuple(hidden.shape)}, but must be (batch, seq, hidden).")
    states = upcast(hidden)
    if mask is None:
        return states.mean(dim=1)
    if mask.shape != hidden.shape[:2]:
        raise UserError(
            f"the mask has shape {tuple(mask.shape)}, but must have the shape {tuple(hidden.shape[:2])} of the states "
            "without their last axis: 1 (or True) on real tokens, 0 on padding."
        )
    real = mask.to(states.device).ne(0).unsqueeze(-1)
    # Chosen, not multiplied: 0 times a NaN in padding would be NaN.
    return torch.where(real, states, torch.zeros_like(states)).sum(dim=1) / real.sum(dim=1).clamp(min=1)


@in_full_precision
def direction_distance(student: Tensor, teacher: Tensor, squared: bool = True) -> Mean:
    """Distance between the vectors of each example, both divided by their L2 norm, averaged over examples.

    `student` and `teacher` are `(batch, features)`; the count is in examples. Squared it is `2 (1 - cos)`, 0 to 4, as
    in the RAIL-KD paper; else its root, 0 to 2, as in LoRAILD's released code, whose gradient keeps its length where
    the two nearly agree (and is taken as 0 where they are equal). A zero vector stays zero and receives no gradient.
    Unlike the other losses this one sends a gradient to the teacher's side too, where a map may be trained.
    Raises UserError when shapes differ.
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise UserError(
            f"the student's vectors have the shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: "
            "both must be (batch, features), with the same number of each."
        )
    s, t = (directions(side) for side in in_one_dtype(upcast(student), upcast(teacher)))
    if squared:
        return summed((s - t).square().sum(-1))
    return summed(torch.linalg.vector_norm(s - t, dim=-1))
