"""Angles between teacher layers seen from a student layer (Yu et al. 2025, "Layer selection doesn't matter (much)")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.matching.rows import in_full_precision, real_rows, same_rows


@in_full_precision
def layer_angles(teacher_layers: Sequence[Tensor], student_layer: Tensor, mask: Tensor | None = None) -> Tensor:
    """Angles between teacher layers seen from the student, `arccos cos(T_i - S, T_k - S)`, in degrees.

    Returns `(layers, layers)`, averaged over real tokens. `teacher_layers` holds `(batch, seq, hidden)` (or `(tokens,
    hidden)`) tensors, `student_layer` is one of that same shape, `mask` is `(batch, seq)`. An angle below 90 degrees
    says that a step towards one teacher layer is a step towards the other; but independent layers of equal norm already
    give 60 degrees, so compare with `angle_null`.

    A token where T_i equals S (copied embeddings, say) has no angle and is left out of row and column i; an entry
    without any token left is NaN. The released code adds 1e-6 to the product of norms instead, which makes such angles
    90 degrees, and counts padding. No gradient. Raises UserError when shapes differ: project the student first.
    """
    with torch.no_grad():
        teachers, student = _rows(teacher_layers, student_layer, mask)
        towards = teachers - student
        norms = towards.norm(dim=-1, keepdim=True)
        lacking = norms == 0
        towards = towards / torch.where(lacking, torch.ones_like(norms), norms)
        per_token = towards.permute(1, 0, 2)
        cosines = per_token @ per_token.transpose(1, 2)
        has_angle = (~lacking).squeeze(-1).T.to(cosines.dtype)
        tokens = has_angle.T @ has_angle
        both = has_angle.unsqueeze(1) * has_angle.unsqueeze(2)
        return _without_diagonal((_degrees(cosines) * both).sum(0)) / tokens


@in_full_precision
def angle_null(teacher_layers: Sequence[Tensor], student_layer: Tensor, mask: Tensor | None = None) -> Tensor:
    """What `layer_angles` would show if all layers had their norms but independent directions, in degrees.

    In a wide space independent vectors are nearly orthogonal, so that per token `cos = |S|^2 / sqrt((|T_i|^2 + |S|^2)
    (|T_k|^2 + |S|^2))`: 60 degrees for equal norms, and less the longer S is, whatever the models have learned.
    Arguments and result as in `layer_angles`; the diagonal is 0. A token where S and T_i are both 0 makes it NaN.
    """
    with torch.no_grad():
        teachers, student = _rows(teacher_layers, student_layer, mask)
        student_square = student.square().sum(-1)
        lengths = (teachers.square().sum(-1) + student_square).sqrt()
        cosines = student_square / (lengths.unsqueeze(0) * lengths.unsqueeze(1))
        return _without_diagonal(_degrees(cosines).mean(-1))


def _rows(teacher_layers: Sequence[Tensor], student_layer: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if len(teacher_layers) == 0:
        raise UserError("angles were asked between no teacher layers: give at least two.")
    for layer in teacher_layers:
        if layer.shape[-1] != student_layer.shape[-1]:
            raise UserError(
                f"angles need equal widths, but the student's layer is {student_layer.shape[-1]} wide and a teacher's "
                f"{layer.shape[-1]}: project the student's layer to the teacher's width first."
            )
        same_rows(student_layer, layer)
    return torch.stack([real_rows(layer, mask) for layer in teacher_layers]), real_rows(student_layer, mask)


def _degrees(cosines: Tensor) -> Tensor:
    return torch.rad2deg(torch.arccos(cosines.clamp(-1, 1)))


def _without_diagonal(angles: Tensor) -> Tensor:
    # The angle of a direction with itself is 0; arccos of a rounded 1 would show some hundredths of a degree.
    return angles * (1 - torch.eye(angles.shape[0], dtype=angles.dtype, device=angles.device))
