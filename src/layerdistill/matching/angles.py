"""Angles between teacher layers seen from a student layer (Yu et al. 2025, "Layer selection doesn't matter (much)")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.matching.rows import in_full_precision, real_rows, same_rows

BINS = 720
"""Bins of a histogram of angles from 0 to 180 degrees: a quarter of a degree each."""


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
        angles, defined = _per_token(*_rows(teacher_layers, student_layer, mask))
        return _without_diagonal((angles * defined).sum(0)) / defined.sum(0)


@in_full_precision
def angle_null(teacher_layers: Sequence[Tensor], student_layer: Tensor, mask: Tensor | None = None) -> Tensor:
    """What `layer_angles` would show if all layers had their norms but independent directions, in degrees.

    In a wide space independent vectors are nearly orthogonal, so that per token `cos = |S|^2 / sqrt((|T_i|^2 + |S|^2)
    (|T_k|^2 + |S|^2))`: 60 degrees for equal norms, and less the longer S is, whatever the models have learned.
    Arguments and result as in `layer_angles`; the diagonal is 0. A token where S and T_i are both 0 makes it NaN.
    """
    with torch.no_grad():
        return _without_diagonal(_null_per_token(*_rows(teacher_layers, student_layer, mask)).mean(0))


@dataclass(frozen=True)
class AngleStatistics:
    """Sums over tokens of what `layer_angles` averages, so that batches add up exactly: `a + b` is that of both.

    `tokens` (with an angle), `total` (degrees), `acute` (tokens below 90 degrees) and `null_total` (degrees, over the
    same tokens) are float64 `(layers, layers)`; `histogram` is int64 `(layers, layers, BINS)`, from 0 to 180 degrees.
    """

    tokens: Tensor
    total: Tensor
    acute: Tensor
    null_total: Tensor
    histogram: Tensor

    def __add__(self, other: AngleStatistics) -> AngleStatistics:
        return AngleStatistics(
            self.tokens + other.tokens,
            self.total + other.total,
            self.acute + other.acute,
            self.null_total + other.null_total,
            self.histogram + other.histogram,
        )

    def cpu(self) -> AngleStatistics:
        """Return the same sums in the memory of the processor."""
        return AngleStatistics(
            self.tokens.cpu(), self.total.cpu(), self.acute.cpu(), self.null_total.cpu(), self.histogram.cpu()
        )

    @property
    def mean(self) -> Tensor:
        """Mean angles in degrees, `(layers, layers)`; 0 on the diagonal, NaN where no token has an angle."""
        return _without_diagonal(self.total) / self.tokens

    @property
    def null(self) -> Tensor:
        """The norm-matched null of `angle_null`, over the tokens that have an angle."""
        return _without_diagonal(self.null_total) / self.tokens

    @property
    def fraction_acute(self) -> Tensor:
        """The share of tokens whose angle is below 90 degrees; that of the null is 1 wherever S is not 0."""
        return self.acute / self.tokens

    def quantile(self, share: float) -> Tensor:
        """Return the angle that `share` of the tokens lie below, in degrees, to within a bin of the histogram."""
        return histogram_quantile(self.histogram, share)


def histogram_quantile(counts: Tensor, share: float) -> Tensor:
    """Return the quantile of histograms `(..., bins)` from 0 to 180 degrees, evenly spread inside a bin; NaN if empty.

    `share` is between 0 and 1.
    """
    below = counts.double().cumsum(-1)
    wanted = share * below[..., -1:]
    number = torch.searchsorted(below, wanted).clamp(max=counts.shape[-1] - 1)
    inside = counts.double().gather(-1, number)
    before = below.gather(-1, number) - inside
    place = (number + (wanted - before) / inside).squeeze(-1) * (180 / counts.shape[-1])
    return torch.where(below[..., -1] > 0, place, torch.full_like(place, torch.nan))


@in_full_precision
def angle_statistics(
    teacher_layers: Sequence[Tensor], student_layer: Tensor, mask: Tensor | None = None
) -> AngleStatistics:
    """Return the sums of one batch; arguments, and the tokens left out, as in `layer_angles`."""
    with torch.no_grad():
        teachers, student = _rows(teacher_layers, student_layer, mask)
        angles, defined = _per_token(teachers, student)
        null = torch.where(defined, _null_per_token(teachers, student), torch.zeros_like(angles))
        layers = len(teachers)
        # NaN (in a real token) makes the means NaN; it has no bin.
        bins = (angles.nan_to_num() * (BINS / 180)).long().clamp(max=BINS - 1)
        pair = torch.arange(layers**2, device=angles.device).reshape(1, layers, layers)
        counts = torch.bincount((pair * BINS + bins)[defined & ~angles.isnan()], minlength=layers**2 * BINS)
        return AngleStatistics(
            tokens=defined.double().sum(0),
            total=(angles * defined).double().sum(0),
            acute=((angles < 90) & defined).double().sum(0),
            null_total=null.double().sum(0),
            histogram=counts.reshape(layers, layers, BINS),
        )


@in_full_precision
def released_cosines(first: Tensor, last: Tensor, student_layer: Tensor) -> Tensor:
    """Return the cosines that the released code of Yu et al. (2025) puts into its histogram, one per position.

    `cos = <u, v> / (|u| |v| + 1e-6)` with `u = first - S` and `v = last - S`, at every position, padding counted;
    tensors as in `layer_angles`, the result is `(positions,)`. The code means to go over all teacher layers k, but
    overwrites its list, so that only k = last is left; its first layer is block 1 and its student layer 1.
    """
    with torch.no_grad():
        teachers, student = _rows([first, last], student_layer, None)
        u, v = teachers[0] - student, teachers[1] - student
        return (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1) + 1e-6)


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


def _per_token(teachers: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Return the angles, and which of them are defined, `(tokens, layers, layers)`, of `(layers, tokens, hidden)`."""
    towards = teachers - student
    norms = towards.norm(dim=-1, keepdim=True)
    lacking = norms == 0
    towards = (towards / torch.where(lacking, torch.ones_like(norms), norms)).permute(1, 0, 2)
    has_angle = ~lacking.squeeze(-1).T
    return _degrees(towards @ towards.transpose(1, 2)), has_angle.unsqueeze(1) & has_angle.unsqueeze(2)


def _null_per_token(teachers: Tensor, student: Tensor) -> Tensor:
    student_square = student.square().sum(-1)
    lengths = (teachers.square().sum(-1) + student_square).sqrt()
    return _degrees(student_square / (lengths.unsqueeze(0) * lengths.unsqueeze(1))).permute(2, 0, 1)


def _degrees(cosines: Tensor) -> Tensor:
    return torch.rad2deg(torch.arccos(cosines.clamp(-1, 1)))


def _without_diagonal(angles: Tensor) -> Tensor:
    # The angle of a direction with itself is 0; arccos of a rounded 1 would show some hundredths of a degree.
    return angles * (1 - torch.eye(angles.shape[0], dtype=angles.dtype, device=angles.device))
