"""Angles between teacher layers seen from each layer of a student, over many batches, with their null."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import Batch, StackName
from layerdistill.diagnose.alignment import Alignment, alignment_of, rotated, rotations
from layerdistill.diagnose.states import layers_of, listed, number, paired_states, refuse_wider_student
from layerdistill.matching.angles import AngleStatistics, angle_statistics, histogram_quantile, released_cosines

COSINE_BINS = 1000
"""Bins of the released code's histogram of cosines, from -1 to 1."""

QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class ReleasedAngle:
    """angle(T_1, S_1, T_last) as the released code takes it, padding counted; `counts` is `(COSINE_BINS,)`."""

    counts: Tensor
    total_cosine: float
    total_degrees: float

    def __add__(self, other: ReleasedAngle) -> ReleasedAngle:
        return ReleasedAngle(
            self.counts + other.counts,
            self.total_cosine + other.total_cosine,
            self.total_degrees + other.total_degrees,
        )

    @property
    def positions(self) -> int:
        """How many token positions were counted."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class StudentAngles:
    """The angles seen from some layers of a student; `released` is None where the teacher has one block only."""

    stack: StackName
    alignment: Alignment
    layers: dict[int, AngleStatistics]
    released: ReleasedAngle | None

    def to_json(self) -> dict[str, Any]:
        """Return every matrix (rows and columns: teacher layers from 0), and the released code's histogram."""
        found: dict[str, Any] = {"alignment": self.alignment, "student_layers": {}}
        for layer, sums in self.layers.items():
            found["student_layers"][str(layer)] = {
                **summary(sums),
                "tokens": listed(sums.tokens),
                "mean": listed(sums.mean),
                "null": listed(sums.null),
                "fraction_acute": listed(sums.fraction_acute),
                "quartiles": {f"{100 * share:.0f}": listed(sums.quantile(share)) for share in QUARTILES},
                "histogram_all_pairs": {"from": 0, "to": 180, "counts": pooled_histogram(sums).tolist()},
            }
        if self.released is not None:
            positions = self.released.positions
            found["released"] = {
                "what": "angle(T_1, S_1, T_last), every position, padding counted, 1e-6 added to the norms' product",
                "positions": positions,
                "mean_cosine": number(self.released.total_cosine / positions),
                "mean_degrees": number(self.released.total_degrees / positions),
                "histogram": {"from": -1, "to": 1, "counts": self.released.counts.tolist()},
            }
        return found


def student_angles(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    stack: StackName = "",
    student_layers: Sequence[int] | None = None,
) -> StudentAngles:
    """Return the angles between all teacher layers seen from `student_layers` (all but the embeddings by default).

    Summed over the real tokens of all batches, so how they are batched does not matter. A narrower student is rotated
    into the teacher's space first (see `rotations`). Raises LeftOut for a wider one, UserError for a layer it lacks.
    """
    refuse_wider_student(teacher, student, stack)
    depth = len(layers_of(student, stack)) - 1
    chosen = list(student_layers) if student_layers is not None else list(range(1, depth + 1))
    for layer in chosen:
        if not 0 <= layer <= depth:
            raise UserError(f"student layer {layer} does not exist: there are layers 0 to {depth}.")
    turned = rotations(teacher, student, batches, stack)
    sums: dict[int, AngleStatistics] = {}
    released: ReleasedAngle | None = None
    for states in paired_states(teacher, student, batches, stack):
        theirs = [layer.float() for layer in states.teacher]
        for layer in chosen:
            found = angle_statistics(theirs, rotated(states.student[layer], turned[layer]), states.mask).cpu()
            sums[layer] = sums[layer] + found if layer in sums else found
        if len(theirs) > 2:
            one = released_angle(released_cosines(theirs[1], theirs[-1], rotated(states.student[1], turned[1])))
            released = one if released is None else released + one
    return StudentAngles(stack, alignment_of(teacher, student, stack), sums, released)


def released_angle(cosines: Tensor) -> ReleasedAngle:
    """Return the histogram and the sums of cosines, one per position."""
    inside = cosines.clamp(-1, 1)
    counts = torch.histc(inside.cpu().float(), COSINE_BINS, -1, 1).long()
    return ReleasedAngle(counts, float(inside.double().sum()), math.degrees(float(inside.double().arccos().sum())))


def pairs_above_diagonal(matrix: Tensor) -> Tensor:
    """Return the entries i < k of `(layers, layers)` that are not NaN, `(pairs,)`."""
    above = matrix[above_diagonal(len(matrix))]
    return above[~above.isnan()]


def above_diagonal(layers: int) -> tuple[Tensor, Tensor]:
    """Return the row and column numbers of all pairs i < k."""
    rows, columns = torch.triu_indices(layers, layers, offset=1)
    return rows, columns


def pooled_histogram(sums: AngleStatistics) -> Tensor:
    """Return the histogram over all tokens and all pairs i < k of teacher layers, `(BINS,)`."""
    return sums.histogram[above_diagonal(len(sums.mean))].sum(0)


def summary(sums: AngleStatistics) -> dict[str, float | None]:
    """Return the numbers of a student layer over all pairs i < k of teacher layers: degrees, and a share from 0 to 1.

    `smallest` and `widest` are mean angles of single pairs; quartiles and the share are over tokens and pairs.
    """
    mean, null = pairs_above_diagonal(sums.mean), pairs_above_diagonal(sums.null)
    if not len(mean):
        return dict.fromkeys(("angle", "null_angle", "smallest", "widest", "acute", "q25", "q50", "q75"))
    upper = above_diagonal(len(sums.mean))
    histogram = pooled_histogram(sums)
    return {
        "angle": number(float(mean.mean())),
        "null_angle": number(float(null.mean())),
        "smallest": number(float(mean.min())),
        "widest": number(float(mean.max())),
        "acute": number(float(sums.acute[upper].sum() / sums.tokens[upper].sum())),
        **{f"q{100 * share:.0f}": number(float(histogram_quantile(histogram, share))) for share in QUARTILES},
    }
